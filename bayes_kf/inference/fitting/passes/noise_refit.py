"""The noise variance σ² of a Gaussian likelihood, refitted at a fixed mean, and the covariance under it.

The filter estimates σ² from its predictions during a pass (``noise.update_variance``). Once a mean is fitted, by more
passes or elsewhere, its residuals on the N examples give

    σ² = SSE / (N − γ),    γ = Σ_i (1 − P_ii / p₀_i) = tr(J P Jᵀ) / σ²,

where γ is the effective number of parameters (MacKay 1992). P was estimated under the old σ². Its data precision is
proportional to 1/σ², so P'⁻¹ = P₀⁻¹ + ρ (P⁻¹ − P₀⁻¹) with ρ = σ²_old/σ²_new. This is exact for full, low-rank and
diagonal precisions with one σ². With several outputs, ρ is the mean of theirs, weighted by γ. γ depends on P, so both
are iterated.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.filtering.update_info import UpdateInfo
from bayes_kf.inference.fitting.loop import LoopStep, run_loop
from bayes_kf.inference.measurement_model import noise
from bayes_kf.models.batch import Inputs, batch_size, some_examples, to_device

MAX_ROUNDS = 30
CONVERGED = 1e-4  # relative change of σ²
MIN_RESIDUAL_SHARE = 1e-3  # N − γ is at least this share of N, since an approximate P can overestimate γ
LEVERAGE_EXAMPLES = 32  # on which the shares of several outputs in γ are measured


class ResidualSums:
    """Sums of squared residuals of each output over batches.

    Attributes:
        squares: SSE, (m,); None before the first batch.
        count: N, the number of examples.
    """

    def __init__(self) -> None:
        self.squares: Tensor | None = None
        self.count = 0

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch: outputs (B, m), and as many target values."""
        residual = targets.to(outputs).reshape(outputs.shape) - outputs
        squares = residual.double().square().sum(0)
        self.squares = squares if self.squares is None else self.squares + squares
        self.count += len(outputs)

    def add_step(self, step: LoopStep[FilterState, UpdateInfo]) -> None:
        """Add the residuals before an update, as a callback of a loop."""
        self.add(step.info.outputs, step.targets.to(step.info.outputs.device))


def can_refit_noise(config: KalmanConfig) -> bool:
    """Whether σ² of Gaussian noise is estimated and no dynamics have changed the prior's share of the belief."""
    static = (config.forgetting, config.drift_variance, config.prior_pull) == (1.0, 0.0, 0.0)
    return config.likelihood == "gaussian" and config.noise_variance == "estimated" and static


def refit_noise(kf: KalmanFilter, state: FilterState, loader: Iterable[Any]) -> FilterState:
    """The state with σ² of the loader's residuals at its mean, by one forward pass over the data.

    The state itself is returned if σ² is not estimated.
    """
    if not can_refit_noise(kf.config) or state.noise.variance is None:
        return state
    sums, first = ResidualSums(), list[Inputs]()

    def add_batch(_: None, inputs: Inputs, targets: Tensor) -> tuple[None, None]:
        inputs = to_device(inputs, kf.adapter.device)
        with kf.adapter.full_precision():
            outputs = kf.adapter.outputs(state.belief.mean, inputs)
        sums.add(outputs, targets.to(outputs.device))
        if not first:
            first.append(inputs)
        return None, None

    run_loop(loader, None, add_batch)
    if sums.squares is None:
        return state
    return refit_from_residuals(state, sums.squares, sums.count, output_leverages(kf, state, first[0]))


def refit_from_residuals(
    state: FilterState, squares: Tensor, count: int, leverages: Tensor | None = None
) -> FilterState:
    """The state with σ² = SSE/(N − γ) and its belief under that σ²; its mean is not changed.

    Args:
        state: its belief was estimated under ``state.noise.variance``.
        squares: SSE of each output at the state's mean, (m,), over the examples that the belief was conditioned on.
        count: N.
        leverages: relative shares of the outputs in γ, (m,); None: equal shares.
    """
    assert state.noise.variance is not None
    variance = state.noise.variance
    squares = squares.to(variance).clamp_min(count * torch.finfo(torch.float32).tiny ** 0.5)
    refitted = state
    for _ in range(MAX_ROUNDS):
        shares = _output_shares(refitted, leverages)
        gamma = (effective_parameters(refitted) * shares).clamp(max=(1.0 - MIN_RESIDUAL_SHARE) * count)
        last, variance = variance, squares / (count - gamma)
        refitted = with_noise_variance(state, variance, leverages)
        if has_converged(last, variance):
            break
    return refitted._replace(noise=noise.with_variance(state.noise, variance, count - gamma))


def with_noise_variance(state: FilterState, variance: Tensor, leverages: Tensor | None = None) -> FilterState:
    """The state with another σ², (m,), and its covariance under it; ``leverages`` as above."""
    assert state.noise.variance is not None
    ratio = float((_output_shares(state, leverages) * state.noise.variance / variance).sum())
    settled = noise.with_variance(state.noise, variance, torch.zeros_like(variance))
    return scale_data_precision(state, ratio)._replace(noise=settled)


def scale_data_precision(state: FilterState, ratio: float) -> FilterState:
    """The state with the data precision P⁻¹ − P₀⁻¹ of its belief multiplied by ρ; its mean is not changed.

    P₀⁻¹ + ρ (P⁻¹ − P₀⁻¹) = ρ (P⁻¹ + (1/ρ − 1) P₀⁻¹): a diagonal is added to the precision, then P is divided by ρ.

    Args:
        state: the state.
        ratio: ρ.
    """
    added = state.belief.add_precision((1.0 / ratio - 1.0) / state.prior.variance)
    return state._replace(belief=added.predict(ratio, 0.0))


def effective_parameters(state: FilterState) -> float:
    """γ, the effective number of parameters."""
    remaining = state.belief.marginal_variance().double() / state.prior.variance.double()
    return float((1.0 - remaining).clamp_min(0.0).sum())


def has_converged(last: Tensor, variance: Tensor) -> bool:
    """Whether two successive estimates of σ² agree to ``CONVERGED``."""
    return float((last / variance).log().abs().max()) < CONVERGED


def mode_under_new_noise(kf: KalmanFilter, before: FilterState, after: FilterState) -> Tensor:
    """The mode under a new σ², (n,), if the mean was the mode under the old σ².

    μ + (ρ − 1) P' P₀⁻¹ (μ − μ₀): of the gradient of −log p(y, θ), the part of the data is multiplied by ρ and that of
    the prior stays. Exact for linear models with one σ².

    Args:
        kf: the filter.
        before: the state with the old σ².
        after: the state with the new one.
    """
    assert before.noise.variance is not None
    assert after.noise.variance is not None
    ratio = float((before.noise.variance / after.noise.variance).mean())
    mean, prior = after.belief.mean, after.prior
    prior_gradient = (mean - prior.mean) / prior.variance
    return mean + (ratio - 1.0) * after.belief.product(prior_gradient)


def output_leverages(kf: KalmanFilter, state: FilterState, inputs: Inputs) -> Tensor | None:
    """The sum of J P Jᵀ / σ² of each output over some inputs, (m,); None for a single output."""
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


def _output_shares(state: FilterState, leverages: Tensor | None) -> Tensor:
    """The share of each output in γ, (m,)."""
    variance = state.noise.variance
    assert variance is not None
    shares = torch.ones_like(variance) if leverages is None else leverages.to(variance)
    return shares / shares.sum()
