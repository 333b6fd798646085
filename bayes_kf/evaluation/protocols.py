"""Protocols of the posteriors and predictions that `evaluate` accepts."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class LoaderPrediction(Protocol):
    """Predictions for all examples of a loader, in order. Attributes that do not apply are None."""

    @property
    def probs(self) -> Tensor | None:
        """Class probabilities (N, C); for Bernoulli outputs the probability of class one, (N,) or (N, m); else None."""

    @property
    def targets(self) -> Tensor | None:
        """Targets (N, ...), or None if the loader has none."""

    @property
    def entropy(self) -> Tensor | None:
        """Total entropy, of the mean prediction, (N,), nats."""

    @property
    def aleatoric(self) -> Tensor | None:
        """Aleatoric entropy, the mean entropy of the draws, (N,), nats."""

    @property
    def epistemic(self) -> Tensor | None:
        """Epistemic entropy, the mutual information of label and parameters, (N,), nats."""

    @property
    def log_prob(self) -> Tensor | None:
        """Predictive log probability (or density) of each example's target, (N,)."""

    @property
    def mean(self) -> Tensor | None:
        """Predictive mean of real targets, (N, m)."""

    @property
    def variance(self) -> Tensor | None:
        """Predictive variance of real targets, with observation noise, (N, m)."""

    @property
    def samples(self) -> Tensor | None:
        """Draws of real targets, with observation noise, (S, N, m)."""


class PosteriorLike(Protocol):
    """A posterior that predicts the examples of a loader.

    Optional attributes: `variance`, tensor name to posterior variances; `notes`, sentences for the report;
    `output_variance`, a method from a batch to the contribution of each tensor to the variance of the outputs.
    """

    @property
    def config(self) -> Any:
        """The configuration, a dataclass with a field `likelihood`, or None."""

    @property
    def history(self) -> Mapping[str, Tensor] | None:
        """Series of the fit, log_loss and correct for each example, innovation and dof for each update."""

    def predict_loader(
        self, loader: Any, *, method: str, num_samples: int, generator: torch.Generator
    ) -> LoaderPrediction:
        """Predictions for every example of the loader.

        Args:
            loader: Batches in the form that the posterior accepts.
            method: Name of the predictive method.
            num_samples: Number of draws for each prediction.
            generator: Source of the random draws.
        """
