"""Passes over data under one setting: of the filter, Gauss-Newton's, and those in which only the mean moves."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import DivergenceError, FilterState
from bayes_kf.inference.fitting import holdout_selection, mean_step, noise_refit, prior_evidence
from bayes_kf.inference.fitting.divergence import FitDivergenceError
from bayes_kf.inference.fitting.filter_bank import Bank, candidates
from bayes_kf.inference.fitting.loader import SCALE_EXAMPLES, complete, first, length, located, scaling
from bayes_kf.inference.fitting.progress import Bar, Record
from bayes_kf.inference.measurement_model import noise
from bayes_kf.inference.posterior import Posterior
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs, check_inputs, to_device

MAX_HALVINGS = 10
MAX_ROUNDS = 20  # in which the width of a prior and σ² are found in turn
ROUNDING = 1e-9  # relative change of the objective that is not yet called a rise


def fit_one(
    model: nn.Module | AdapterModel,
    loader: Iterable[Any],
    config: KalmanConfig,
    start: str,
    progress: bool,
    label: str = "",
    given: bool = True,
) -> Posterior:
    """The posterior under one setting; arguments and errors are those of :func:`bayes_kf.fit`.

    A setting that was not ``given`` by the user gets the curvature that the number of outputs asks for.
    """
    if start == "trained" and config.temperature == "prequential" and config.tune is None:
        config = dataclasses.replace(config, temperature=prior_evidence.TEMPERATURE)
    kf = KalmanFilter(model, config)
    passes, grid = kf.config.passes, kf.config.tune
    if passes > 1 and start == "trained":
        raise ValueError(f"`passes` must be 1 with `start` 'trained', whose mean stays, got {passes}.")
    if passes + kf.config.mean_passes > 1 and isinstance(loader, Iterator):
        total = passes + kf.config.mean_passes
        raise ValueError(f"`loader` must be iterable anew for each of {total} passes, got {type(loader).__name__}.")
    if grid is not None and start == "trained":
        raise ValueError("`tune` must be None with `start` 'trained', which predicts nothing before it learns it.")
    if start == "trained" and kf.config.initial_variance is None:
        _check_static(kf.config)
    batches = iter(loader)
    few = first(batches, SCALE_EXAMPLES)
    if not few:
        raise ValueError("`loader` must yield at least one batch, got none.")
    if not given:
        inputs, _ = complete(few[0], 0)
        check_inputs(inputs)
        curvature = holdout_selection.curvature_for(kf.adapter, inputs)
        kf = KalmanFilter(kf.adapter, dataclasses.replace(kf.config, curvature=curvature))
    batches, record = itertools.chain(few, batches), Record(kf.config.likelihood, seen=start == "trained")
    history: dict[str, Tensor] = {}
    with Bar(length(loader), f"{label}fit", progress) as bar:
        if grid is None:
            state = kf.init(scaling(kf, few))
        else:
            kf, state, history["evidence"] = _tuned(kf, batches, scaling(kf, few), record, bar)
        squares = noise_refit.Squares()
        state = one_pass(kf, state, batches, record, bar, hold_mean=start == "trained", squares=squares)
    if start == "trained":
        state, found = _around_trained(kf, state, squares, complete(few[0], 0)[0])
        history |= found
    if start == "trained" and kf.config.mean_passes:
        state = prior_evidence.recentred(kf.adapter, state)
    history, objective = record.history() | history, []
    for number in range(2, passes + 1):
        with Bar(length(loader), f"{label}pass {number} of {passes}", progress) as bar:
            try:
                state, lowest = _gauss_newton(kf, noise_refit.over(kf, state, loader), loader, bar)
            except DivergenceError as error:
                raise FitDivergenceError(error, Posterior(kf, state, history)) from error
        objective.append(lowest)
    if objective:
        state = _settled(kf, state, loader)
        history["objective"] = torch.tensor(objective, dtype=torch.float64)
    losses = []
    for number in range(kf.config.mean_passes):
        with Bar(length(loader), f"{label}mean pass {number + 1} of {kf.config.mean_passes}", progress) as bar:
            try:
                state = noise_refit.over(kf, state, loader)
                state, loss = mean_pass(kf, state, loader, number, kf.config.mean_passes, bar)
            except DivergenceError as error:
                raise FitDivergenceError(error, Posterior(kf, error.state, history)) from error
        losses.append(loss)
    if losses:
        state = noise_refit.over(kf, state, loader)
        history["fitted_log_loss"] = torch.tensor(losses, dtype=torch.float64)
    return Posterior(kf, state, history)


def _around_trained(
    kf: KalmanFilter, state: FilterState, squares: noise_refit.Squares, inputs: Inputs
) -> tuple[FilterState, dict[str, Tensor]]:
    """The state with the prior's width and σ² settled where they are to be found, and the evidence of the widths.

    Each depends on the other, so they are found in turn, from σ² = SSE/N on.
    """
    config, widths = kf.config, kf.config.initial_variance is None
    if not noise_refit.applies(config) or squares.total is None:
        if not widths:
            return state, {}
        state, evidence = prior_evidence.by_evidence(config, kf.adapter, state)
        return state, {"evidence": evidence}
    leverage = noise_refit.leverages(kf, state, inputs)
    found, history = state, dict[str, Tensor]()
    variance = squares.total / squares.count
    for _ in range(MAX_ROUNDS):
        found = noise_refit.at(config, state, variance, leverage)
        if widths:
            found, history["evidence"] = prior_evidence.by_evidence(config, kf.adapter, found)
        found = noise_refit.refitted(config, found, squares.total, squares.count, leverage)
        assert found.noise.variance is not None
        last, variance = variance, found.noise.variance
        if not widths or noise_refit.same(last, variance):
            break
    return found, history


def _check_static(config: KalmanConfig) -> None:
    """Refuse dynamics where the prior's width is chosen afterwards: it must still be in the belief as it was."""
    dynamics = {"forgetting": 1.0, "drift_variance": 0.0, "prior_pull": 0.0}
    found = ", ".join(f"`{name}` {getattr(config, name)}" for name, v in dynamics.items() if getattr(config, name) != v)
    if found:
        raise ValueError(
            "with `start` 'trained' the prior's width is chosen by the evidence of data that nothing forgets, got "
            f"{found}; give `initial_variance`, or no dynamics."
        )


