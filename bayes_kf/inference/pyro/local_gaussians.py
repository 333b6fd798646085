"""Local Gaussian terms in the place of scale-mixture priors, by expectation propagation (Minka 2001).

The belief is a product of the data and of one term N(mᵢ, 1/λᵢ) for each number's prior. Without its own term, a number
has the cavity N(c, 1/τ), τ = 1/Pᵢᵢ − λᵢ. The term is chosen so that the belief has the mean and the variance of the
cavity times the true prior. For one number that is the exact posterior; for several it is close to it if the data's
terms are Gaussian. The moments are one-dimensional integrals over the logarithm of the local scale.

After an update all terms are evaluated together, damped, until they hardly change; a sweep takes 192 nodes a number. A
term whose precision would be negative, which heavy tails can ask for, gets nearly none; a number that the data say
nothing about keeps its term.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayes_kf.inference.covariance.diagonal import DiagonalGaussian
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.pyro.site_priors import NORMAL, SitePrior

MAX_SWEEPS = 20  # after one update; the next update goes on from there
DAMPING = 0.7  # share of the way to the new term, against oscillation between correlated numbers
RTOL = 1e-4  # change of every term's precision, relative to its number's precision, below which they have converged
MIN_PRECISION = 1e-4  # of a term, in units of the prior's scale
MIN_INFORMATION = 1e-3  # τ in these units: below it, the variance of heavy tails would be that of the prior, infinite
MAX_INITIAL_VARIANCE = 10.0  # of a term before any data, in these units, for the same reason
CHUNK = 2**14  # numbers whose integrals are computed at once


def prior_of(priors: Sequence[SitePrior]) -> DiagonalGaussian:
    """The Gaussian prior of the filter before any data, with the moments of the priors, in their order.

    The variance is at most ten times the square of the scale where it is infinite or larger than that.
    """
    variances = [p.variance().clamp_max(MAX_INITIAL_VARIANCE * p.scale.square()) for p in priors]
    return DiagonalGaussian(
        torch.cat([p.mean.reshape(-1) for p in priors]), torch.cat([v.reshape(-1) for v in variances])
    )


def reevaluated(state: FilterState, priors: Sequence[SitePrior]) -> FilterState:
    """The state with its local terms evaluated again, and the belief with the new terms for the old ones.

    With λ' for λ and h' = λ'm' for h, P'⁻¹ = P⁻¹ + diag(λ' − λ) and μ' = μ + P'(h' − h − (λ' − λ)∘μ). This is exact for
    every structure that adds to a diagonal of the precision.

    Args:
        state: after an update, of a filter without dynamics.
        priors: one for each tensor, in the order of the belief. Normal ones do not change.
    """
    if all(prior.family == NORMAL for prior in priors):
        return state
    for _ in range(MAX_SWEEPS):
        belief, old = state.belief, state.prior
        new, change = _new_terms(belief.mean, belief.marginal_variance(), old, priors)
        added = 1.0 / new.variance.double() - 1.0 / old.variance.double()
        pull = new.mean.double() / new.variance.double() - old.mean.double() / old.variance.double()
        after = belief.add_precision(added.to(belief.mean))
        step = after.product((pull - added * belief.mean.double()).to(belief.mean))
        state = state._replace(belief=after.with_mean(belief.mean + step), prior=new)
        if change <= RTOL:
            break
    return state


def _new_terms(
    mean: Tensor, variance: Tensor, old: DiagonalGaussian, priors: Sequence[SitePrior]
) -> tuple[DiagonalGaussian, float]:
    """The terms after one damped step, and the largest relative change that remains."""
    means, variances, change, start = [], [], 0.0, 0
    for prior in priors:
        place = slice(start, start + prior.mean.numel())
        start = place.stop
        term = DiagonalGaussian(old.mean[place], old.variance[place])
        if prior.family != NORMAL:
            term, moved = _new_term(mean[place].double(), variance[place].double(), term, prior)
            change = max(change, moved)
        means.append(term.mean)
        variances.append(term.variance)
    return DiagonalGaussian(torch.cat(means), torch.cat(variances)), change


def _new_term(
    mean: Tensor, variance: Tensor, old: DiagonalGaussian, prior: SitePrior
) -> tuple[DiagonalGaussian, float]:
    """The terms of one tensor after a damped step, and the largest relative change that remains."""
    scale, centre = prior.scale.reshape(-1).double(), prior.mean.reshape(-1).double()
    lam, h = 1.0 / old.variance.double(), old.mean.double() / old.variance.double()
    tau, cavity_h = 1.0 / variance - lam, mean / variance - h
    informed = tau * scale.square() > MIN_INFORMATION
    tau = torch.where(informed, tau, torch.ones_like(tau))
    tilted_mean, tilted_var = _tilted_moments(prior, (cavity_h / tau - centre) / scale, tau * scale.square())
    tilted_mean, tilted_var = centre + scale * tilted_mean, scale.square() * tilted_var
    new_lam = torch.maximum(1.0 / tilted_var - tau, MIN_PRECISION / scale.square())
    new_h = tilted_mean * (tau + new_lam) - cavity_h
    new_lam, new_h = torch.where(informed, new_lam, lam), torch.where(informed, new_h, h)
    change = float(((new_lam - lam).abs() * variance).max())
    new_lam, new_h = torch.lerp(lam, new_lam, DAMPING), torch.lerp(h, new_h, DAMPING)
    return DiagonalGaussian((new_h / new_lam).to(old.mean), (1.0 / new_lam).to(old.variance)), change


def _tilted_moments(prior: SitePrior, cavity_mean: Tensor, cavity_prec: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance, (n,) each, of N(θ; c, 1/τ) times the prior, in units of its scale around its mean."""
    means, variances = [], []
    df = None if prior.df is None else prior.df.reshape(-1).double()
    if df is not None and bool((df == df[0]).all()):
        df = df[:1]  # one set of nodes for all numbers
    for start in range(0, len(cavity_mean), CHUNK):
        some = slice(start, start + CHUNK)
        local_sd, log_density = prior.local_scales(df if df is None or len(df) == 1 else df[some])  # (..., K)
        c, tau = cavity_mean[some].unsqueeze(-1), cavity_prec[some].unsqueeze(-1)
        local_var = local_sd.square()
        spread = 1.0 / tau + local_var
        weight = (log_density - 0.5 * spread.log() - 0.5 * c.square() / spread).softmax(-1)
        shrunk, narrow = c * local_var / spread, local_var / (1.0 + tau * local_var)  # given the local scale
        mean = (weight * shrunk).sum(-1)
        means.append(mean)
        variances.append((weight * (narrow + (shrunk - mean.unsqueeze(-1)).square())).sum(-1))
    return torch.cat(means), torch.cat(variances)
