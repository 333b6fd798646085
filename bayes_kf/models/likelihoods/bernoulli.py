"""The Bernoulli likelihood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from bayes_kf.models.likelihoods.canonical import CanonicalLikelihood
from bayes_kf.models.likelihoods.target_checks import LOG_FLOOR, check_shape

if TYPE_CHECKING:
    import pyro.distributions as dist


@dataclass(frozen=True)
class Bernoulli(CanonicalLikelihood):
    """m independent yes/no answers per example; π = sigmoid(η).

    A target between 0 and 1 is a soft label: the expectation of log p(y | η) under that probability of a yes.
    """

    name: str = "bernoulli"
    target_kind: ClassVar[str] = "class"
    outputs_per_target: ClassVar[int] = 1

    def check(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Targets as floats (B, m) from 0 to 1, or ValueError."""
        targets = check_shape(outputs, targets)
        if not bool(((targets >= 0) & (targets <= 1)).all()):
            raise ValueError(f"`targets` must be 0 or 1 for a Bernoulli likelihood, or between, got {_other(targets)}.")
        return targets

    def mean(self, outputs: Tensor) -> Tensor:
        """Probabilities of a one, (..., m)."""
        return outputs.sigmoid()

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """e = y − π, (B, m)."""
        return targets - self.mean(outputs)

    def variance(self, outputs: Tensor) -> Tensor:
        """V = diag(π(1 − π)), (B, m, m)."""
        return torch.diag_embed(outputs.sigmoid() * (-outputs).sigmoid())

    def whiten(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """W = diag(√V) (B, m, m) and u = e/√V (B, m)."""
        log_variance = torch.nn.functional.logsigmoid(outputs) + torch.nn.functional.logsigmoid(-outputs)
        root = (0.5 * log_variance.clamp_min(LOG_FLOOR)).exp()
        return torch.diag_embed(root), self.residual(outputs, targets) / root

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """log p(y | η) per example, summed over its m answers, (..., B)."""
        return (targets * outputs - torch.nn.functional.softplus(outputs)).sum(-1)

    def distribution(self, outputs: Tensor) -> dist.Distribution:
        """p(y | η) with batch shape (B,) and event shape (m,)."""
        import pyro.distributions as dist

        return dist.Bernoulli(logits=outputs).to_event(1)

    def mixture(self, outputs: Tensor, log_weights: Tensor) -> Tensor:
        """η of the weighted mean of G predictions' π, (B, m), from (G, B, m) and log weights (G,)."""
        yes, no = torch.nn.functional.logsigmoid(outputs), torch.nn.functional.logsigmoid(-outputs)
        return (yes + log_weights[:, None, None]).logsumexp(0) - (no + log_weights[:, None, None]).logsumexp(0)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """A zero or one drawn from each of the outputs, (..., m), on the generator's device."""
        return torch.bernoulli(self.mean(outputs).to(generator.device), generator=generator)

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Share of the m answers that are correct, (B,)."""
        return ((outputs > 0) == (targets > 0.5)).to(outputs.dtype).mean(-1)


def _other(values: Tensor) -> str:
    """A value outside [0, 1], for an error message."""
    return f"{values[(values < 0) | (values > 1)].flatten()[0].item():g}"