def mean_pass(
    kf: KalmanFilter, before: FilterState, loader: Iterable[Any], number: int, passes: int, bar: Bar
) -> tuple[FilterState, float]:
    """A pass in which only the mean moves, and its log loss per example, each before it moved the mean again."""
    state, total, seen = before, 0.0, 0
    for batch in loader:
        inputs, targets = complete(batch, bar.done)
        done = (number + seen / before.examples) / passes
        with located(bar.done):
            state, loss = mean_step.step(kf.config, kf.adapter, state, inputs, targets, mean_step.RATE * (1.0 - done))
        if not bool(torch.isfinite(state.belief.mean).all()):
            raise DivergenceError(state.step, f"the mean in batch {bar.done} of a pass of its own", before)
        total, seen = total + loss, seen + len(targets)
        bar.advance(f"log loss {total / seen:.3f}")
    _check_same(before.examples, seen)
    return state, total / seen


def _check_same(first: int, later: int) -> None:
    if later != first:
        raise ValueError(f"`loader` must yield the same {first} examples in every pass, got {later} in a later one.")


def _tuned(
    kf: KalmanFilter, batches: Iterator[Any], inputs: Inputs, record: Record, bar: Bar
) -> tuple[KalmanFilter, FilterState, Tensor]:
    """The filter of the grid that predicted the first examples best, its state after them, and what says so, (G,).

    Those of the burn-in are not counted, unless no others come.
    """
    assert kf.config.tune is not None
    bank = Bank(kf.adapter, candidates(kf.config, kf.config.tune), kf.config.tune_margin)
    state, burnt_in, seen = bank.init(inputs), None, 0
    for batch in batches:
        if burnt_in is None and seen >= kf.config.tune_burn_in * kf.config.tune_examples:
            burnt_in = state
        given, targets = complete(batch, bar.done)
        try:
            with located(bar.done):
                state, info = bank.update(state, given, targets)
        except DivergenceError as error:
            before = Posterior(bank.filters[bank.best(state)], error.state, record.history())
            raise FitDivergenceError(error, before) from error
        record.add(info)
        bar.advance(f"{len(bank.filters)} candidates, {record.summary()}")
        seen += len(targets)
        if seen >= kf.config.tune_examples:
            break
    best = bank.best(state, burnt_in)
    chosen = state.states[best]
    assert chosen is not None  # what diverged has no evidence
    return bank.filters[best], chosen, bank.evidence(state, burnt_in)


