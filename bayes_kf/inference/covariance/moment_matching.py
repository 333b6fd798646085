"""Gaussian beliefs with the moments of draws."""

from __future__ import annotations

import torch
from torch import Tensor

from bayes_kf.inference.covariance.block_diagonal import BlockDiagonalGaussian
from bayes_kf.inference.covariance.diagonal import DiagonalGaussian
from bayes_kf.inference.covariance.full import FullGaussian
from bayes_kf.inference.covariance.gaussian_belief import GaussianBelief
from bayes_kf.inference.covariance.low_rank import LowRankGaussian, truncate
from bayes_kf.inference.covariance.rescaling import rescaled


def moment_matched(prior: GaussianBelief, draws: Tensor) -> GaussianBelief:
    """The belief with the mean of S draws, and with their covariance C as far as the structure can hold it.

    - diagonal: the variances diag(C);
    - block diagonal: the covariance of each block;
    - full: C;
    - low rank: a precision D + WWᵀ with the marginal variances diag(C), in which W has the L directions that
      deviate most from D = (diag(C) λ)⁻¹, λ the largest eigenvalue of the correlation matrix. It is exact if L ≥ n − 1.

    C divides by S − 1.

    Args:
        prior: a belief of the structure to fill; its values are not used.
        draws: (S, n).

    Raises:
        ValueError: if there are too few draws for a positive definite covariance, if C is not positive definite, or if
            the structure is not one of the package's.
    """
    num_draws, num_parameters = draws.shape
    sizes = prior.sizes.tolist() if isinstance(prior, BlockDiagonalGaussian) else [num_parameters]
    needed = 2 if isinstance(prior, DiagonalGaussian) else max(sizes) + 1
    if num_draws < needed:
        raise ValueError(
            f"`samples` must hold at least {needed:,} draws for a {type(prior).__name__} of this size, got "
            f"{num_draws:,}; `covariance` 'diagonal' needs 2."
        )
    mean = draws.double().mean(0)
    centred = draws.double() - mean
    mean = mean.to(prior.mean)
    variance = centred.square().sum(0) / (num_draws - 1)
    if not bool((variance > 0).all()):
        raise ValueError(f"`samples` must vary in every number, got {int((variance <= 0).sum())} without variance.")
    if isinstance(prior, DiagonalGaussian):
        return type(prior)(mean, variance.to(mean))
    blocks = [part.mT @ part / (num_draws - 1) for part in centred.split(sizes, 1)]
    if isinstance(prior, FullGaussian):
        return type(prior)(mean, _checked(blocks[0]).to(mean))
    if isinstance(prior, BlockDiagonalGaussian):
        return type(prior)(mean, torch.cat([_checked(C).flatten() for C in blocks]).to(mean), prior.sizes)
    if isinstance(prior, LowRankGaussian):
        diagonal, factor = _low_rank_precision(_checked(blocks[0]), prior.factor.shape[1])
        belief = LowRankGaussian.from_precision(mean.double(), diagonal, factor)
        scaled = rescaled(belief, (variance / belief.marginal_variance()).sqrt())
        return type(prior).from_precision(mean, scaled.diagonal.to(mean), scaled.factor.to(mean))
    raise ValueError(f"`covariance` must be one of the package's structures, got {type(prior).__name__}.")


def _checked(covariance: Tensor) -> Tensor:
    """The covariance; ValueError unless it is positive definite."""
    if int(torch.linalg.cholesky_ex(covariance).info):
        raise ValueError("`samples` must have a positive definite covariance, got a singular one.")
    return covariance


def _low_rank_precision(covariance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """D (n,) and W (n, L) with D + WWᵀ ≈ C⁻¹, in which the other directions keep the marginal variances roughly."""
    sd = covariance.diagonal().sqrt()
    values, vectors = torch.linalg.eigh(covariance / torch.outer(sd, sd))  # of the correlations, ascending
    lowest = 1.0 / values[-1]  # the smallest precision in units of the marginal variances
    diagonal = lowest / sd.square()
    # columns of the exact factor F, FFᵀ = C⁻¹ − D; their squared lengths under D⁻¹, ascending
    columns = (vectors / sd.unsqueeze(-1) * (1.0 / values - lowest).clamp_min(0.0).sqrt()).flip(1)
    squares = ((1.0 / values - lowest).clamp_min(0.0) / lowest).flip(0)
    factor, diagonal = truncate(
        diagonal, squares, torch.eye(len(squares)).to(squares), min(rank, len(squares)), lambda some: columns @ some
    )
    padding = factor.new_zeros(len(factor), rank - factor.shape[1])
    return diagonal, torch.cat([padding, factor], 1)
