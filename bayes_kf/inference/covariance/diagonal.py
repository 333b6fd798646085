"""Beliefs with a diagonal covariance: N(μ, diag(p)), in three forms that differ in how they stay diagonal.

- gain form: the marginal *variances* of the exact posterior (LoKO's equation 11);
- information form: the marginal *precisions* of the exact posterior (natural gradient, mean-field optimum);
- mixed form: the gain form's mean with the information form's variances.

All three are the exact posterior projected; with one parameter they coincide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.inference.covariance.observation import Observation
from bayes_kf.inference.linearization import parameter_sums
from bayes_kf.inference.linearization.jacobian import Jacobian
from bayes_kf.inference.linearization.jacobian_blocks import CHUNK_NUMEL

CANCELLING = 0.999  # share of a variance whose loss is not yet rounded away


class State(NamedTuple):
    """A diagonal Gaussian: mean μ (n,), variance p (n,)."""

    mean: Tensor
    variance: Tensor


def init(mean: Tensor, variance: Tensor) -> State:
    """The belief N(mean, diag(variance)); both (n,)."""
    return State(mean, variance)


def predict(state: State, forgetting: float, drift_variance: float | Tensor) -> State:
    """μ⁻ = μ, p⁻ = p/λ + q; q a number or (n,)."""
    return State(state.mean, state.variance / forgetting + drift_variance)


def gain_condition(state: State, observation: Observation, curvature: Observation | None = None) -> State:
    """μ + p∘MᵀS⁻¹u and p − p²∘diag(MᵀS⁻¹M), S = I + M diag(p) Mᵀ.

    Where the difference cancels to rounding, its exact lower bound 1/(p⁻¹ + diag(MᵀM)) takes its place. With fewer
    parameters than rows the same is solved among the parameters.

    Args:
        state: the belief.
        observation: M and u.
        curvature: another M for the variance.
    """
    solved = _solve(state, observation)
    other = solved if curvature is None else _solve(state, curvature)
    return State(_gain_mean(state, observation, solved), _gain_variance(state, curvature or observation, other))


def information_condition(state: State, observation: Observation, curvature: Observation | None = None) -> State:
    """p⁻¹ + diag(MᵀM) and μ + p_new∘Mᵀu; arguments as for :func:`gain_condition`."""
    variance = _information_variance(state, curvature or observation)
    return State(observation.rmatvec(observation.residual).mul_(variance).add_(state.mean), variance)


def mixed_condition(state: State, observation: Observation, curvature: Observation | None = None) -> State:
    """The mean of the gain form, the variance of the information form; arguments as for :func:`gain_condition`."""
    mean = _gain_mean(state, observation, _solve(state, observation))
    return State(mean, _information_variance(state, curvature or observation))


def add_precision(state: State, added: Tensor) -> State:
    """The belief with precision Λ + diag(added), its mean as it was; added (n,) may be negative."""
    return State(state.mean, state.variance / (1.0 + added * state.variance))


def merge(states: Sequence[State], prior: State) -> State:
    """The product of K beliefs from one prior over that prior to the power K − 1: its precisions and P⁻¹μ add up."""
    prior_prec = 1.0 / prior.variance.double()
    prec = prior_prec + torch.stack([1.0 / s.variance.double() - prior_prec for s in states]).sum(0)
    own = torch.stack([(s.mean - prior.mean).double() / s.variance.double() for s in states]).sum(0)
    return State(prior.mean + (own / prec).to(prior.mean), (1.0 / prec).to(prior.variance))


def root(state: State) -> Callable[[Tensor], Tensor]:
    """The map z → √p∘z, whose outputs have covariance P for z ~ N(0, I); takes (..., n)."""
    scale = state.variance.sqrt()
    return lambda noise: scale * noise


def product(state: State, vector: Tensor) -> Tensor:
    """P v, (n,)."""
    return state.variance * vector


def marginal_variance(state: State) -> Tensor:
    """p, (n,)."""
    return state.variance


def covariance_matrix(state: State) -> Tensor:
    """diag(p), (n, n)."""
    return torch.diag(state.variance)


def output_covariance(state: State, jacobian: Jacobian) -> Tensor:
    """J P Jᵀ of every example, (B, c, c), in float64."""
    return jacobian.block_gram(state.variance)


def joint_output_covariance(state: State, jacobian: Jacobian) -> Tensor:
    """J P Jᵀ over the whole batch, (B·c, B·c), in float64."""
    return jacobian.gram(state.variance)


def quadratic(state: State, vector: Tensor) -> Tensor:
    """vᵀ P⁻¹ v, a scalar."""
    parts = zip(vector.split(CHUNK_NUMEL), state.variance.split(CHUNK_NUMEL), strict=True)
    return parameter_sums.sum_over_shards(torch.stack([(v.square() / p).sum() for v, p in parts]).sum())


def log_determinant(state: State) -> Tensor:
    """log det P, a scalar in float64: in float32 the sum over millions of numbers misses by several nats."""
    return parameter_sums.sum_over_shards(
        torch.stack([p.double().log().sum() for p in state.variance.split(CHUNK_NUMEL)]).sum()
    )


def scales(state: State) -> Tensor:
    """Numbers that are positive and finite in a proper belief, (n,)."""
    return state.variance


def _solve(state: State, observation: Observation) -> tuple[Tensor, Tensor]:
    """Cholesky factor of S and S⁻¹u, or, with fewer parameters than rows, of A = I + √P MᵀM √P and A⁻¹√P Mᵀu."""
    if observation.num_parameters >= observation.num_rows or parameter_sums.is_sharded():
        return innovation(observation.gram(state.variance), observation.residual)[:2]
    root = state.variance.sqrt()
    scaled = (observation.dense() * root).double()  # (k, n)
    return innovation(scaled.mT @ scaled, root * observation.rmatvec(observation.residual))[:2]


def _gain_mean(state: State, observation: Observation, solved: tuple[Tensor, Tensor]) -> Tensor:
    """μ + p∘MᵀS⁻¹u."""
    weights = solved[1]
    if len(weights) < observation.num_rows:
        return state.mean + state.variance.sqrt() * weights
    return observation.rmatvec(weights).mul_(state.variance).add_(state.mean)


def _gain_variance(state: State, observation: Observation, solved: tuple[Tensor, Tensor]) -> Tensor:
    """p − p²∘diag(MᵀS⁻¹M)."""
    factor = solved[0]
    if len(factor) < observation.num_rows:
        return state.variance * torch.cholesky_inverse(factor).diagonal().to(state.variance)
    shrink = observation.column_squares(_inverse(factor, state.mean.dtype)).mul_(state.variance)
    most = float(shrink.max())
    variance = shrink.neg_().add_(1.0).mul_(state.variance)
    return variance if most < CANCELLING else torch.maximum(variance, _information_variance(state, observation))


def _information_variance(state: State, observation: Observation) -> Tensor:
    """1 / (p⁻¹ + diag(MᵀM))."""
    return observation.column_squares().mul_(state.variance).add_(1.0).reciprocal_().mul_(state.variance)


def innovation(gram: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cholesky factor of S = I + G in float64 (k, k), S⁻¹u in u's dtype (k,), and uᵀS⁻¹u."""
    innovation_cov = gram.double() + torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    factor = torch.linalg.cholesky(innovation_cov)
    u = residual.double()
    weights = torch.cholesky_solve(u.unsqueeze(-1), factor).squeeze(-1)
    return factor, weights.to(residual.dtype), (u @ weights).to(residual.dtype)


def _inverse(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """L⁻¹ for a lower-triangular L."""
    eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, eye, upper=False).to(dtype)
