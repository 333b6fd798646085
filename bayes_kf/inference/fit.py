"""Passes over data: from a model and a loader to a posterior."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kf.inference import kept, noise, post_hoc, refine, select
from bayes_kf.inference.bank import Bank, candidates
from bayes_kf.inference.batches import SCALE_EXAMPLES, complete, first, length, located, scaling
from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filter import KalmanFilter
from bayes_kf.inference.posterior import Posterior
from bayes_kf.inference.progress import Bar, Record
from bayes_kf.inference.state import DivergenceError, FilterState
from bayes_kf.models.adapter import AdapterModel, Inputs, to_device

STARTS = ("prior", "trained")
MAX_HALVINGS = 10
ROUNDING = 1e-9  # relative change of the objective that is not yet called a rise


def fit(
    model: nn.Module | AdapterModel,
    loader: Iterable[Any],
    config: KalmanConfig | Sequence[KalmanConfig] | None = None,
    *,
    start: str = "prior",
    checkpoint: str | Path | None = None,
    every: int = 100,
    progress: bool = True,
) -> Posterior:
    """The posterior over a model's trainable tensors after one pass over a loader, or as many as configured.

    Args:
        model: a PEFT model or any module with trainable tensors, or a reading of one (``models.language``); its weights
            are not changed.
        loader: batches ``(inputs, targets)`` or mappings with ``labels``.
        config: the settings. Several: each learns seven eighths of the data, the rest says which predicts best and at
            which temperature, and that one goes on to learn the rest (``select``). None: the two of
            ``KalmanConfig.dataset`` where the loader can be split (a DataLoader over a data set, or a list of at least
            eight batches), else ``KalmanConfig.stream()``, a single pass; with a ``checkpoint``, ``KalmanConfig()``.
        start: "prior": the model's present tensors are the prior mean, and the mean learns online. "trained": they
            are kept as the posterior mean (an adapter already trained by anything), and the pass gives the covariance
            of the model linearized there (a Laplace approximation), under a prior as wide as its evidence says
            unless ``initial_variance`` is given, and with temperature 0.1 unless one is (``post_hoc`` says why;
            :meth:`Posterior.calibrate` finds a better one on held-out data).
        checkpoint: a folder that the posterior of a single pass is kept in, written every so many updates, in the end,
            and when the pass is stopped (Ctrl-C, a loader that raises). Called again with the same loader, settings and
            folder, it goes on after the batches that it has learned, to the bit as if never stopped. None: none.
        every: updates between checkpoints.
        progress: whether to show a bar with online accuracy, log loss and innovation health (its mean over its
            degrees of freedom: 1 for a consistent filter).

    Raises:
        ValueError: for a bad ``start``, an empty loader, one that is used up by the first of several passes, one that
            cannot be split for several ``config``, or a batch that does not fit, with the batch's index.
        DivergenceError: when an update had to be refused; its ``posterior`` attribute is the belief before it. Of
            several ``config``, when that happened to all.

    Example:
        >>> data = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(5)]
        >>> posterior = fit(nn.Linear(3, 1), data, KalmanConfig(likelihood="gaussian"), progress=False)
        >>> posterior.mean["weight"].shape, len(posterior.history["log_loss"])
        (torch.Size([1, 3]), 20)
    """
    if start not in STARTS:
        raise ValueError(f"`start` must be one of {', '.join(STARTS)}, got {start!r}.")
    if not isinstance(loader, Iterable):
        raise ValueError(f"`loader` must be iterable, got {type(loader).__name__}.")
    if checkpoint is not None:
        if start != "prior":
            raise ValueError(f"`start` must be 'prior' with a `checkpoint`, got {start!r}.")
        if config is not None and not isinstance(config, KalmanConfig):
            raise ValueError("`config` must be one with a `checkpoint`, got several.")
        return kept.fit_kept(model, loader, config or KalmanConfig(), checkpoint, every, progress)
    if isinstance(config, KalmanConfig):
        return _fit_one(model, loader, config, start, progress)
    if config is not None and start == "trained":
        raise ValueError("`config` must be one with `start` 'trained', whose mean stays, got several.")
    parts = None if start == "trained" else select.split(loader)
    if config is None:
        if parts is None:
            once = KalmanConfig() if start == "trained" else KalmanConfig.stream()
            return _fit_one(model, loader, once, start, progress)
        config = select.default(model, parts.fitted)
    configs = select.check(config)
    if parts is None:
        raise ValueError(
            "`loader` must be a DataLoader over a data set or a list of at least 8 batches for several `config`, "
            f"got {type(loader).__name__}."
        )
    return _fit_best(model, parts, configs, progress)


def _fit_best(
    model: nn.Module | AdapterModel, parts: select.Parts, configs: Sequence[KalmanConfig], progress: bool
) -> Posterior:
    """The candidate that predicts the held-out part best, gone on to learn it too."""
    found: list[tuple[float, Posterior]] = []
    losses, failed = [], None
    for number, config in enumerate(configs):
        try:
            fitted = _fit_one(
                model, parts.fitted, config, "prior", progress, f"candidate {number + 1} of {len(configs)}: "
            )
        except DivergenceError as error:
            failed = error
            losses.append(float("inf"))
            continue
        calibrated, loss = select.score(fitted, parts.held_out)
        losses.append(loss)
        found.append((loss, calibrated))
    if not found:
        assert failed is not None  # nothing else leaves a candidate out
        raise failed
    best = min(found, key=lambda pair: pair[0])[1]
    kf, record, refined = best.kf, Record(best.config.likelihood), best.config.mean_passes > 0
    try:
        with Bar(length(parts.held_out), "the held-out part", progress) as bar:
            state = _one_pass(kf, best.state, parts.held_out, record, bar, hold_mean=refined)
        if refined:  # the mean goes on as it did last, now over all examples
            with Bar(None, "last mean pass", progress) as bar:
                state, _ = _mean_pass(
                    kf,
                    state,
                    itertools.chain(parts.fitted, parts.held_out),
                    kf.config.mean_passes - 1,
                    kf.config.mean_passes,
                    bar,
                )
    except DivergenceError as error:
        error.posterior = best
        raise
    later = record.history()
    history = {
        name: torch.cat([values, later[name]]) if name in later else values for name, values in best.history.items()
    }
    history["held_out_log_loss"] = torch.tensor(losses, dtype=torch.float64)
    return Posterior(kf, state, history)


def _fit_one(
    model: nn.Module | AdapterModel,
    loader: Iterable[Any],
    config: KalmanConfig,
    start: str,
    progress: bool,
    label: str = "",
) -> Posterior:
    """The posterior under one setting."""
    if start == "trained" and config.temperature == "prequential" and config.tune is None:
        config = dataclasses.replace(config, temperature=post_hoc.TEMPERATURE)
    kf = KalmanFilter(model, config)
    passes, grid = kf.config.passes, kf.config.tune
    if passes > 1 and start == "trained":
        raise ValueError(f"`passes` must be 1 with `start` 'trained', whose mean stays, got {passes}.")
    if kf.config.mean_passes and start == "trained":
        raise ValueError(
            f"`mean_passes` must be 0 with `start` 'trained', whose mean stays, got {kf.config.mean_passes}."
        )
    if passes + kf.config.mean_passes > 1 and isinstance(loader, Iterator):
        total = passes + kf.config.mean_passes
        raise ValueError(f"`loader` must be iterable anew for each of {total} passes, got {type(loader).__name__}.")
    if grid is not None and start == "trained":
        raise ValueError("`tune` must be None with `start` 'trained', which predicts nothing before it learns it.")
    batches = iter(loader)
    few = first(batches, SCALE_EXAMPLES)
    if not few:
        raise ValueError("`loader` must yield at least one batch, got none.")
    batches, record = itertools.chain(few, batches), Record(kf.config.likelihood)
    history: dict[str, Tensor] = {}
    with Bar(length(loader), f"{label}fit", progress) as bar:
        if grid is None:
            state = kf.init(scaling(kf, few))
        else:
            kf, state, history["evidence"] = _tuned(kf, batches, scaling(kf, few), record, bar)
        state = _one_pass(kf, state, batches, record, bar, hold_mean=start == "trained")
    if start == "trained" and kf.config.initial_variance is None:
        state, history["evidence"] = post_hoc.by_evidence(kf.config, kf.adapter, state)
    history, objective = record.history() | history, []
    for number in range(2, passes + 1):
        with Bar(length(loader), f"{label}pass {number} of {passes}", progress) as bar:
            try:
                state, lowest = _gauss_newton(kf, state, loader, bar)
            except DivergenceError as error:
                error.posterior = Posterior(kf, state, history)
                raise
        objective.append(lowest)
    if objective:
        history["objective"] = torch.tensor(objective, dtype=torch.float64)
    losses = []
    for number in range(kf.config.mean_passes):
        with Bar(length(loader), f"{label}mean pass {number + 1} of {kf.config.mean_passes}", progress) as bar:
            try:
                state, loss = _mean_pass(kf, state, loader, number, kf.config.mean_passes, bar)
            except DivergenceError as error:
                error.posterior = Posterior(kf, error.state, history)
                raise
        losses.append(loss)
    if losses:
        history["fitted_log_loss"] = torch.tensor(losses, dtype=torch.float64)
    return Posterior(kf, state, history)


def _mean_pass(
    kf: KalmanFilter, before: FilterState, loader: Iterable[Any], number: int, passes: int, bar: Bar
) -> tuple[FilterState, float]:
    """A pass in which only the mean moves, and its log loss per example, each before it moved the mean again."""
    state, total, seen = before, 0.0, 0
    for batch in loader:
        inputs, targets = complete(batch, bar.done)
        done = (number + seen / before.examples) / passes
        with located(bar.done):
            state, loss = refine.step(kf.config, kf.adapter, state, inputs, targets, refine.RATE * (1.0 - done))
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
    """The filter of the grid that predicted the first examples best, its state after them, and all evidence, (G,)."""
    assert kf.config.tune is not None
    bank = Bank(kf.adapter, candidates(kf.config, kf.config.tune))
    state, seen = bank.init(inputs), 0
    for batch in batches:
        given, targets = complete(batch, bar.done)
        try:
            with located(bar.done):
                state, info = bank.update(state, given, targets)
        except DivergenceError as error:
            error.posterior = Posterior(bank.filters[bank.best(state)], error.state, record.history())
            raise
        record.add(info)
        bar.advance(f"{len(bank.filters)} candidates, {record.summary()}")
        seen += len(targets)
        if seen >= kf.config.tune_examples:
            break
    best = bank.best(state)
    chosen = state.states[best]
    assert chosen is not None  # what diverged has no evidence
    return bank.filters[best], chosen, bank.evidence(state)


def _gauss_newton(kf: KalmanFilter, before: FilterState, loader: Iterable[Any], bar: Bar) -> tuple[FilterState, float]:
    """Another pass, from the prior, linearized at the mean that the one before ended with; its state and objective.

    The step from that mean is halved until −log p(y, θ) is no larger than there, by forward passes.
    """
    at = before.belief.mean
    state = _one_pass(kf, kf.restart(before), loader, Record(kf.config.likelihood), bar, at=at)
    _check_same(before.examples, state.examples)
    found, start = state.belief.mean, _objective(kf, state, at, loader)
    for halvings in range(MAX_HALVINGS):
        mean = torch.lerp(at, found, 0.5**halvings)
        reached = _objective(kf, state, mean, loader)
        if reached <= start + ROUNDING * abs(start):
            return state._replace(belief=state.belief._replace(mean=mean)), reached
    warnings.warn(
        f"no part of a pass's step lowered −log p(y, θ) = {start:.6g}; the mean stays where the pass was linearized",
        stacklevel=3,
    )
    return state._replace(belief=state.belief._replace(mean=at)), start


@torch.no_grad()
def _objective(kf: KalmanFilter, state: FilterState, mean: Tensor, loader: Iterable[Any]) -> float:
    """−log p(y, θ) at a mean, up to a constant, with the prior and the noise of a state."""
    family, total = noise.likelihood(kf.config, state.noise), 0.0
    for index, batch in enumerate(loader):
        inputs, targets = complete(batch, index)
        outputs = kf.adapter.outputs(mean, to_device(inputs, kf.adapter.device))
        total -= float(family.log_prob(outputs, family.check(outputs, targets.to(outputs.device))).double().sum())
    return total + 0.5 * float(((mean - state.prior.mean).double().square() / state.prior.variance).sum())


def _one_pass(
    kf: KalmanFilter,
    state: FilterState,
    batches: Iterable[Any],
    record: Record,
    bar: Bar,
    hold_mean: bool = False,
    at: Tensor | None = None,
) -> FilterState:
    """The state after an update with every batch."""
    for batch in batches:
        inputs, targets = complete(batch, bar.done)
        try:
            with located(bar.done):
                state, info = kf.update(state, inputs, targets, hold_mean=hold_mean, at=at)
        except DivergenceError as error:
            error.posterior = Posterior(kf, state, record.history())
            raise
        record.add(info)
        bar.advance(record.summary())
    return state
