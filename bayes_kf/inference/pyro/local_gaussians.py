"""Local Gaussian terms in the place of scale-mixture priors, evaluated again as the belief changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayes_kf.inference.covariance.diagonal import DiagonalGaussian
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.pyro.site_priors import SitePrior

MAX_SWEEPS = 50  # after one update; the next update goes on from there
RTOL = 1e-6  # relative change of every precision below which the terms have converged


def prior_of(priors: Sequence[SitePrior]) -> DiagonalGaussian:
    """The Gaussian prior of the filter before any data, in the order of the priors."""
    mean, precision = [p.mean.reshape(-1) for p in priors], [p.precision().reshape(-1) for p in priors]
    return DiagonalGaussian(torch.cat(mean), torch.cat(precision).reciprocal())


def reevaluated(state: FilterState, priors: Sequence[SitePrior]) -> FilterState:
    """The state with the local terms at their fixed point, and the belief with the new terms for the old ones.

    A belief is a product of its prior N(m, diag(λ)⁻¹) and the data. With λ' for λ, P'⁻¹ = P⁻¹ + diag(λ' − λ) and
    μ' = μ + P'(λ' − λ)∘(m − μ), which is exact for every structure that adds to a diagonal of the precision.

    Args:
        state: after an update, of a filter without dynamics.
        priors: one for each tensor, in the order of the belief.
    """
    if all(prior.family == "Normal" for prior in priors):
        return state
    mean = state.prior.mean
    for _ in range(MAX_SWEEPS):
        belief = state.belief
        squares = (belief.mean - mean).square() + belief.marginal_variance()
        precision = _precisions(priors, squares, 1.0 / state.prior.variance)
        added = precision - 1.0 / state.prior.variance
        if float((added * state.prior.variance).abs().max()) <= RTOL:
            break
        after = belief.add_precision(added)
        moved = belief.mean + after.product(added * (mean - belief.mean))
        state = state._replace(belief=after.with_mean(moved), prior=DiagonalGaussian(mean, precision.reciprocal()))
    return state


def _precisions(priors: Sequence[SitePrior], squares: Tensor, present: Tensor) -> Tensor:
    """λ of every number, (n,); those of Normal priors are the present ones, to the bit."""
    sizes = [prior.mean.numel() for prior in priors]
    parts = zip(priors, squares.split(sizes), present.split(sizes), strict=True)
    return torch.cat(
        [
            now if prior.family == "Normal" else prior.precision(square.view_as(prior.mean)).reshape(-1)
            for prior, square, now in parts
        ]
    )
