"""Passes over data: from a model and a loader to a posterior."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bayes_kf.inference import noise, post_hoc, refine, select
from bayes_kf.inference.bank import Bank, candidates
from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filter import KalmanFilter
from bayes_kf.inference.posterior import Posterior
from bayes_kf.inference.state import DivergenceError, FilterState, UpdateInfo
from bayes_kf.models.adapter import Inputs, batch_size, split_batch, to_device

STARTS = ("prior", "trained")
SCALE_EXAMPLES = 32  # inputs that the prior's scale is measured on, taken from the first batches
MAX_HALVINGS = 10
ROUNDING = 1e-9  # relative change of the objective that is not yet called a rise
WINDOW = 100  # updates behind the numbers in the progress bar


def fit(
    model: nn.Module,
    loader: Iterable[Any],
    config: KalmanConfig | Sequence[KalmanConfig] | None = None,
    *,
    start: str = "prior",
    progress: bool = True,
) -> Posterior:
    """The posterior over a model's trainable tensors after one pass over a loader, or as many as configured.

    Args:
        model: a PEFT model or any module with trainable tensors; its weights are not changed.
        loader: batches ``(inputs, targets)`` or mappings with ``labels``.
        config: the settings. Several: each learns seven eighths of the data, the rest says which predicts best and at
            which temperature, and that one goes on to learn the rest (``select``). None: the two of
            ``KalmanConfig.dataset`` where the loader can be split (a DataLoader over a data set, or a list of at least
            eight batches), else ``KalmanConfig.stream()``, a single pass.
        start: "prior": the model's present tensors are the prior mean, and the mean learns online. "trained": they
            are kept as the posterior mean (an adapter already trained by anything), and the pass gives the covariance
            of the model linearized there (a Laplace approximation), under a prior as wide as its evidence says
            unless ``initial_variance`` is given, and with temperature 0.1 unless one is (``post_hoc`` says why;
            :meth:`Posterior.calibrate` finds a better one on held-out data).
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


def _fit_best(model: nn.Module, parts: select.Parts, configs: Sequence[KalmanConfig], progress: bool) -> Posterior:
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
    kf, record, refined = best.kf, _Record(best.config.likelihood), best.config.mean_passes > 0
    try:
        with _Bar(_length(parts.held_out), "the held-out part", progress) as bar:
            state = _one_pass(kf, best.state, parts.held_out, record, bar, hold_mean=refined)
        if refined:  # the mean goes on as it did last, now over all examples
            with _Bar(None, "last mean pass", progress) as bar:
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
    model: nn.Module, loader: Iterable[Any], config: KalmanConfig, start: str, progress: bool, label: str = ""
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
    first = _first(batches, SCALE_EXAMPLES)
    if not first:
        raise ValueError("`loader` must yield at least one batch, got none.")
    batches, record = itertools.chain(first, batches), _Record(kf.config.likelihood)
    history: dict[str, Tensor] = {}
    with _Bar(_length(loader), f"{label}fit", progress) as bar:
        if grid is None:
            state = kf.init(_scaling(kf, first))
        else:
            kf, state, history["evidence"] = _tuned(kf, batches, _scaling(kf, first), record, bar)
        state = _one_pass(kf, state, batches, record, bar, hold_mean=start == "trained")
    if start == "trained" and kf.config.initial_variance is None:
        state, history["evidence"] = post_hoc.by_evidence(kf.config, kf.adapter, state)
    history, objective = record.history() | history, []
    for number in range(2, passes + 1):
        with _Bar(_length(loader), f"{label}pass {number} of {passes}", progress) as bar:
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
        with _Bar(_length(loader), f"{label}mean pass {number + 1} of {kf.config.mean_passes}", progress) as bar:
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
    kf: KalmanFilter, before: FilterState, loader: Iterable[Any], number: int, passes: int, bar: _Bar
) -> tuple[FilterState, float]:
    """A pass in which only the mean moves, and its log loss per example, each before it moved the mean again."""
    state, total, seen = before, 0.0, 0
    for batch in loader:
        inputs, targets = _complete(batch, bar.done)
        done = (number + seen / before.examples) / passes
        with _located(bar.done):
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
    kf: KalmanFilter, batches: Iterator[Any], inputs: Inputs, record: _Record, bar: _Bar
) -> tuple[KalmanFilter, FilterState, Tensor]:
    """The filter of the grid that predicted the first examples best, its state after them, and all evidence, (G,)."""
    assert kf.config.tune is not None
    bank = Bank(kf.adapter, candidates(kf.config, kf.config.tune))
    state, seen = bank.init(inputs), 0
    for batch in batches:
        given, targets = _complete(batch, bar.done)
        try:
            with _located(bar.done):
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


def _gauss_newton(kf: KalmanFilter, before: FilterState, loader: Iterable[Any], bar: _Bar) -> tuple[FilterState, float]:
    """Another pass, from the prior, linearized at the mean that the one before ended with; its state and objective.

    The step from that mean is halved until −log p(y, θ) is no larger than there, by forward passes.
    """
    at = before.belief.mean
    state = _one_pass(kf, kf.restart(before), loader, _Record(kf.config.likelihood), bar, at=at)
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
        inputs, targets = _complete(batch, index)
        outputs = kf.adapter.outputs(mean, to_device(inputs, kf.adapter.device))
        total -= float(family.log_prob(outputs, family.check(outputs, targets.to(outputs.device))).double().sum())
    return total + 0.5 * float(((mean - state.prior.mean).double().square() / state.prior.variance).sum())


