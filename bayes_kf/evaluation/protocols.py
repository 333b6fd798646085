"""What `evaluate` needs of a posterior; anything with these attributes will do."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class LoaderPrediction(Protocol):
    """Predictions for a whole loader, in its order. What does not apply is None."""

    @property
    def probs(self) -> Tensor | None:
        """Class probabilities (N, C); for Bernoulli outputs the probability of one, (N,) or (N, m); else None."""

    @property
    def targets(self) -> Tensor | None:
        """Targets (N, ...), or None where the loader has none."""

    @property
    def entropy(self) -> Tensor | None:
        """Entropy of the averaged prediction, (N,), nats."""

    @property
    def aleatoric(self) -> Tensor | None:
        """Average entropy of the draws, (N,), nats."""

    @property
    def epistemic(self) -> Tensor | None:
        """Mutual information of label and parameters, (N,), nats."""

    @property
    def log_prob(self) -> Tensor | None:
        """Predictive log probability (or density) of each example's target, (N,)."""

    @property
    def mean(self) -> Tensor | None:
        """Predictive mean of a real target, (N, m)."""

    @property
    def variance(self) -> Tensor | None:
        """Predictive variance of a real target, noise included, (N, m)."""

    @property
    def samples(self) -> Tensor | None:
        """Draws of a real target, noise included, (S, N, m)."""


class PosteriorLike(Protocol):
    """A belief that predicts a loader.

    May also have `variance`, tensor name to posterior variances, and `notes`, sentences for the page.
    """

    @property
    def config(self) -> Any:
        """The settings, a dataclass with a `likelihood`, or None."""

    @property
    def history(self) -> Mapping[str, Tensor] | None:
        """Series recorded while learning: log_loss and correct for each example, innovation and dof for each update."""

    def predict_loader(
        self, loader: Any, *, method: str, num_samples: int, generator: torch.Generator
    ) -> LoaderPrediction:
        """Predictions for every example of the loader."""
