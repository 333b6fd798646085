"""Selection of settings on a stream: a bank of filters predicts its first examples, and the best filter continues."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.filtering.update_info import UpdateInfo
from bayes_kf.inference.fitting.divergence import posterior_on_divergence
from bayes_kf.inference.fitting.loop import Callback, LoopStep, run_loop
from bayes_kf.inference.fitting.progress import FitHistory, ProgressBar
from bayes_kf.inference.fitting.selection.filter_bank import Bank, BankState, candidates
from bayes_kf.inference.posterior import Posterior
from bayes_kf.models.batch import Inputs, split_batch


def select_on_stream(
    kf: KalmanFilter, batches: Iterator[Any], inputs: Inputs, history: FitHistory, progress: ProgressBar
) -> tuple[KalmanFilter, FilterState, Tensor]:
    """The filter of ``tune`` with the largest evidence on the first examples, its state, and the evidence of all, (G,).

    The evidence leaves out the burn-in, unless the stream ends in it.

    Args:
        kf: its config has the grid ``tune``.
        batches: the stream; later batches stay in it.
        inputs: on which the scale of the priors is measured.
        history: records the updates.
        progress: advanced after every update.

    Raises:
        FitDivergenceError: if the updates of all candidates diverge.
    """
    settings = kf.config.fitting_settings
    assert settings.tune is not None
    bank = Bank(kf.adapter, candidates(kf.config, settings.tune), settings.tune_margin)
    burn_in = _BurnIn(bank.init(inputs), settings.tune_burn_in * settings.tune_examples)

    def posterior(before: FilterState) -> Posterior:
        return Posterior(bank.filters[bank.best(burn_in.latest)], before, history.series())

    def summary() -> str:
        return f"{len(bank.filters)} candidates, {history.summary()}"

    callbacks: list[Callback[BankState, UpdateInfo]] = [lambda step: history.add(step.info), burn_in]
    first = _first_examples(batches, settings.tune_examples)
    with posterior_on_divergence(posterior):
        state = run_loop(first, burn_in.latest, bank.update, callbacks, progress, summary)
    best = bank.best(state, burn_in.end)
    chosen = state.states[best]
    assert chosen is not None  # a candidate that diverged has no evidence
    return bank.filters[best], chosen, bank.evidence(state, burn_in.end)


class _BurnIn:
    """A callback that remembers the bank's state at the end of the burn-in, and the latest one.

    Attributes:
        end: the state at the end; None before.
        latest: the latest state.
    """

    def __init__(self, start: BankState, num_examples: float) -> None:
        self.end: BankState | None = None
        self.latest, self._num_examples, self._examples = start, num_examples, 0

    def __call__(self, step: LoopStep[BankState, UpdateInfo]) -> None:
        if self.end is None and self._examples >= self._num_examples:
            self.end = step.before
        self._examples, self.latest = self._examples + len(step.targets), step.state


def _first_examples(batches: Iterator[Any], count: int) -> Iterator[Any]:
    """Batches until they hold ``count`` examples."""
    examples = 0
    while examples < count and (batch := next(batches, None)) is not None:
        yield batch
        targets = split_batch(batch)[1]
        examples += 0 if targets is None else len(targets)
