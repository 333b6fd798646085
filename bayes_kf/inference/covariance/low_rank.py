"""Beliefs whose precision is a diagonal plus a low-rank part: Λ = diag(d) + W Wᵀ, W (n, L).

An update appends the k columns Mᵀ to W, which is exact; then the L leading directions, in units of the diagonal, are
kept, and d grows so that each parameter's marginal variance stays (ours). Cost n (L + k)² per update. The scheme is
that of the low-rank filter of Chang et al. (2023, arXiv:2305.19535), truncated here relative to the diagonal. Theirs
adds the diagonal of what is cut to d, which is over-confident with more parameters than data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.inference.covariance.diagonal import State as DiagonalState
from bayes_kf.inference.covariance.observation import Observation
from bayes_kf.inference.linearization import parameter_sums
from bayes_kf.inference.linearization.jacobian import Jacobian

COLUMNS = 16  # of the cut-off part, made at once
Cut = Callable[[Tensor, Tensor, Tensor, int, Callable[[Tensor], Tensor]], tuple[Tensor, Tensor]]


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
    inner = parameter_sums.sum_over_shards(
        factor.mT @ ((drift_variance * shrink).unsqueeze(-1) * factor)
    )  # E − E d⁻ E = q d⁻/(λd), without cancelling
    root = torch.linalg.cholesky(inner + torch.eye(len(inner), dtype=inner.dtype, device=inner.device))
    turned = torch.linalg.solve_triangular(root, (shrink.unsqueeze(-1) * factor).mT, upper=False).mT
    return _state(state.mean, (d * shrink).to(state.diagonal), turned.to(state.factor))


def condition(state: State, observation: Observation, curvature: Observation | None = None) -> State:
    """Λ + MᵀM and μ + Λ_new⁻¹Mᵀu, exact; then W cut back to L columns, marginal variances kept by the diagonal.

    With A = [Wᵀ; M], Λ_new = D + AᵀA and the step is D⁻¹Aᵀ(I + AD⁻¹Aᵀ)⁻¹[0; u]: one small system, in float64. The
    difference D⁻¹Mᵀu − D⁻¹A(…)Mᵀu, which is the same, cancels in float32 where MD⁻¹Mᵀ is much larger than one.
    """
    return _conditioned(state, observation, curvature, _cut)


def accumulate(state: State, observation: Observation, curvature: Observation | None = None) -> State:
    """As :func:`condition`, but the diagonal keeps that of Λ + MᵀM, so that what data add does not depend on the prior.

    For passes after which the prior's width or σ² is chosen. With more parameters than data it is over-confident.
    """
    return _conditioned(state, observation, curvature, _cut_precision)


def _conditioned(state: State, observation: Observation, curvature: Observation | None, cut: Cut) -> State:
    if curvature is not None:  # another M for the precision
        mean = state.mean + _step(state, observation, _joined_gram(state, observation))
        return _conditioned(state, curvature, None, cut)._replace(mean=mean)
    rank = state.factor.shape[1]
    gram = _joined_gram(state, observation)
    step = _step(state, observation, gram)
    values, vectors = torch.linalg.eigh(gram)  # ascending
    factor, diagonal = cut(
        state.diagonal,
        values.clamp_min(0.0),  # negative only by rounding
        vectors.to(step),
        rank,
        lambda some: state.factor @ some[:rank] + observation.rmatmul(some[rank:]),
    )
    return _state(state.mean + step, diagonal, factor)


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
    values, vectors = torch.linalg.eigh(whole.gram)  # ascending
    values = values.clamp_min(0.0)  # negative only by rounding
    factor, diagonal = _cut(diagonal, values, vectors.to(mean), rank, lambda some: whole.factor @ some)
    return _state(mean, diagonal, factor)


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
    half = torch.linalg.solve_triangular(_inner(state.gram), _scaled(state).mT, upper=False)
    exact = (1.0 / state.diagonal.double() - half.square().sum(0)).to(state.mean)
    return torch.maximum(exact, 1.0 / (state.diagonal + state.factor.square().sum(1)))  # a bound, where rounding rules


def covariance_matrix(state: State) -> Tensor:
    """P, (n, n)."""
    eye = torch.eye(len(state.mean), dtype=state.mean.dtype, device=state.mean.device)
    return _solve(state, eye)


def output_covariance(state: State, jacobian: Jacobian) -> Tensor:
    """J P Jᵀ of every example, (B, c, c), in float64."""
    cross = jacobian.matmul(_scaled(state))  # JD⁻¹W (B, c, L)
    half = torch.linalg.solve_triangular(_inner(state.gram), cross.mT, upper=False)
    return jacobian.block_gram(1.0 / state.diagonal.double()) - half.mT @ half


def joint_output_covariance(state: State, jacobian: Jacobian) -> Tensor:
    """J P Jᵀ over the whole batch, (B·c, B·c), in float64."""
    cross = jacobian.matmul(_scaled(state)).flatten(0, 1)
    half = torch.linalg.solve_triangular(_inner(state.gram), cross.mT, upper=False)
    return jacobian.gram(1.0 / state.diagonal.double()) - half.mT @ half


def quadratic(state: State, vector: Tensor) -> Tensor:
    """vᵀ P⁻¹ v, a scalar."""
    own = parameter_sums.sum_over_shards((state.diagonal * vector.square()).sum())
    return own + parameter_sums.sum_over_shards(vector @ state.factor).square().sum()


def log_determinant(state: State) -> Tensor:
    """log det P, a scalar in float64."""
    root = _inner(state.gram)
    return -(
        parameter_sums.sum_over_shards(state.diagonal.double().log().sum()) + 2.0 * root.diagonal().double().log().sum()
    )


def scales(state: State) -> Tensor:
    """Numbers that are positive and finite in a proper belief, (n,)."""
    return state.diagonal


def _joined_gram(state: State, observation: Observation) -> Tensor:
    """A D⁻¹ Aᵀ for A = [Wᵀ; M], (L + k, L + k)."""
    cross = observation.matmul(_scaled(state))  # MD⁻¹W (k, L)
    return torch.cat([
        torch.cat([state.gram, cross.mT], 1),
        torch.cat([cross, observation.gram(1.0 / state.diagonal.double())], 1),
    ])  # fmt: skip


def _step(state: State, observation: Observation, gram: Tensor) -> Tensor:
    """D⁻¹Aᵀ(I + G)⁻¹[0; u], (n,), refined once.

    Where M lies among the directions of W, the two parts of Aᵀw cancel, and what is left is rounding of the larger one.
    AΔ = t − w shows how much of it lies where the belief is precise, and a second solution takes that away.
    """
    target = torch.cat([gram.new_zeros(state.factor.shape[1]), observation.residual.double()])
    root = _inner(gram)
    dual = torch.cholesky_solve(target.unsqueeze(-1), root).squeeze(-1)  # w
    step = _pulled(state, observation, dual)
    seen = torch.cat([parameter_sums.sum_over_shards(state.factor.mT @ step), observation.matvec(step)]).double()
    missing = torch.cholesky_solve((target - dual - seen).unsqueeze(-1), root).squeeze(-1)
    return step + _pulled(state, observation, missing)


def _pulled(state: State, observation: Observation, dual: Tensor) -> Tensor:
    """D⁻¹Aᵀw, (n,)."""
    rank, weights = state.factor.shape[1], dual.to(state.mean)
    return (state.factor @ weights[:rank] + observation.rmatvec(weights[rank:])) / state.diagonal


def _cut(
    diagonal: Tensor, values: Tensor, vectors: Tensor, rank: int, columns: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The L leading columns of F V, and a diagonal that keeps the marginal variances that the rest gave.

    The columns of F V are orthogonal under D⁻¹. With e their squared lengths there, the kept ones leave parameter i
    the variance v = 1/d − Σ (F V)² / (d²(1 + e)), the others lower it to v − q; d grows by 1/(v − q) − 1/v, as in the
    diagonal gain form.

    Args:
        diagonal: d, (n,).
        values: e, (K,), ascending.
        vectors: V, (K, K).
        rank: L.
        columns: from V's columns (K, c) to F V's, (n, c).
    """
    rounding = len(values) * torch.finfo(diagonal.dtype).eps ** 2 * values[-1]  # squared length of a sum that cancels
    vectors = vectors * (values > rounding).to(vectors)
    factor, shrink = columns(vectors[:, -rank:]), (1.0 / (1.0 + values)).to(diagonal)
    scaled = (factor / diagonal.unsqueeze(-1)).square()
    least = diagonal + factor.square().sum(1)  # a bound of 1/v, where rounding rules
    variance = torch.maximum(1.0 / diagonal - scaled @ shrink[-rank:], 1.0 / least)
    lost, added = torch.zeros_like(diagonal), torch.zeros_like(diagonal)
    for some, weights in zip(vectors[:, :-rank].split(COLUMNS, 1), shrink[:-rank].split(COLUMNS), strict=True):
        squares = columns(some).square()
        lost += squares @ weights
        added += squares.sum(1)
    left = torch.maximum(variance - lost / diagonal.square(), 1.0 / (least + added))
    return factor, diagonal + (1.0 / left - 1.0 / variance).clamp_min(0.0)


