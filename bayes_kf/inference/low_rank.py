"""Beliefs whose precision is a diagonal plus a low-rank part: Λ = diag(d) + W Wᵀ, W (n, L).

An update appends the L + k columns [W, Mᵀ], which is exact; then the L leading directions, in units of the diagonal,
are kept, and the diagonal of the rest is folded into d. Cost n (L + k)² per update. The scheme is that of the low-rank
filter of Chang et al. (2023, arXiv:2305.19535), truncated here relative to the diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.inference import sharding
from bayes_kf.inference.diagonal import State as DiagonalState
from bayes_kf.inference.jacobian import Jacobian
from bayes_kf.inference.observation import Observation

COLUMNS = 16  # of the cut-off part, made at once


class State(NamedTuple):
    """A Gaussian: mean μ (n,), diagonal precision d (n,), low-rank factor W (n, L) of the precision, WᵀD⁻¹W (L, L)."""

    mean: Tensor
    diagonal: Tensor
    factor: Tensor
    gram: Tensor  # float64


def init(mean: Tensor, variance: Tensor, rank: int = 10) -> State:
    """The belief N(mean, diag(variance)); both (n,)."""
    return State(mean, 1.0 / variance, mean.new_zeros(len(mean), rank), mean.new_zeros(rank, rank, dtype=torch.float64))


def predict(state: State, forgetting: float, drift_variance: float | Tensor) -> State:
    """P⁻ = P/λ + Q, Q diagonal, which keeps the form: d⁻ = λd/(1 + qλd), W⁻ = (d⁻/λd)∘√λW R.

    RRᵀ = (I + λWᵀ(E − E d⁻ E)W)⁻¹ with E = 1/(λd), by Woodbury's identity; q is a number or (n,).
    """
    if not isinstance(drift_variance, Tensor) and drift_variance == 0.0:
        return State(state.mean, state.diagonal * forgetting, state.factor * forgetting**0.5, state.gram)  # λ cancels
    d, factor = state.diagonal.double() * forgetting, state.factor.double() * forgetting**0.5
    shrink = 1.0 / (1.0 + drift_variance * d)  # d⁻/(λd)
    inner = sharding.total(
        factor.mT @ ((drift_variance * shrink).unsqueeze(-1) * factor)
    )  # E − E d⁻ E = q d⁻/(λd), without cancelling
    root = torch.linalg.cholesky(inner + torch.eye(len(inner), dtype=inner.dtype, device=inner.device))
    turned = torch.linalg.solve_triangular(root, (shrink.unsqueeze(-1) * factor).mT, upper=False).mT
    return _state(state.mean, (d * shrink).to(state.diagonal), turned.to(state.factor))


def condition(state: State, observation: Observation, curvature: Observation | None = None) -> State:
    """Λ + MᵀM and μ + Λ_new⁻¹Mᵀu, exact; then W cut back to L columns and the rest's diagonal folded into d."""
    if curvature is not None:  # another M for the precision
        return condition(state, curvature)._replace(mean=condition(state, observation).mean)
    rank, scaled = state.factor.shape[1], state.factor.double() / state.diagonal.double().unsqueeze(-1)  # D⁻¹W
    cross = observation.matmul(scaled)  # MD⁻¹W (k, L)
    gram = torch.cat([  # of [W Mᵀ] under D⁻¹
        torch.cat([state.gram, cross.mT], 1),
        torch.cat([cross, observation.gram(1.0 / state.diagonal)], 1),
    ])  # fmt: skip
    step = observation.rmatvec(observation.residual) / state.diagonal
    found = torch.cat([sharding.total(state.factor.mT @ step), observation.matvec(step)]).double()
    weights = torch.linalg.solve(gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device), found).to(step)
    joined = state.factor @ weights[:rank] + observation.rmatvec(weights[rank:])
    _, vectors = torch.linalg.eigh(gram)  # ascending
    rest, kept = vectors[:, :-rank].to(step), vectors[:, -rank:].to(step)
    factor = state.factor @ kept[:rank] + observation.rmatmul(kept[rank:])
    diagonal = state.diagonal.clone()
    for some in rest.split(COLUMNS, 1):
        diagonal += (state.factor @ some[:rank] + observation.rmatmul(some[rank:])).square().sum(1)
    return _state(state.mean + step - joined / state.diagonal, diagonal, factor)


def add_precision(state: State, added: Tensor) -> State:
    """The belief with precision Λ + diag(added), its mean as it was; added (n,) may be negative."""
    return _state(state.mean, state.diagonal + added, state.factor)


