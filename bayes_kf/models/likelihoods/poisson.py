"""The Poisson likelihood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from bayes_kf.models.likelihoods.canonical import CanonicalLikelihood
from bayes_kf.models.likelihoods.target_checks import LOG_FLOOR, check_shape

if TYPE_CHECKING:
    import pyro.distributions as dist

MAX_RATE = 1e6  # above it a count is drawn as a rounded Gaussian: torch's own draws are no counts far above it


@dataclass(frozen=True)
class Poisson(CanonicalLikelihood):
    """Counts; the outputs are log rates, π = λ = exp(η)."""

    name: str = "poisson"
    target_kind: ClassVar[str] = "count"
    outputs_per_target: ClassVar[int] = 1

    def check(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Targets as floats (B, m) of whole numbers ≥ 0, or ValueError."""
        targets = check_shape(outputs, targets)
        if bool((targets < 0).any()) or bool((targets != targets.round()).any()):
            raise ValueError("`targets` must be whole numbers >= 0 for a Poisson likelihood, got others.")
        return targets

    def mean(self, outputs: Tensor) -> Tensor:
        """Rates λ, (..., m)."""
        return outputs.exp()

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """e = y − λ, (B, m)."""
        return targets - outputs.exp()

    def variance(self, outputs: Tensor) -> Tensor:
        """V = diag(λ), (B, m, m)."""
        return torch.diag_embed(outputs.exp())

    def whiten(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """W = diag(√λ) (B, m, m) and u = (y − λ)/√λ (B, m)."""
        root = (0.5 * outputs.clamp_min(LOG_FLOOR)).exp()
        return torch.diag_embed(root), self.residual(outputs, targets) / root

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """log p(y | η) per example, summed over outputs, (..., B); −inf for a rate that overflows, never NaN."""
        return (targets * outputs - outputs.exp() - torch.lgamma(targets + 1.0)).sum(-1)

    def distribution(self, outputs: Tensor) -> dist.Distribution:
        """p(y | η) with batch shape (B,) and event shape (m,)."""
        import pyro.distributions as dist

        return dist.Poisson(outputs.exp()).to_event(1)

    def target_variance(self, outputs: Tensor) -> Tensor:
        """Var(y | η) = λ, (..., m)."""
        return outputs.exp()

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """A count drawn from each of the outputs, (..., m), on the generator's device."""
        rate = self.mean(outputs).to(generator.device)
        counts = torch.poisson(rate.clamp_max(MAX_RATE), generator=generator)
        if bool((rate <= MAX_RATE).all()):
            return counts
        unit = torch.randn(rate.shape, generator=generator, dtype=rate.dtype, device=rate.device)
        return torch.where(rate <= MAX_RATE, counts, (rate + rate.sqrt() * unit).round())

    def cdf(self, outputs: Tensor, values: Tensor) -> Tensor:
        """P(y ≤ value | η) of each target, (..., m)."""
        count, rate = torch.broadcast_tensors(values.floor(), outputs.exp())
        return torch.where(count < 0, 0.0, torch.special.gammaincc(count.clamp_min(0.0) + 1.0, rate))

    def mixture(self, outputs: Tensor, log_weights: Tensor) -> Tensor:
        """The log of the weighted mean of G predictions' rates, (B, m), from (G, B, m) and log weights (G,)."""
        return (outputs + log_weights[:, None, None]).logsumexp(0)

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """None: correctness is not defined for a count."""
        return None