def _one_pass(
    kf: KalmanFilter,
    state: FilterState,
    batches: Iterable[Any],
    record: _Record,
    bar: _Bar,
    hold_mean: bool = False,
    at: Tensor | None = None,
) -> FilterState:
    """The state after an update with every batch."""
    for batch in batches:
        inputs, targets = _complete(batch, bar.done)
        try:
            with _located(bar.done):
                state, info = kf.update(state, inputs, targets, hold_mean=hold_mean, at=at)
        except DivergenceError as error:
            error.posterior = Posterior(kf, state, record.history())
            raise
        record.add(info)
        bar.advance(record.summary())
    return state


@contextmanager
def _located(index: int) -> Iterator[None]:
    """Errors of a batch say which it was."""
    try:
        yield
    except DivergenceError:
        raise
    except ValueError as error:
        raise ValueError(f"{error} (batch {index} of `loader`)") from error
    except RuntimeError as error:  # the model's own complaint
        error.add_note(f"in batch {index} of `loader`")
        raise


class _Bar:
    """Progress over batches; ``done`` of them."""

    def __init__(self, total: int | None, label: str, shown: bool) -> None:
        self.done, self._bar = 0, tqdm(total=total, disable=not shown, desc=label, unit="batch")

    def advance(self, text: str) -> None:
        self.done += 1
        if not self._bar.disable:
            self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _scaling(kf: KalmanFilter, batches: list[Any]) -> Inputs:
    """The first batches' inputs together where they can be joined: the prior's scale is measured on them."""
    pieces = [_complete(batch, index)[0] for index, batch in enumerate(batches)]
    return _join([to_device(piece, kf.adapter.device) for piece in pieces])


def _join(pieces: list[Inputs]) -> Inputs:
    """Inputs as one batch; the first piece alone where they do not fit together (text padded to different lengths)."""
    first = pieces[0]
    if isinstance(first, Tensor):
        same = all(isinstance(p, Tensor) and p.shape[1:] == first.shape[1:] for p in pieces)
        return torch.cat(pieces) if same else first  # type: ignore[arg-type]
    sizes = [batch_size(p) for p in pieces]
    joined: dict[str, Any] = {}
    for key, value in first.items():
        values = [p[key] for p in pieces]  # type: ignore[index]
        tensors = isinstance(value, Tensor) and value.ndim > 0
        if tensors and all(len(v) == n and v.shape[1:] == value.shape[1:] for v, n in zip(values, sizes, strict=True)):
            joined[key] = torch.cat(values)
        elif len(set(sizes)) == 1 and all(v is value or (tensors and torch.equal(v, value)) for v in values):
            joined[key] = value
        else:
            return first
    return joined


def _first(batches: Iterator[Any], num_examples: int) -> list[Any]:
    """The first batches that together hold ``num_examples``, or all there are."""
    first, seen = [], 0
    for batch in batches:
        first.append(batch)
        seen += batch_size(split_batch(batch)[0])
        if seen >= num_examples:
            break
    return first


def _length(loader: Iterable[Any]) -> int | None:
    """Number of batches, where the loader knows it; a DataLoader over a stream has ``__len__`` and no length."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def _complete(batch: Any, index: int) -> tuple[Inputs, Tensor]:
    """Inputs and targets of a batch that must have both."""
    inputs, targets = split_batch(batch)
    if targets is None:
        raise ValueError(f"`loader` must yield targets with every batch, got none in batch {index}.")
    return inputs, targets


class _Record:
    """What the updates of a pass reported, and its running summary."""

    def __init__(self, likelihood: str) -> None:
        self.likelihood = likelihood
        self.per_example: dict[str, list[Tensor]] = {"log_loss": [], "correct": []}
        self.per_update: dict[str, list[float]] = {name: [] for name in ("innovation", "dof", "damping", "seconds")}
        self._correct = self._seen = 0.0

    def add(self, info: UpdateInfo) -> None:
        self.per_example["log_loss"].append(info.log_loss.detach().cpu())
        if info.correct is not None:
            self.per_example["correct"].append(info.correct.detach().cpu())
            self._correct += float(info.correct.sum())
        self._seen += len(info.log_loss)
        update = info._asdict() | {"dof": info.degrees_of_freedom}
        for name, values in self.per_update.items():
            values.append(float(update[name]))

    def summary(self) -> str:
        recent = torch.cat(self.per_example["log_loss"][-WINDOW:])
        dof = sum(self.per_update["dof"][-WINDOW:])  # 0 where the only update's candidate diverged in it
        ratio = sum(self.per_update["innovation"][-WINDOW:]) / max(dof, 1.0)
        accuracy = f"accuracy {self._correct / self._seen:.3f}, " if self.per_example["correct"] else ""
        return f"{accuracy}log loss {recent.mean():.3f}, innovation {ratio:.2f}"

    def history(self) -> dict[str, Tensor]:
        joined = {name: torch.cat(parts) if parts else torch.zeros(0) for name, parts in self.per_example.items()}
        if self.likelihood in ("gaussian", "poisson"):
            del joined["correct"]
        return joined | {name: torch.tensor(values) for name, values in self.per_update.items()}