def merge(states: Sequence[State], prior: DiagonalState) -> State:
    """The product of K beliefs from one prior over that prior to the power K − 1.

    Diagonals, factors side by side, and P⁻¹μ add up exactly; then W is cut back to L columns as after an update.
    """
    rank, prior_prec = states[0].factor.shape[1], 1.0 / prior.variance
    diagonal = prior_prec + torch.stack([s.diagonal - prior_prec for s in states]).sum(0)
    whole = _state(prior.mean, diagonal, torch.cat([s.factor for s in states], 1))
    steps = [s.mean - prior.mean for s in states]
    own = [s.diagonal * step + s.factor @ (s.factor.mT @ step) for s, step in zip(states, steps, strict=True)]
    mean = prior.mean + product(whole, torch.stack(own).sum(0))
    _, vectors = torch.linalg.eigh(whole.gram)  # ascending
    rest, kept = vectors[:, :-rank].to(mean), vectors[:, -rank:].to(mean)
    for some in rest.split(COLUMNS, 1):
        diagonal = diagonal + (whole.factor @ some).square().sum(1)
    return _state(mean, diagonal, whole.factor @ kept)


def root(state: State) -> Callable[[Tensor], Tensor]:
    """The map z → D^(−1/2) (I + FFᵀ)^(−1/2) z, F = D^(−1/2) W: covariance P for z ~ N(0, I); takes (..., n)."""
    scale = state.diagonal.rsqrt()
    scaled = state.factor * scale.unsqueeze(-1)
    values, vectors = torch.linalg.eigh(state.gram)
    values = values.clamp_min(0.0)  # negative only by rounding
    weights = 1.0 / ((1.0 + values) + (1.0 + values).sqrt())  # (1 − (1 + v)^(−1/2)) / v
    inner = ((vectors * weights) @ vectors.mT).to(scaled.dtype)
    return lambda noise: scale * (noise - ((noise @ scaled) @ inner) @ scaled.mT)


def product(state: State, vector: Tensor) -> Tensor:
    """P v, (n,)."""
    return _solve(state, vector.unsqueeze(-1)).squeeze(-1)


def marginal_variance(state: State) -> Tensor:
    """diag(P), (n,)."""
    scaled = state.factor / state.diagonal.unsqueeze(-1)
    inner = _inner(state.gram)
    half = torch.linalg.solve_triangular(inner, scaled.mT.double(), upper=False)
    exact = 1.0 / state.diagonal - half.square().sum(0).to(state.mean.dtype)
    return torch.maximum(exact, 1.0 / (state.diagonal + state.factor.square().sum(1)))  # a bound, where rounding rules


def covariance_matrix(state: State) -> Tensor:
    """P, (n, n)."""
    eye = torch.eye(len(state.mean), dtype=state.mean.dtype, device=state.mean.device)
    return _solve(state, eye)


def output_covariance(state: State, jacobian: Jacobian) -> Tensor:
    """J P Jᵀ of every example, (B, c, c), in float64."""
    cross = jacobian.matmul(state.factor.double() / state.diagonal.double().unsqueeze(-1))  # JD⁻¹W (B, c, L)
    half = torch.linalg.solve_triangular(_inner(state.gram), cross.mT, upper=False)
    return jacobian.block_gram(1.0 / state.diagonal) - half.mT @ half


def joint_output_covariance(state: State, jacobian: Jacobian) -> Tensor:
    """J P Jᵀ over the whole batch, (B·c, B·c), in float64."""
    cross = jacobian.matmul(state.factor.double() / state.diagonal.double().unsqueeze(-1)).flatten(0, 1)
    half = torch.linalg.solve_triangular(_inner(state.gram), cross.mT, upper=False)
    return jacobian.gram(1.0 / state.diagonal) - half.mT @ half


def quadratic(state: State, vector: Tensor) -> Tensor:
    """vᵀ P⁻¹ v, a scalar."""
    own = sharding.total((state.diagonal * vector.square()).sum())
    return own + sharding.total(vector @ state.factor).square().sum()


def log_determinant(state: State) -> Tensor:
    """Log det P, a scalar in float64."""
    root = _inner(state.gram)
    return -(sharding.total(state.diagonal.double().log().sum()) + 2.0 * root.diagonal().double().log().sum())


def scales(state: State) -> Tensor:
    """Numbers that are positive and finite in a proper belief, (n,)."""
    return state.diagonal


def _state(mean: Tensor, diagonal: Tensor, factor: Tensor) -> State:
    """With WᵀD⁻¹W, which every use of the belief needs."""
    scaled = (factor / diagonal.sqrt().unsqueeze(-1)).double()
    return State(mean, diagonal, factor, sharding.total(scaled.mT @ scaled))


def _inner(gram: Tensor) -> Tensor:
    """Cholesky factor of I + WᵀD⁻¹W, (L, L)."""
    return torch.linalg.cholesky(gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device))


def _solve(state: State, right: Tensor) -> Tensor:
    """(D + WWᵀ)⁻¹ B by Woodbury, (n, c)."""
    scaled = right / state.diagonal.unsqueeze(-1)
    weights = torch.cholesky_solve(sharding.total(state.factor.mT @ scaled).double(), _inner(state.gram)).to(
        right.dtype
    )
    return scaled - (state.factor @ weights) / state.diagonal.unsqueeze(-1)
