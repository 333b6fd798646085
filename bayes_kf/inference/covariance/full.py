"""Beliefs with a full covariance: N(μ, P), exact on linear-Gaussian models and the oracle for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.inference.covariance.diagonal import State as DiagonalState
from bayes_kf.inference.covariance.diagonal import innovation
from bayes_kf.inference.covariance.observation import Observation
from bayes_kf.inference.linearization.jacobian import Jacobian

MAX_PARAMETERS = 20_000  # P takes 1.6 GB in float32 there


class State(NamedTuple):
    """A Gaussian: mean μ (n,), covariance P (n, n)."""

    mean: Tensor
    covariance: Tensor


def init(mean: Tensor, variance: Tensor) -> State:
    """The belief N(mean, diag(variance)); both (n,).

    Raises:
        ValueError: above 20,000 parameters.
    """
    if len(mean) > MAX_PARAMETERS:
        raise ValueError(f"`covariance` 'full' takes at most {MAX_PARAMETERS:,} parameters, got {len(mean):,}.")
    return State(mean, torch.diag(variance))


def predict(state: State, forgetting: float, drift_variance: float | Tensor) -> State:
    """μ⁻ = μ, P⁻ = P/λ + Q; Q = qI for a number q, diag(q) for (n,)."""
    covariance = state.covariance / forgetting
    covariance.diagonal().add_(drift_variance)
    return State(state.mean, covariance)


def condition(state: State, observation: Observation, curvature: Observation | None = None) -> State:
    """μ + PMᵀS⁻¹u and P in Joseph form (I − KM)P(I − KM)ᵀ + KKᵀ, K = PMᵀS⁻¹.

    With fewer parameters than rows the same is solved among the parameters: L (I + LᵀMᵀML)⁻¹ Lᵀ, LLᵀ = P.
    """
    if curvature is not None:  # another M for the covariance
        return State(condition(state, observation).mean, condition(state, curvature).covariance)
    rows = observation.dense()
    if observation.num_parameters < observation.num_rows:
        return _few(state, rows, observation.residual)
    cross = state.covariance @ rows.mT  # PMᵀ (n, k)
    factor, weights, _ = innovation(rows.double() @ cross.double(), observation.residual)
    gain = torch.cholesky_solve(cross.mT.double(), factor).mT.to(cross.dtype)
    left = state.covariance - gain @ cross.mT  # (I − KM)P
    covariance = left - (left @ rows.mT) @ gain.mT + gain @ gain.mT
    return State(state.mean + cross @ weights, 0.5 * (covariance + covariance.mT))


def add_precision(state: State, added: Tensor) -> State:
    """The belief with precision Λ + diag(added), its mean as it was; added (n,) may be negative."""
    return State(state.mean, added_to_inverse(state.covariance, added))


def added_to_inverse(covariance: Tensor, added: Tensor) -> Tensor:
    """(P⁻¹ + diag(added))⁻¹ as (I + P diag(added))⁻¹P, (n, n)."""
    mixed = covariance.double() * added.double()
    mixed.diagonal().add_(1.0)
    found = torch.linalg.solve(mixed, covariance.double()).to(covariance)
    return 0.5 * (found + found.mT)


def merge(states: Sequence[State], prior: DiagonalState) -> State:
    """The product of K beliefs from one prior over that prior to the power K − 1: its precisions and P⁻¹μ add up."""
    mean, covariance = merged([s.mean for s in states], [s.covariance for s in states], prior.mean, prior.variance)
    return State(mean, covariance)


def merged(
    means: Sequence[Tensor], covariances: Sequence[Tensor], prior_mean: Tensor, prior_variance: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean (n,) and covariance (n, n) of that product, by inverses in float64."""
    prec = torch.diag((1.0 - len(means)) / prior_variance.double())
    own = torch.zeros_like(prior_mean, dtype=torch.float64)
    for mean, covariance in zip(means, covariances, strict=True):
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance.double()))
        prec += inverse
        own += inverse @ (mean - prior_mean).double()
    root = torch.linalg.cholesky(prec)
    step = torch.cholesky_solve(own.unsqueeze(-1), root).squeeze(-1)
    return prior_mean + step.to(prior_mean), torch.cholesky_inverse(root).to(covariances[0])


def root(state: State) -> Callable[[Tensor], Tensor]:
    """The map z → Lz, LLᵀ = P, whose outputs have covariance P for z ~ N(0, I); takes (..., n)."""
    factor = torch.linalg.cholesky(state.covariance)
    return lambda noise: noise @ factor.mT


def product(state: State, vector: Tensor) -> Tensor:
    """P v, (n,)."""
    return state.covariance @ vector


def marginal_variance(state: State) -> Tensor:
    """diag(P), (n,)."""
    return state.covariance.diagonal()


def covariance_matrix(state: State) -> Tensor:
    """P, (n, n)."""
    return state.covariance


def output_covariance(state: State, jacobian: Jacobian) -> Tensor:
    """J P Jᵀ of every example, (B, c, c), in float64."""
    rows = jacobian.dense()
    return (rows @ state.covariance @ rows.mT).double()


def joint_output_covariance(state: State, jacobian: Jacobian) -> Tensor:
    """J P Jᵀ over the whole batch, (B·c, B·c), in float64."""
    rows = jacobian.dense().flatten(0, 1)
    return (rows @ state.covariance @ rows.mT).double()


def quadratic(state: State, vector: Tensor) -> Tensor:
    """vᵀ P⁻¹ v, a scalar."""
    return vector @ torch.linalg.solve(state.covariance, vector)


def log_determinant(state: State) -> Tensor:
    """log det P, a scalar in float64."""
    return torch.linalg.slogdet(state.covariance.double()).logabsdet


def scales(state: State) -> Tensor:
    """Numbers that are positive and finite in a proper belief, (n,)."""
    return state.covariance.diagonal()


def _few(state: State, rows: Tensor, residual: Tensor) -> State:
    root = torch.linalg.cholesky(state.covariance.double())
    scaled = rows.double() @ root  # ML (k, n)
    factor, weights, _ = innovation(scaled.mT @ scaled, scaled.mT @ residual.double())
    half = torch.linalg.solve_triangular(factor, root.mT, upper=False)  # C⁻¹Lᵀ, CCᵀ = I + LᵀMᵀML
    return State(state.mean + (root @ weights).to(state.mean), (half.mT @ half).to(state.covariance))
