"""The distribution of a regression's targets under several posteriors with weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayes_kf.inference.predictive.targets import target_distribution
from bayes_kf.inference.predictive.targets.quantile_search import root, smallest_count
from bayes_kf.inference.predictive.targets.target_distribution import TargetDistribution
from bayes_kf.models.likelihood import Poisson


@dataclass(frozen=True)
class TargetMixture:
    """Σ_k w_k p_k(y) of the distributions p_k of the same targets; the methods of ``TargetDistribution``.

    Attributes:
        parts: p_k, of the same kind of likelihood.
        weights: w_k, which sum to one.
    """

    parts: tuple[TargetDistribution, ...]
    weights: tuple[float, ...]

    @property
    def is_normal(self) -> bool:
        """Whether every target has a normal distribution: never, for several parts."""
        return False

    @property
    def is_joint(self) -> bool:
        """Whether the targets of an example can be drawn together."""
        return all(part.is_joint for part in self.parts)

    def to(self, device: torch.device | str) -> TargetMixture:
        """The same on another device."""
        return TargetMixture(tuple(part.to(device) for part in self.parts), self.weights)

    def without_joint(self) -> TargetMixture:
        """The same without the covariance of different targets of an example."""
        return TargetMixture(tuple(part.without_joint() for part in self.parts), self.weights)

    def cdf(self, values: Tensor) -> Tensor:
        """P(y ≤ value) of each target at values (B, m), (B, m), float64."""
        return torch.stack([w * part.cdf(values) for w, part in zip(self.weights, self.parts, strict=True)]).sum(0)

    def quantile(self, levels: Sequence[float]) -> Tensor:
        """Quantiles of each target, (Q, B, m), float64; between the smallest and the largest of the parts."""
        each = torch.stack([part.quantile(levels) for part in self.parts])  # (K, Q, B, m)
        low, high = each.amin(0), each.amax(0)
        if isinstance(self.parts[0].family, Poisson):
            return torch.stack([smallest_count(self.cdf, q, most) for q, most in zip(levels, high, strict=True)])
        return torch.stack([root(self.cdf, *limits) for limits in zip(levels, low, high, strict=True)])

    def sample(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """Draws of the targets, (S, B, m): one part for all targets of a draw, which are drawn together."""
        return self._sample(num_samples, generator, "sample")

    def marginal_sample(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """Draws of the targets, (S, B, m), in which those of an example are independent given the part."""
        return self._sample(num_samples, generator, "marginal_sample")

    def _sample(self, num_samples: int, generator: torch.Generator, method: str) -> Tensor:
        weights = torch.tensor(self.weights, dtype=torch.float64, device=generator.device)
        chosen = torch.multinomial(weights, num_samples, replacement=True, generator=generator)
        drawn: Tensor | None = None
        for number, part in enumerate(self.parts):
            own = (chosen == number).nonzero()[:, 0]
            if len(own) == 0:
                continue
            values: Tensor = getattr(part, method)(len(own), generator)
            if drawn is None:
                drawn = values.new_empty((num_samples, *values.shape[1:]))
            drawn[own.to(drawn.device)] = values
        assert drawn is not None  # a draw has a part
        return drawn


def concatenate(parts: Sequence[TargetDistribution | TargetMixture]) -> TargetDistribution | TargetMixture:
    """One distribution from those of consecutive batches, which are all of one kind."""
    mixtures = [part for part in parts if isinstance(part, TargetMixture)]
    if not mixtures:
        return target_distribution.concatenate([part for part in parts if isinstance(part, TargetDistribution)])
    members = zip(*(mixture.parts for mixture in mixtures), strict=True)
    return TargetMixture(tuple(target_distribution.concatenate(member) for member in members), mixtures[0].weights)
