"""The scale of the prior of each tensor and σ², refitted at a mean by the fixed point of their Laplace evidence.

A tensor's prior variance is c times its first one, p. With γ_t = Σ (1 − P_ii/(c pᵢ)) over its parameters and the
residuals at the mean

    c ← (Σ (μᵢ − μ₀ᵢ)²/pᵢ + a) / (γ_t + a),    σ² ← SSE / (N − Σ γ_t),

which is MacKay's fixed point (1992) with a prior on c around 1 that weighs ``SCALE_COUNT`` parameters; so the scale of
a tensor that the data say nothing about stays. Immer et al. (2021) interleave such steps with training.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.filtering.update_info import UpdateInfo
from bayes_kf.inference.fitting.loop import run_loop
from bayes_kf.inference.fitting.passes import noise_refit
from bayes_kf.inference.fitting.passes.noise_refit import MIN_RESIDUAL_SHARE, ResidualSums
from bayes_kf.inference.fitting.progress import ProgressBar
from bayes_kf.inference.measurement_model import noise
from bayes_kf.models.batch import Inputs

SCALE_COUNT = 0.1  # a, the weight of the first scale, in parameters


class AtMean(NamedTuple):
    """The Laplace approximation at a mean, under the prior and the σ² of its state.

    Attributes:
        state: with the covariance there.
        residuals: of its examples there.
        leverages: shares of the outputs in γ, (m,); None for a single output.
    """

    state: FilterState
    residuals: ResidualSums
    leverages: Tensor | None


def approximate_at_mean(kf: KalmanFilter, state: FilterState, loader: Iterable[Any], progress: ProgressBar) -> AtMean:
    """The covariance of all examples, linearized at the state's mean, and their residuals.

    Raises:
        DivergenceError: if the filter refuses an update.
    """
    mean, sums, first = state.belief.mean, ResidualSums(), list[Inputs]()

    def update(now: FilterState, inputs: Inputs, targets: Tensor) -> tuple[FilterState, UpdateInfo]:
        after, info = kf.update(now, inputs, targets, at=mean)
        if not first:
            first.append(inputs)
        return after._replace(belief=after.belief.with_mean(mean)), info

    start = kf.restart(state)
    start = start._replace(belief=start.belief.with_mean(mean))
    after = run_loop(loader, start, update, [sums.add_step], progress)
    return AtMean(after, sums, noise_refit.output_leverages(kf, after, first[0]))


class Scales(NamedTuple):
    """Prior variances and σ².

    Attributes:
        prior_variance: (n,).
        noise_variance: σ², (m,).
        information: N − γ, the weight of σ², (m,).
    """

    prior_variance: Tensor
    noise_variance: Tensor
    information: Tensor


def refitted_scales(kf: KalmanFilter, at_mean: AtMean, first_variance: Tensor) -> Scales:
    """One step of the fixed point.

    Args:
        kf: the filter.
        at_mean: the approximation under the present prior and σ².
        first_variance: p, (n,).
    """
    state, residuals, leverages = at_mean
    prior, count = state.prior, residuals.count
    assert residuals.squares is not None
    assert state.noise.variance is not None
    determined = (1.0 - state.belief.marginal_variance().double() / prior.variance.double()).clamp_min(0.0)
    squares = (state.belief.mean - prior.mean).double().square() / first_variance.double()
    variance, gamma = prior.variance.clone(), 0.0
    for where in kf.adapter.slices().values():
        of_tensor = float(determined[where].sum())
        scale = (float(squares[where].sum()) + SCALE_COUNT) / (of_tensor + SCALE_COUNT)
        variance[where] = scale * first_variance[where]
        gamma += of_tensor
    shares = torch.ones_like(residuals.squares) if leverages is None else leverages.to(residuals.squares)
    left = count - (gamma * shares / shares.sum()).clamp(max=(1.0 - MIN_RESIDUAL_SHARE) * count)
    least = count * torch.finfo(torch.float32).tiny ** 0.5
    noise_var = (residuals.squares.clamp_min(least) / left).to(state.noise.variance)
    return Scales(variance, noise_var, left.to(noise_var))


def with_scales(state: FilterState, scales: Scales) -> FilterState:
    """The state under another prior and σ², to go on from its mean; its covariance is not changed."""
    settled = noise.with_variance(state.noise, scales.noise_variance, scales.information)
    return state._replace(prior=state.prior._replace(variance=scales.prior_variance), noise=settled)


def under_scales(at_mean: AtMean, scales: Scales) -> AtMean:
    """The approximation under another prior and σ²: P⁻¹ = diag(1/p) + Λσ²_old/σ²_new; exact for one output."""
    state = noise_refit.with_noise_variance(at_mean.state, scales.noise_variance, at_mean.leverages)
    belief = state.belief.add_precision(1.0 / scales.prior_variance - 1.0 / state.prior.variance)
    return at_mean._replace(state=with_scales(state._replace(belief=belief), scales))
