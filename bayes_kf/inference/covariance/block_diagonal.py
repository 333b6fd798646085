"""Beliefs with a full covariance inside each tensor or module and none between: N(μ, diag(P₁, P₂, ...)).

S = I + Σ_b M_b P_b M_bᵀ is shared, so the mean is that of the whole model under this belief; each block keeps its own
block of the exact posterior covariance. Cost Σ n_b² k an update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.inference.covariance.diagonal import State as DiagonalState
from bayes_kf.inference.covariance.diagonal import innovation
from bayes_kf.inference.covariance.full import added_to_inverse, merged
from bayes_kf.inference.covariance.observation import Observation
from bayes_kf.inference.linearization.jacobian import Jacobian
from bayes_kf.models.adapter import AdapterModel

MAX_NUMBERS = 400_000_000  # in all blocks; 1.6 GB in float32


class State(NamedTuple):
    """A Gaussian: mean μ (n,), the blocks of its covariance row by row, (Σ n_b²,), and their sizes n_b, int64."""

    mean: Tensor
    covariance: Tensor
    sizes: Tensor


def sizes(adapter: AdapterModel, blocks: str) -> list[int]:
    """Numbers of each block: of every tensor, or of neighbouring tensors of one module or adapted layer."""
    if blocks == "tensors":
        return list(adapter.sizes)
    owners = [name.partition(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0] for name in adapter.names]
    together = groupby(zip(owners, adapter.sizes, strict=True), key=lambda item: item[0])
    return [sum(size for _, size in group) for _, group in together]


def init(mean: Tensor, variance: Tensor, sizes: list[int] | None = None) -> State:
    """The belief N(mean, diag(variance)); both (n,).

    Raises:
        ValueError: where the blocks would hold more than 400 million numbers.
    """
    sizes = [len(mean)] if sizes is None else sizes
    numbers = sum(size**2 for size in sizes)
    if numbers > MAX_NUMBERS:
        raise ValueError(
            f"`covariance` 'block_diagonal' takes at most {MAX_NUMBERS:,} numbers in all blocks, got {numbers:,} "
            f"(largest block: {max(sizes):,} parameters); `blocks` 'tensors' or `covariance` 'low_rank' take fewer."
        )
    covariance = torch.cat([torch.diag(part).flatten() for part in variance.split(sizes)])
    return State(mean, covariance, torch.tensor(sizes))


def predict(state: State, forgetting: float, drift_variance: float | Tensor) -> State:
    """μ⁻ = μ, P⁻ = P/λ + Q; Q = qI for a number q, diag(q) for (n,)."""
    after = state._replace(covariance=state.covariance / forgetting)
    for where, block in _blocks(after):
        block.diagonal().add_(drift_variance[where] if isinstance(drift_variance, Tensor) else drift_variance)
    return after


def condition(state: State, observation: Observation, curvature: Observation | None = None) -> State:
    """μ + PMᵀS⁻¹u, and of each block P_b − P_bM_bᵀS⁻¹M_bP_b.

    In Joseph form (I − KM_b)P_b(I − KM_b)ᵀ + KRKᵀ, K = P_bM_bᵀS⁻¹, R = S − M_bP_bM_bᵀ: to a block, the others are
    noise.
    """
    if curvature is not None:  # another M for the covariance
        return condition(state, curvature)._replace(mean=condition(state, observation).mean)
    rows = observation.dense()
    crosses = [(where, block @ rows[:, where].mT) for where, block in _blocks(state)]  # P_bM_bᵀ (n_b, k)
    gram = sum(rows[:, where].double() @ cross.double() for where, cross in crosses)
    factor, weights, _ = innovation(gram, observation.residual)  # type: ignore[arg-type]
    after = State(state.mean.clone(), torch.empty_like(state.covariance), state.sizes)
    for (where, cross), (_, old), (_, new) in zip(crosses, _blocks(state), _blocks(after), strict=True):
        own = rows[:, where]
        gain = torch.cholesky_solve(cross.mT.double(), factor).mT.to(cross)  # P_bM_bᵀS⁻¹ (n_b, k)
        others = factor @ factor.mT - own.double() @ cross.double()  # R
        left = old - gain @ cross.mT  # (I − KM_b)P_b
        joseph = left - (left @ own.mT) @ gain.mT + gain @ others.to(gain) @ gain.mT
        new.copy_(0.5 * (joseph + joseph.mT))
        after.mean[where] += cross @ weights
    return after


def accumulate(state: State, observation: Observation, curvature: Observation | None = None) -> State:
    """The mean of :func:`condition`, and P_b⁻¹ + M_bᵀM_b, so that what data add does not depend on the prior.

    For passes after which the prior's width or σ² is chosen.
    """
    rows, after = (curvature or observation).dense(), condition(state, observation)
    for (where, old), (_, new) in zip(_blocks(state), _blocks(after), strict=True):
        own = rows[:, where]
        cross = old @ own.mT
        factor = innovation(own.double() @ cross.double(), own.new_zeros(len(own)))[0]
        gain = torch.cholesky_solve(cross.mT.double(), factor).mT.to(cross)
        left = old - gain @ cross.mT
        joseph = left - (left @ own.mT) @ gain.mT + gain @ gain.mT
        new.copy_(0.5 * (joseph + joseph.mT))
    return after


def add_precision(state: State, added: Tensor) -> State:
    """The belief with precision Λ + diag(added), its mean as it was; added (n,) may be negative."""
    after = state._replace(covariance=torch.empty_like(state.covariance))
    for (where, old), (_, new) in zip(_blocks(state), _blocks(after), strict=True):
        new.copy_(added_to_inverse(old, added[where]))
    return after


def merge(states: Sequence[State], prior: DiagonalState) -> State:
    """The product of K beliefs from one prior over that prior to the power K − 1, block by block."""
    after = states[0]._replace(mean=prior.mean.clone(), covariance=torch.empty_like(states[0].covariance))
    together = zip(*[_blocks(state) for state in states], strict=True)
    for blocks, (where, new) in zip(together, _blocks(after), strict=True):
        means = [state.mean[where] for state in states]
        mean, covariance = merged(means, [block for _, block in blocks], prior.mean[where], prior.variance[where])
        after.mean[where] = mean
        new.copy_(covariance)
    return after


def root(state: State) -> Callable[[Tensor], Tensor]:
    """The map z → Lz, LLᵀ = P, whose outputs have covariance P for z ~ N(0, I); takes (..., n)."""
    factors = [torch.linalg.cholesky(block) for _, block in _blocks(state)]
    sizes = state.sizes.tolist()

    def apply(noise: Tensor) -> Tensor:
        return torch.cat([z @ factor.mT for z, factor in zip(noise.split(sizes, -1), factors, strict=True)], -1)

    return apply


def product(state: State, vector: Tensor) -> Tensor:
    """P v, (n,)."""
    return torch.cat([block @ vector[where] for where, block in _blocks(state)])


def marginal_variance(state: State) -> Tensor:
    """diag(P), (n,)."""
    return torch.cat([block.diagonal() for _, block in _blocks(state)])


def covariance_matrix(state: State) -> Tensor:
    """P, (n, n)."""
    return torch.block_diag(*[block for _, block in _blocks(state)])


def output_covariance(state: State, jacobian: Jacobian) -> Tensor:
    """J P Jᵀ of every example, (B, c, c), in float64."""
    rows = jacobian.dense()
    parts = [(rows[..., where] @ block @ rows[..., where].mT).double() for where, block in _blocks(state)]
    return torch.stack(parts).sum(0)


def joint_output_covariance(state: State, jacobian: Jacobian) -> Tensor:
    """J P Jᵀ over the whole batch, (B·c, B·c), in float64."""
    rows = jacobian.dense().flatten(0, 1)
    return torch.stack([(rows[:, where] @ block @ rows[:, where].mT).double() for where, block in _blocks(state)]).sum(
        0
    )


def quadratic(state: State, vector: Tensor) -> Tensor:
    """vᵀ P⁻¹ v, a scalar."""
    parts = [vector[where] @ torch.linalg.solve(block, vector[where]) for where, block in _blocks(state)]
    return torch.stack(parts).sum()


def log_determinant(state: State) -> Tensor:
    """log det P, a scalar in float64."""
    return torch.stack([torch.linalg.slogdet(block.double()).logabsdet for _, block in _blocks(state)]).sum()


def scales(state: State) -> Tensor:
    """Numbers that are positive and finite in a proper belief, (n,)."""
    return marginal_variance(state)


def _blocks(state: State) -> Iterator[tuple[slice, Tensor]]:
    """Where each block lies in θ, and its covariance, (n_b, n_b), a view."""
    start = place = 0
    for size in state.sizes.tolist():
        yield slice(start, start + size), state.covariance[place : place + size**2].view(size, size)
        start, place = start + size, place + size**2
