"""A mixture of normal distributions for each of several targets."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class NormalMixture(NamedTuple):
    """Σ_k w_k N(y; loc_k, variance_k) of each target.

    Attributes:
        log_weights: log w_k, (K, 1, 1).
        locs: (K, B, m), or (1, B, m) if all components have the same.
        variances: (K, B, m).
    """

    log_weights: Tensor
    locs: Tensor
    variances: Tensor

    def log_density(self, values: Tensor) -> Tensor:
        """Log density at values (B, m), (B, m)."""
        squares = (values - self.locs).square() / self.variances
        return (self.log_weights - 0.5 * (squares + (2.0 * math.pi * self.variances).log())).logsumexp(0)

    def cdf(self, values: Tensor) -> Tensor:
        """P(y ≤ value) at values (B, m), (B, m)."""
        return (self.log_weights.exp() * torch.special.ndtr((values - self.locs) / self.variances.sqrt())).sum(0)
