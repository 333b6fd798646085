"""Gauss-Newton passes: the filter runs again from the prior, linearized at the mean of the pass before.

No example counts twice. The step of the mean is halved until the objective −log p(y, θ) does not increase.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.fitting.loop import run_loop
from bayes_kf.inference.fitting.passes.filter_pass import check_same_examples, filter_pass
from bayes_kf.inference.fitting.passes.noise_refit import mode_under_new_noise, refit_noise
from bayes_kf.inference.fitting.progress import FitHistory, ProgressBar
from bayes_kf.inference.measurement_model import noise
from bayes_kf.models.batch import Inputs, to_device

MAX_HALVINGS = 10
OBJECTIVE_RTOL = 1e-9  # a smaller relative increase of the objective is rounding


def gauss_newton_pass(
    kf: KalmanFilter, before: FilterState, loader: Iterable[Any], progress: ProgressBar
) -> tuple[FilterState, float]:
    """The state after one more pass, and the objective at its mean.

    Raises:
        ValueError: if the loader yields another number of examples.
        FitDivergenceError: if the filter refuses an update.
    """
    start = before.belief.mean
    history = FitHistory(kf.config.likelihood, trained_on=True)
    state = filter_pass(kf, kf.restart(before), loader, history, progress, at=start)
    check_same_examples(before.examples, state.examples)
    return _line_search(kf, state, start, state.belief.mean, loader)


def refit_noise_and_mode(kf: KalmanFilter, before: FilterState, loader: Iterable[Any]) -> FilterState:
    """The state after the last pass with σ² of its own residuals, and with the belief under that σ²."""
    state = refit_noise(kf, before, loader)
    if state is before:
        return state
    mode = mode_under_new_noise(kf, before, state)
    return _line_search(kf, state, state.belief.mean, mode, loader)[0]


def _line_search(
    kf: KalmanFilter, state: FilterState, start: Tensor, end: Tensor, loader: Iterable[Any]
) -> tuple[FilterState, float]:
    """The state with its mean on the line from ``start`` to ``end``, and the objective there.

    The step begins at ``end`` and is halved until the objective is no larger than at ``start``.
    """
    at_start = negative_log_joint(kf, state, start, loader)
    for halvings in range(MAX_HALVINGS):
        mean = torch.lerp(start, end, 0.5**halvings)
        objective = negative_log_joint(kf, state, mean, loader)
        if objective <= at_start + OBJECTIVE_RTOL * abs(at_start):
            return state._replace(belief=state.belief.with_mean(mean)), objective
    warnings.warn(
        f"no step of this pass decreased −log p(y, θ) = {at_start:.6g}; the mean is not changed",
        stacklevel=4,
    )
    return state._replace(belief=state.belief.with_mean(start)), at_start


@torch.no_grad()
def negative_log_joint(kf: KalmanFilter, state: FilterState, mean: Tensor, loader: Iterable[Any]) -> float:
    """The objective −log p(y, θ) at a mean, up to a constant, in nats, with the prior and the noise of a state."""
    family = noise.likelihood(kf.config.noise_settings, state.noise)

    def add_loss(total: float, inputs: Inputs, targets: Tensor) -> tuple[float, None]:
        outputs = kf.adapter.outputs(mean, to_device(inputs, kf.adapter.device))
        log_prob = family.log_prob(outputs, family.check(outputs, targets.to(outputs.device)))
        return total - float(log_prob.double().sum()), None

    total = run_loop(loader, 0.0, add_loss)
    return total + 0.5 * float(((mean - state.prior.mean).double().square() / state.prior.variance).sum())
