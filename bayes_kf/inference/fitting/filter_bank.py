"""Filters side by side that differ in their settings, each priced by the stream's own log loss.

Every candidate predicts a batch before it learns from it, so the sum of its log losses is its evidence, −log p(data);
what the bank predicts is the average of them, weighted by evidence.
The candidates share forward and backward passes: a batch is linearized at the mean of the one that is ahead (again,
where its outputs leave that linearization), and learned from by all whose means lie so close that no output differs by
``CLOSE`` or more to first order, and whose own outputs leave it no earlier. The others take passes of their own. Ours.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bayes_kf.inference.config import OBSERVED, KalmanConfig, check_config
from bayes_kf.inference.filtering.gradient_penalty import PenalizedState, penalized_update
from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.linearization_check import is_small_change
from bayes_kf.inference.filtering.measurement import Measurement
from bayes_kf.inference.filtering.measurement_update import UpdatedStates
from bayes_kf.inference.filtering.state import DIVERGED, DivergenceError, FilterState
from bayes_kf.inference.filtering.update_info import UpdateInfo, UpdateInfoBuilder
from bayes_kf.inference.measurement_model import noise
from bayes_kf.inference.posterior import Posterior
from bayes_kf.inference.predictive import prediction
from bayes_kf.inference.predictive.prediction import Prediction
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs, batch_size, check_inputs, to_device
from bayes_kf.validation import check_not_negative

CLOSE = 0.2  # logits, or sds of Gaussian noise; at 1 the evidence was wrong by as much as candidates differ
NEGLIGIBLE = 1e-3  # weight, relative to the largest, below which a candidate's prediction is not asked for


class BankState(NamedTuple):
    """What a bank knows between updates; never changed in place.

    Attributes:
        states: of the candidates; None for one that diverged.
        own_passes: updates for which each candidate took passes of its own.
        step: updates made.
        differences: Σ over updates of the squared differences of what candidates gained in evidence, (G, G), in nats².
    """

    states: tuple[FilterState | None, ...]
    own_passes: tuple[int, ...]
    step: int
    differences: Tensor


class Bank:
    """Several filters over one model, and which of them the data prefer.

    Args:
        model: as for :class:`KalmanFilter`.
        configs: the candidates' settings. They agree in what they observe (likelihood, noise, curvature, seed) and have
            "prequential" temperature.
        margin: standard errors by which evidence must prefer a candidate to one with a narrower prior (:meth:`best`).

    Raises:
        ValueError: for no configs, or some that do not go together, or a bad margin.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> bank = Bank(model, candidates(KalmanConfig(), {"initial_logit_sd": (1.0, 10.0)}))
        >>> state = bank.init(torch.randn(8, 2))
        >>> state, info = bank.update(state, torch.randn(4, 2), torch.randint(2, (4,)))
        >>> bank.evidence(state).shape, bank.best(state) in (0, 1)
        (torch.Size([2]), True)
    """

    def __init__(self, model: nn.Module | AdapterModel, configs: Sequence[KalmanConfig], margin: float = 0.0) -> None:
        check_not_negative("margin", margin)
        if not configs:
            raise ValueError("`configs` must hold at least one KalmanConfig, got none.")
        for config in configs:
            check_config(config, "configs")
        for name in OBSERVED:
            values = {getattr(config, name) for config in configs}
            if len(values) > 1:
                raise ValueError(f"`configs` must agree in `{name}`, got {', '.join(sorted(map(repr, values)))}.")
        for config in configs:
            if config.temperature != "prequential":
                raise ValueError(f"`configs` must have `temperature` 'prequential', got {config.temperature!r}.")
        self.margin = float(margin)
        self.adapter = model if isinstance(model, AdapterModel) else AdapterModel(model)
        self.filters = tuple(KalmanFilter(self.adapter, config) for config in configs)
        for kf in self.filters[1:]:
            kf.linearize = self.filters[0].linearize  # one plan for all

    def init(self, inputs: Inputs | None = None) -> BankState:
        """The priors; ``inputs`` as for :meth:`KalmanFilter.init`."""
        count = len(self.filters)
        nothing = torch.zeros(count, count, dtype=torch.float64)
        return BankState(tuple(kf.init(inputs) for kf in self.filters), (0,) * count, 0, nothing)

    def update(self, state: BankState, inputs: Inputs, targets: Tensor) -> tuple[BankState, UpdateInfo]:
        """All candidates after one more batch, and what the one that was ahead saw. ``state`` is not changed.

        Outputs, log loss and correctness are those of the candidates' predictions averaged by :meth:`weights` as they
        were before the batch: a forward pass for each that counts.

        Raises:
            ValueError: for inputs or targets that do not fit.
            DivergenceError: when the update of every candidate left would leave the finite or the positive.
        """
        check_inputs(inputs)
        if not isinstance(targets, Tensor):
            raise ValueError(f"`targets` must be a tensor, got {type(targets).__name__}.")
        begun, device = time.perf_counter(), self.adapter.device
        inputs, targets = to_device(inputs, device), targets.to(device)
        with self.adapter.full_precision():
            after, info = self.filters[0].linearize.retry_in_smaller_chunks(
                lambda: self._update(state, inputs, targets), batch_size(inputs)
            )
        return after, info._replace(seconds=time.perf_counter() - begun)

    def evidence(self, state: BankState, since: BankState | None = None) -> Tensor:
        """−Σ log loss of every candidate at its best temperature, (G,), in nats; −inf for one that diverged.

        At a temperature that stayed finite; 0 before the first update. One that gave some target no probability at any
        temperature has the least number that there is. With an earlier state ``since``, of what came after it.
        """
        found = torch.full((len(state.states),), -math.inf, dtype=torch.float64)
        for number, now in enumerate(state.states):
            if now is None:
                continue
            total = now.temperature_scores.total
            if since is not None:
                before = since.states[number]
                assert before is not None  # what diverged stays so
                total = (total - before.temperature_scores.total).nan_to_num(math.inf)  # of two infinite ones
            found[number] = max(-float(total.min()), -sys.float_info.max)
        return found

    def weights(self, state: BankState) -> Tensor:
        """Posterior probability of every candidate under equal prior ones, (G,): softmax of the evidence."""
        return self.evidence(state).softmax(0)

    def best(self, state: BankState, since: BankState | None = None) -> int:
        """The candidate with the largest evidence (of what came ``since``); the first among equals.

        With a ``margin``, of those that fall short of it by no more than so many standard errors of the difference
        (paired by update), the one with the narrowest prior: on the first examples of a stream the evidence hardly
        tells widths apart, and too wide a prior learns noise where too narrow a one learns slowly. Ours.
        """
        evidence = self.evidence(state, since)
        top = int(evidence.argmax())
        if self.margin == 0.0 or not math.isfinite(float(evidence[top])):
            return top
        short = evidence[top] - evidence
        error = torch.full_like(short, math.inf)
        steps = state.step - (since.step if since else 0)
        if steps > 1:
            squares = state.differences[top] - (since.differences[top] if since else 0.0) - short.square() / steps
            error = (squares.clamp_min(0.0) * steps / (steps - 1)).sqrt()
        near = [top, *(i for i in torch.isfinite(short).nonzero()[:, 0].tolist() if short[i] <= self.margin * error[i])]
        return min(near, key=lambda i: (_width(state.states[i]), -float(evidence[i]), i))

    def posterior(self, state: BankState, number: int | None = None) -> Posterior:
        """The belief of one candidate, by default of the best.

        Raises:
            ValueError: for one that diverged, or is none.
        """
        number = self.best(state) if number is None else number
        chosen = state.states[number] if 0 <= number < len(state.states) else None
        if chosen is None:
            raise ValueError(f"`number` must be that of a candidate that did not diverge, got {number}.")
        return Posterior(self.filters[number], chosen)

    def predict(self, state: BankState, inputs: Inputs, targets: Tensor | None = None, **settings: Any) -> Prediction:
        """The candidates' predictions, averaged by :meth:`weights`: Bayesian model averaging.

        Args:
            state: from updates.
            inputs: as for :meth:`Posterior.predict`.
            targets: as there.
            **settings: the method and the number of draws, as there.
        """
        weights = self.weights(state)
        weights = torch.where(weights >= NEGLIGIBLE * weights.max(), weights, 0.0)
        numbers = [number for number, weight in enumerate(weights.tolist()) if weight > 0.0]
        found = [self.posterior(state, number).predict(inputs, targets=targets, **settings) for number in numbers]
        best = state.states[self.best(state)]
        assert best is not None  # its weight is the largest
        family = noise.likelihood(self.filters[0].config.noise_settings, best.noise)
        return prediction.average(family, found, (weights[numbers] / weights[numbers].sum()).tolist())

    def _update(self, state: BankState, inputs: Inputs, targets: Tensor) -> tuple[BankState, UpdateInfo]:
        """The candidates on the passes of the best of them; of the next best, where its own cannot be made."""
        begun = [s and self._begun(kf, s, inputs, targets) for kf, s in zip(self.filters, state.states, strict=True)]
        before, best = self.evidence(state), self.best(state)
        order = before.argsort(descending=True, stable=True).tolist()
        order.sort(key=lambda number: number != best)  # the one that is ahead first
        for leader in order:
            if begun[leader] is None:
                continue
            try:
                after, apart, info = self._together(begun, leader, inputs, targets)
            except DIVERGED:
                begun[leader] = None
                continue
            if any(s is not None for s in after):
                own = tuple(count + alone for count, alone in zip(state.own_passes, apart, strict=True))
                new = BankState(tuple(after), own, state.step + 1, state.differences)
                gained = self.evidence(new) - before
                squares = (gained[:, None] - gained).square()
                new = new._replace(differences=state.differences + squares.nan_to_num(math.inf))
                learned = [sides if s is not None else None for sides, s in zip(begun, after, strict=True)]
                return new, self._averaged(info, learned, leader, before, inputs, targets)
            break
        kept = state.states[order[0]]
        assert kept is not None  # a state with no candidate is never returned
        raise DivergenceError(state.step, "no candidate of the bank is left", kept)

    def _averaged(
        self,
        info: UpdateInfo,
        begun: Sequence[PenalizedState | None],
        leader: int,
        evidence: Tensor,
        inputs: Inputs,
        targets: Tensor,
    ) -> UpdateInfo:
        """What the leader saw, with the predictions of all candidates averaged that did not diverge on this batch."""
        first = begun[leader]
        if first is None:
            return info
        weights = evidence.softmax(0)
        counts = (weights >= NEGLIGIBLE * weights.max()).tolist()
        states = {i: sides.unpenalized for i, sides in enumerate(begun) if sides is not None and counts[i]}
        start, outputs, log_probs = first.unpenalized.belief.mean, [], []
        apart = {i: not torch.equal(state.belief.mean, start) for i, state in states.items() if i != leader}
        if not any(apart.values()):
            return info
        for number, state in states.items():
            mean = state.belief.mean
            outputs.append(self.adapter.outputs(mean, inputs) if apart.get(number) else info.outputs)
            family = noise.likelihood(self.filters[number].config.noise_settings, state.noise)
            checked = family.check(outputs[-1], targets)
            log_probs.append(family.log_prob(outputs[-1], checked))
        log_weights = evidence[list(states)].log_softmax(0).to(outputs[0])
        mixed = family.mixture(torch.stack(outputs), log_weights)
        log_loss = -(torch.stack(log_probs) + log_weights[:, None]).logsumexp(0)
        return info._replace(outputs=mixed, log_loss=log_loss, correct=family.correct(mixed, checked))

    def _begun(self, kf: KalmanFilter, state: FilterState, inputs: Inputs, targets: Tensor) -> PenalizedState | None:
        try:
            return kf._start_update(state, inputs, targets)
        except DIVERGED:
            return None

    def _together(
        self, begun: list[PenalizedState | None], leader: int, inputs: Inputs, targets: Tensor
    ) -> tuple[list[FilterState | None], list[bool], UpdateInfo]:
        """All candidates after the batch, which of them took passes of their own, and what the leader saw."""
        first, ahead = begun[leader], self.filters[leader]
        assert first is not None
        learning, apart = list(begun), [False] * len(begun)

        def learn(
            batch: Measurement, sides: PenalizedState, tally: UpdateInfoBuilder
        ) -> tuple[PenalizedState, UpdatedStates]:
            moved, learned = penalized_update(ahead.config, sides, batch, tally)
            for number, kf in enumerate(self.filters):
                now = learning[number]
                if number == leader or now is None or apart[number]:
                    continue
                apart[number] = not _close(kf, now, batch)
                if not apart[number]:
                    learning[number], apart[number] = _attempt(kf, now, batch, learned.num_examples)
            return moved, learned

        led, info = ahead._update_from(first, first.unpenalized.belief.mean, inputs, targets, learn)
        after: list[FilterState | None] = [None] * len(begun)
        for number, kf in enumerate(self.filters):
            before, moved = begun[number], learning[number]
            if number == leader:
                after[number] = led
            elif apart[number] and before is not None:
                after[number] = self._alone(kf, before, inputs, targets)
            elif moved is not None and before is not None:
                after[number] = kf._finish_update(before.unpenalized, moved)
        return after, apart, info

    def _alone(self, kf: KalmanFilter, begun: PenalizedState, inputs: Inputs, targets: Tensor) -> FilterState | None:
        """A candidate after the batch by passes of its own; None where it diverged."""
        try:
            return kf._update_from(begun, begun.unpenalized.belief.mean, inputs, targets)[0]
        except DIVERGED:
            return None


def candidates(config: KalmanConfig, grid: Mapping[str, Sequence[Any]]) -> list[KalmanConfig]:
    """Every combination of the grid's values in the place of the config's own.

    Example:
        >>> [c.initial_logit_sd for c in candidates(KalmanConfig(), {"initial_logit_sd": (1.0, 3.0, 10.0)})]
        [1.0, 3.0, 10.0]
    """
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return [dataclasses.replace(config, tune=None, **settings) for settings in combinations]


def _width(state: FilterState | None) -> float:
    """Total variance of a candidate's prior."""
    return math.inf if state is None else float(state.prior.variance.double().sum())


def _close(kf: KalmanFilter, sides: PenalizedState, batch: Measurement) -> bool:
    """Whether the batch, linearized elsewhere, serves at the means of a candidate to first order."""
    for state in filter(None, (sides.unpenalized, sides.penalized)):
        if state.belief.mean is batch.point:
            continue
        shift = batch.jacobian.matvec(state.belief.mean - batch.point)
        if not is_small_change(shift, noise.likelihood(kf.config.noise_settings, state.noise), CLOSE):
            return False
    return True


def _attempt(
    kf: KalmanFilter, sides: PenalizedState, batch: Measurement, most: int
) -> tuple[PenalizedState | None, bool]:
    """A candidate after the first ``most`` examples of a piece, and whether they were too far for it to learn them all.

    None where it diverged.
    """
    try:
        moved, learned = penalized_update(kf.config, sides, batch, UpdateInfoBuilder(), most)
    except DIVERGED:
        return None, False
    return moved, learned.num_examples < most
