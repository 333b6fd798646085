"""Beliefs whose standard deviations are multiplied, parameter by parameter, with unchanged correlations."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from bayes_kf.inference.covariance.block_diagonal import BlockDiagonalGaussian
from bayes_kf.inference.covariance.diagonal import DiagonalGaussian
from bayes_kf.inference.covariance.full import FullGaussian
from bayes_kf.inference.covariance.gaussian_belief import GaussianBelief
from bayes_kf.inference.covariance.low_rank import LowRankGaussian

Belief = TypeVar("Belief", bound=GaussianBelief)


def rescaled(belief: Belief, scale: Tensor) -> Belief:
    """N(μ, S P S) with S = diag(scale), exactly in the structure of the belief.

    A low-rank precision D + WWᵀ becomes S⁻¹DS⁻¹ + (S⁻¹W)(S⁻¹W)ᵀ; WᵀD⁻¹W does not change.

    Args:
        belief: N(μ, P).
        scale: positive factors, (n,).

    Raises:
        ValueError: if the structure is not one of the package's.
    """
    if isinstance(belief, DiagonalGaussian):
        return belief._replace(variance=scale.square() * belief.variance)
    if isinstance(belief, FullGaussian):
        return belief._replace(covariance=scale.unsqueeze(-1) * belief.covariance * scale)
    if isinstance(belief, BlockDiagonalGaussian):
        blocks = [scale[where].unsqueeze(-1) * P * scale[where] for where, P in belief.blocks()]
        return belief._replace(covariance=torch.cat([P.flatten() for P in blocks]))
    if isinstance(belief, LowRankGaussian):
        diagonal, factor = belief.diagonal / scale.square(), belief.factor / scale.unsqueeze(-1)
        return belief._replace(diagonal=diagonal, factor=factor)
    raise ValueError(f"`belief` must have a covariance structure that can be rescaled, got {type(belief).__name__}.")
