"""σ² of a Gaussian likelihood estimated again at the mean that is kept, and the covariance that goes with it.

The filter's running estimate (``noise.update_variance``) is of predictions made on the way. Once a mean has been
fitted, by more passes or elsewhere, its residuals on the N examples say

    σ² = SSE / (N − γ),    γ = Σ_i (1 − P_ii / p₀_i) = tr(J P Jᵀ) / σ²,

γ the number of parameters that the data determine (MacKay 1992). P was learned under another σ²: its data precision is
proportional to 1/σ², so that P'⁻¹ = P₀⁻¹ + ρ (P⁻¹ − P₀⁻¹), ρ = σ²_old/σ²_new, which is exact for full, low-rank and
diagonal precisions with one σ². With several outputs of different ρ their mean, weighted by γ, takes its place. γ
depends on P, so both are found together. Held-out residuals say σ² without γ: e ~ N(0, T·JPJᵀ + σ²).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.fitting.loader import complete
from bayes_kf.inference.measurement_model import noise
from bayes_kf.models.batch import Inputs, batch_size, some_examples, to_device

MAX_ROUNDS = 30
CONVERGED = 1e-4  # relative change of σ²
LEAST_LEFT = 1e-3  # of N that N − γ is at least, for approximations of P that determine too much
LEVERAGE_EXAMPLES = 32  # that tell how γ is shared among several outputs
HELD_OUT_COUNT = 20.0  # weight, in observations, of the present σ² beside held-out data
HELD_OUT_GRID = 201  # candidates of σ² for held-out data, from a thousandth to a thousand times the present one


def applies(config: KalmanConfig) -> bool:
    """Whether σ² is estimated and the prior is in the belief as it was, undiminished by dynamics."""
    static = (config.forgetting, config.drift_variance, config.prior_pull) == (1.0, 0.0, 0.0)
    return config.noise_variance == "estimated" and static


def rescaled(config: KalmanConfig, state: FilterState, ratio: float) -> FilterState:
    """The state with the precision that the data gave its belief multiplied by ρ = ``ratio``, its mean as it was.

    P₀⁻¹ + ρ(P⁻¹ − P₀⁻¹) = ρ (P⁻¹ + (1/ρ − 1) P₀⁻¹): a diagonal is added, then P divided by ρ.
    """
    added = state.belief.add_precision((1.0 / ratio - 1.0) / state.prior.variance)
    return state._replace(belief=added.predict(ratio, 0.0))


def determined(config: KalmanConfig, state: FilterState) -> float:
    """γ, how many parameters the data determine."""
    left = state.belief.marginal_variance().double() / state.prior.variance.double()
    return float((1.0 - left).clamp_min(0.0).sum())


def refitted(
    config: KalmanConfig, state: FilterState, squares: Tensor, count: int, leverage: Tensor | None = None
) -> FilterState:
    """The state with σ² = SSE/(N − γ) and its belief under that σ²; its mean as it was.

    Args:
        config: the settings.
        state: whose belief was learned under ``state.noise.variance``.
        squares: SSE of each output at the state's mean, (m,), over the examples that the belief has learned.
        count: N.
        leverage: relative sizes of each output's share of γ, (m,); None: alike.
    """
    assert state.noise.variance is not None
    variance = state.noise.variance
    squares = squares.to(variance).clamp_min(count * torch.finfo(torch.float32).tiny ** 0.5)
    found = state
    for _ in range(MAX_ROUNDS):
        shares = _shares(found, leverage)
        gamma = (determined(config, found) * shares).clamp(max=(1.0 - LEAST_LEFT) * count)
        last, variance = variance, squares / (count - gamma)
        found = at(config, state, variance, leverage)
        if same(last, variance):
            break
    return found._replace(noise=noise.with_variance(state.noise, variance, count - gamma))


def at(config: KalmanConfig, state: FilterState, variance: Tensor, leverage: Tensor | None = None) -> FilterState:
    """The state as it would be had σ² been another one, (m,), but for its mean; ``leverage`` as above."""
    assert state.noise.variance is not None
    ratio = float((_shares(state, leverage) * state.noise.variance / variance).sum())
    return rescaled(config, state, ratio)._replace(
        noise=noise.with_variance(state.noise, variance, torch.zeros_like(variance))
    )


def same(first: Tensor, second: Tensor) -> bool:
    """Whether two estimates of σ² agree to ``CONVERGED``."""
    return float((first / second).log().abs().max()) < CONVERGED


def _shares(state: FilterState, leverage: Tensor | None) -> Tensor:
    """Of each output in γ, (m,)."""
    variance = state.noise.variance
    assert variance is not None
    parts = torch.ones_like(variance) if leverage is None else leverage.to(variance)
    return parts / parts.sum()


class Squares:
    """Sums of squared residuals of each output, gathered over batches.

    Attributes:
        total: SSE, (m,); None before the first batch.
        count: N, examples.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in a batch: outputs (B, m) and targets of as many numbers."""
        residual = targets.to(outputs).reshape(outputs.shape) - outputs
        squares = residual.double().square().sum(0)
        self.total = squares if self.total is None else self.total + squares
        self.count += len(outputs)


def over(kf: KalmanFilter, state: FilterState, loader: Iterable[Any]) -> FilterState:
    """:func:`refitted` with the squares of a loader's residuals, by a forward pass; as it was where none applies."""
    if not applies(kf.config) or state.noise.variance is None:
        return state
    squares, few = Squares(), None
    for index, batch in enumerate(loader):
        inputs, targets = complete(batch, index)
        inputs = to_device(inputs, kf.adapter.device)
        with kf.adapter.full_precision():
            outputs = kf.adapter.outputs(state.belief.mean, inputs)
        squares.add(outputs, targets.to(outputs.device))
        few = inputs if few is None else few
    if squares.total is None or few is None:
        return state
    return refitted(kf.config, state, squares.total, squares.count, leverages(kf, state, few))