def _gauss_newton(kf: KalmanFilter, before: FilterState, loader: Iterable[Any], bar: Bar) -> tuple[FilterState, float]:
    """Another pass, from the prior, linearized at the mean that the one before ended with; its state and objective.

    The step from that mean is halved until −log p(y, θ) is no larger than there, by forward passes.
    """
    at = before.belief.mean
    state = one_pass(kf, kf.restart(before), loader, Record(kf.config.likelihood, seen=True), bar, at=at)
    _check_same(before.examples, state.examples)
    return _lowered(kf, state, at, state.belief.mean, loader)


def _settled(kf: KalmanFilter, before: FilterState, loader: Iterable[Any]) -> FilterState:
    """The state after the last pass with σ² of its own residuals, and the belief under that σ²."""
    state = noise_refit.over(kf, before, loader)
    if state is before:
        return state
    return _lowered(kf, state, state.belief.mean, noise_refit.toward_mode(kf, before, state), loader)[0]


def _lowered(
    kf: KalmanFilter, state: FilterState, at: Tensor, found: Tensor, loader: Iterable[Any]
) -> tuple[FilterState, float]:
    """The state with its mean as far from ``at`` toward ``found`` as lowers −log p(y, θ), halved until it does."""
    start = _objective(kf, state, at, loader)
    for halvings in range(MAX_HALVINGS):
        mean = torch.lerp(at, found, 0.5**halvings)
        reached = _objective(kf, state, mean, loader)
        if reached <= start + ROUNDING * abs(start):
            return state._replace(belief=state.belief.with_mean(mean)), reached
    warnings.warn(
        f"no part of a pass's step lowered −log p(y, θ) = {start:.6g}; the mean stays where the pass was linearized",
        stacklevel=4,
    )
    return state._replace(belief=state.belief.with_mean(at)), start


@torch.no_grad()
def _objective(kf: KalmanFilter, state: FilterState, mean: Tensor, loader: Iterable[Any]) -> float:
    """−log p(y, θ) at a mean, up to a constant, with the prior and the noise of a state."""
    family, total = noise.likelihood(kf.config.noise_settings, state.noise), 0.0
    for index, batch in enumerate(loader):
        inputs, targets = complete(batch, index)
        outputs = kf.adapter.outputs(mean, to_device(inputs, kf.adapter.device))
        total -= float(family.log_prob(outputs, family.check(outputs, targets.to(outputs.device))).double().sum())
    return total + 0.5 * float(((mean - state.prior.mean).double().square() / state.prior.variance).sum())


def one_pass(
    kf: KalmanFilter,
    state: FilterState,
    batches: Iterable[Any],
    record: Record,
    bar: Bar,
    hold_mean: bool = False,
    at: Tensor | None = None,
    squares: noise_refit.Squares | None = None,
) -> FilterState:
    """The state after an update with every batch; ``squares`` takes in residuals of regression, before each update."""
    for batch in batches:
        inputs, targets = complete(batch, bar.done)
        try:
            with located(bar.done):
                state, info = kf.update(state, inputs, targets, hold_mean=hold_mean, at=at)
        except DivergenceError as error:
            raise FitDivergenceError(error, Posterior(kf, state, record.history())) from error
        if squares is not None and kf.config.likelihood == "gaussian":
            squares.add(info.outputs, targets.to(info.outputs.device))
        record.add(info)
        bar.advance(record.summary())
    return state
