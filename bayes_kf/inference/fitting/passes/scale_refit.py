"""The noise variance σ² at a fixed mean, for Gaussian noise (``noise_refit``) and for Student-t noise.

For Student-t noise σ² is the fixed point of

    σ² = Σ w e² / (N − γ),    w = (ν+1)/(ν + e²/σ²),

the maximum of the likelihood of the residuals e (Lange, Little and Taylor 1989), corrected for γ effective parameters
as by MacKay. Without outliers and with large ν it is that of Gaussian noise. The covariance is scaled as there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.fitting.loop import run_loop
from bayes_kf.inference.fitting.passes import noise_refit
from bayes_kf.models.batch import Inputs, to_device

MAX_ROUNDS = 50


def can_refit_scale(config: KalmanConfig) -> bool:
    """Whether σ² is estimated and no dynamics have changed the prior's share of the belief."""
    static = (config.forgetting, config.drift_variance, config.prior_pull) == (1.0, 0.0, 0.0)
    return config.noise_variance == "estimated" and static


def refit_scale(kf: KalmanFilter, state: FilterState, loader: Iterable[Any]) -> FilterState:
    """The state with σ² of the loader's residuals at its mean, by one forward pass over the data.

    The state itself is returned if σ² is not estimated.
    """
    if kf.config.likelihood != "student_t":
        return noise_refit.refit_noise(kf, state, loader)
    if not can_refit_scale(kf.config) or state.noise.variance is None:
        return state
    errors, first = list[Tensor](), list[Inputs]()

    def add_batch(_: None, inputs: Inputs, targets: Tensor) -> tuple[None, None]:
        inputs = to_device(inputs, kf.adapter.device)
        with kf.adapter.full_precision():
            outputs = kf.adapter.outputs(state.belief.mean, inputs)
        errors.append((targets.to(outputs).reshape(outputs.shape) - outputs).double())
        if not first:
            first.append(inputs)
        return None, None

    run_loop(loader, None, add_batch)
    if not errors:
        return state
    return refit_from_errors(
        state, torch.cat(errors), kf.config.student_dof, noise_refit.output_leverages(kf, state, first[0])
    )


def refit_from_errors(state: FilterState, errors: Tensor, dof: float, leverages: Tensor | None = None) -> FilterState:
    """The state with σ² of Student-t residuals (N, m) and its belief under that σ²; its mean is not changed.

    Args:
        state: its belief was estimated under ``state.noise.variance``.
        errors: e at the state's mean, over the examples that the belief was conditioned on.
        dof: ν.
        leverages: relative shares of the outputs in γ, (m,); None: equal shares.
    """
    assert state.noise.variance is not None
    squares, variance, refitted = errors.square(), state.noise.variance, state
    for _ in range(MAX_ROUNDS):
        weighted = ((dof + 1.0) * squares / (dof + squares / variance)).sum(0)
        refitted = noise_refit.refit_from_residuals(state, weighted, len(errors), leverages)
        assert refitted.noise.variance is not None
        last, variance = variance, refitted.noise.variance
        if noise_refit.has_converged(last, variance):
            break
    return refitted