def _cut_precision(
    diagonal: Tensor, values: Tensor, vectors: Tensor, rank: int, columns: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """As :func:`_cut`, but with the diagonal of what is cut added to d."""
    added = diagonal.clone()
    for some in vectors[:, :-rank].split(COLUMNS, 1):
        added += columns(some).square().sum(1)
    return columns(vectors[:, -rank:]), added


def _scaled(state: State) -> Tensor:
    """D⁻¹W in float64, (n, L)."""
    return state.factor.double() / state.diagonal.double().unsqueeze(-1)


def _state(mean: Tensor, diagonal: Tensor, factor: Tensor) -> State:
    """The state with WᵀD⁻¹W computed, which every use of the belief needs."""
    scaled = factor.double() / diagonal.double().sqrt().unsqueeze(-1)
    return State(mean, diagonal, factor, parameter_sums.sum_over_shards(scaled.mT @ scaled))


def _inner(gram: Tensor) -> Tensor:
    """Cholesky factor of I + WᵀD⁻¹W, (L, L)."""
    return torch.linalg.cholesky(gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device))


def _solve(state: State, right: Tensor) -> Tensor:
    """(D + WWᵀ)⁻¹ B by Woodbury, (n, c); in float64, as the difference cancels for B among the columns of W."""
    scaled, factor = right.double() / state.diagonal.double().unsqueeze(-1), _scaled(state)
    weights = torch.cholesky_solve(parameter_sums.sum_over_shards(factor.mT @ right.double()), _inner(state.gram))
    return (scaled - factor @ weights).to(right)