def toward_mode(kf: KalmanFilter, before: FilterState, after: FilterState) -> Tensor:
    """The mean that the new σ² asks for where the old one was the mode under the old σ², (n,).

    μ + (ρ − 1) P' P₀⁻¹ (μ − μ₀): of the gradient of −log p(y, θ), the data's part grew by ρ and the prior's did not.
    Exact for linear models with one σ².
    """
    assert before.noise.variance is not None
    assert after.noise.variance is not None
    ratio = float((before.noise.variance / after.noise.variance).mean())
    mean, prior = after.belief.mean, after.prior
    pull = (mean - prior.mean) / prior.variance
    return mean + (ratio - 1.0) * after.belief.product(pull)


def leverages(kf: KalmanFilter, state: FilterState, inputs: Inputs) -> Tensor | None:
    """Mean of J P Jᵀ / σ² over some inputs, (m,); None for a single output."""
    assert state.noise.variance is not None
    if len(state.noise.variance) == 1:
        return None
    size = batch_size(inputs)
    few = to_device(some_examples(inputs, slice(0, min(size, LEVERAGE_EXAMPLES)), size), kf.adapter.device)
    total = torch.zeros_like(state.noise.variance)
    with kf.adapter.full_precision():
        for _, piece in kf.linearize.chunks(state.belief.mean, few):
            jacobian = kf.linearize(state.belief.mean, piece).jacobian()
            covariance = state.belief.output_covariance(jacobian)
            total = total + covariance.diagonal(dim1=1, dim2=2).sum(0).clamp_min(0.0)
    return total / state.noise.variance


def held_out_variance(present: Tensor, residual: Tensor, output_var: Tensor) -> Tensor:
    """σ² of most posterior density for held-out residuals e ~ N(0, s + σ²), (m,).

    Its prior is scaled inverse χ² about the present σ², worth ``HELD_OUT_COUNT`` observations: a few held-out examples
    say little, and where the belief is uncertain they say nothing.

    Args:
        present: σ² as it is, (m,).
        residual: e, (N, m).
        output_var: s, T·JPJᵀ, (N, m).
    """
    factors = torch.logspace(-3, 3, HELD_OUT_GRID, dtype=torch.float64, device=present.device)
    candidates = factors.view(-1, 1, 1) * present  # (G, 1, m)
    total = output_var + candidates
    loss = 0.5 * (total.log() + residual.square() / total).sum(1)  # (G, m)
    loss = loss + 0.5 * HELD_OUT_COUNT * (candidates.log() + present / candidates).squeeze(1)
    return factors[loss.argmin(0)] * present


def log_losses(variance: Tensor, residual: Tensor, output_cov: Tensor) -> Tensor:
    """−log N(e; 0, output_cov + σ²I) of each example, (N,)."""
    total = output_cov + torch.diag_embed(variance.expand(len(residual), -1))
    zero = torch.zeros_like(residual)
    return -torch.distributions.MultivariateNormal(zero, total, validate_args=False).log_prob(residual)
