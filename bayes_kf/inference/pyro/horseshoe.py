"""The horseshoe prior with its local scales integrated out, as a Pyro distribution of one site."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions.utils import broadcast_all

EULER = 0.5772156649015329  # γ
SERIES_TERMS = 24  # of E₁ below z = 1: the next one is below 1e-24
FRACTION_TERMS = 80  # of the continued fraction from z = 1 on: an error of about exp(−4√80)


class Horseshoe(TorchDistribution):
    """θ = m + τ λ z, with z ~ N(0, 1) and λ half-Cauchy, all numbers independent (Carvalho, Polson and Scott 2010).

    The density is K e^u E₁(u)/τ with u = (θ − m)²/(2τ²), K = (2π³)^(−1/2) and the exponential integral E₁. It is
    infinite at m and has the tails of a Cauchy distribution. The local scales λ are no sites of their own, so that a
    model has one site for each tensor.

    Args:
        loc: m.
        scale: τ > 0.
        validate_args: as for every distribution.

    Example:
        >>> Horseshoe(0.0, 1.0).log_prob(torch.tensor(1.0)).exp()
        tensor(0.1172)
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012 (as torch has it)
    support = constraints.real
    has_rsample = True

    def __init__(self, loc: float | Tensor, scale: float | Tensor, validate_args: bool | None = None) -> None:
        self.loc, self.scale = broadcast_all(loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Horseshoe | None = None) -> Horseshoe:
        """The distribution with another batch shape."""
        new = self._get_checked_instance(Horseshoe, _instance)
        new.loc, new.scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        super(Horseshoe, new).__init__(new.loc.shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """A draw, sample_shape + batch_shape."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        local = torch.distributions.HalfCauchy(torch.ones_like(self.scale)).sample(torch.Size(sample_shape))
        return self.loc + self.scale * local * noise

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density; infinite at ``loc``."""
        if self._validate_args:
            self._validate_sample(value)
        u = 0.5 * ((value - self.loc) / self.scale).square()
        return _scaled_exponential_integral(u).log() - self.scale.log() - 0.5 * math.log(2.0 * math.pi**3)


def _scaled_exponential_integral(u: Tensor) -> Tensor:
    """e^u E₁(u) for u ≥ 0: the power series below 1, a continued fraction from there on."""
    small, large = u.clamp(torch.finfo(u.dtype).tiny, 1.0), u.clamp_min(1.0)
    power, series = torch.ones_like(small), -EULER - small.log()
    for k in range(1, SERIES_TERMS):
        power = -power * small / k  # (−u)^k / k!
        series = series - power / k
    fraction = large + 2 * FRACTION_TERMS + 1
    for k in range(FRACTION_TERMS, 0, -1):
        fraction = large + (2 * k - 1) - k**2 / fraction
    return torch.where(u < 1.0, small.exp() * series, 1.0 / fraction)
