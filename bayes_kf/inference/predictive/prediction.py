"""A predictive distribution for a batch, or for all batches of a loader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

METHODS = ("linearized", "probit", "sampled", "mean")


@dataclass(frozen=True, repr=False)
class Prediction:
    """Predictions for B examples of m outputs.

    Attributes:
        mean: predictive mean of the target, (B, m): class probabilities, probabilities of a one, real values or rates.
        probs: ``mean`` again for categorical and Bernoulli likelihoods; None for regression and counts.
        samples: draws of the likelihood's mean under the posterior, (S, B, m); None for "mean" and "probit".
        variance: predictive variance of the target, (B, m), aleatoric plus epistemic; None for classification.
        entropy: total predictive entropy in nats, (B,); a sum over the outputs of a Bernoulli likelihood. For
            regression that of the predictive Gaussian (with "sampled": a sum over outputs). None for counts.
        aleatoric: classification: mean entropy over draws in nats, (B,); None without draws. Otherwise the mean
            of the noise variances, (B, m).
        epistemic: classification: entropy − aleatoric (mutual information) in nats, (B,). Otherwise the variance of
            the means, (B, m).
        log_prob: log predictive density of the targets in nats, (B,); None if no targets were given.
    """

    mean: Tensor
    probs: Tensor | None = None
    samples: Tensor | None = None
    variance: Tensor | None = None
    entropy: Tensor | None = None
    aleatoric: Tensor | None = None
    epistemic: Tensor | None = None
    log_prob: Tensor | None = None

    def __repr__(self) -> str:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in values.items() if value is not None)
        return f"{type(self).__name__}({shapes})"


@dataclass(frozen=True, repr=False)
class LoaderPrediction(Prediction):
    """Predictions for all N examples of a loader, on the CPU.

    Attributes:
        targets: targets of the loader, (N,) or (N, m); None if it has none.
    """

    targets: Tensor | None = None


def concatenate(parts: Sequence[Prediction]) -> Prediction:
    """One prediction from those of consecutive batches; its type is that of the first."""
    joined: dict[str, Any] = {}
    for field in fields(parts[0]):
        values = [getattr(part, field.name) for part in parts]
        dim = 1 if field.name == "samples" else 0
        joined[field.name] = None if any(v is None for v in values) else torch.cat(values, dim)
    return type(parts[0])(**joined)
