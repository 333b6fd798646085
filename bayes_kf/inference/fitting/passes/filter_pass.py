"""A pass of the filter over a data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.filtering.update_info import UpdateInfo
from bayes_kf.inference.fitting.divergence import posterior_on_divergence
from bayes_kf.inference.fitting.loop import Callback, run_loop
from bayes_kf.inference.fitting.progress import FitHistory, ProgressBar
from bayes_kf.inference.posterior import Posterior
from bayes_kf.models.batch import Inputs


def filter_pass(
    kf: KalmanFilter,
    state: FilterState,
    batches: Iterable[Any],
    history: FitHistory,
    progress: ProgressBar,
    *,
    hold_mean: bool = False,
    at: Tensor | None = None,
    callbacks: Sequence[Callback[FilterState, UpdateInfo]] = (),
) -> FilterState:
    """The state after an update with every batch.

    Args:
        kf: the filter.
        state: before the first batch.
        batches: a data loader, or some of its batches.
        history: records the updates.
        progress: advanced after every update.
        hold_mean: as for :meth:`KalmanFilter.update`.
        at: as for :meth:`KalmanFilter.update`.
        callbacks: called after every update.

    Raises:
        FitDivergenceError: if the filter refuses an update.
    """

    def update(state: FilterState, inputs: Inputs, targets: Tensor) -> tuple[FilterState, UpdateInfo]:
        return kf.update(state, inputs, targets, hold_mean=hold_mean, at=at)

    callbacks = [*callbacks, lambda step: history.add(step.info)]
    with posterior_on_divergence(lambda before: Posterior(kf, before, history.series())):
        return run_loop(batches, state, update, callbacks, progress, history.summary)


def check_same_examples(first: int, later: int) -> None:
    """Raise ValueError if a later pass had another number of examples than the first."""
    if later != first:
        raise ValueError(f"`loader` must yield the same {first} examples in every pass, got {later} in a later one.")
