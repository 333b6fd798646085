"""A bank of filters with different settings, compared by the log loss of their predictions of a stream.

Every candidate predicts a batch before it is updated with it. The sum of its log losses is the negative log evidence,
−log p(data). The bank predicts with the average of the candidates, weighted by evidence. The candidates share forward
and backward passes (``shared_update``).
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

from bayes_kf.inference.config import KalmanConfig, check_config
from bayes_kf.inference.config_combinations import OBSERVED
from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import DIVERGED, DivergenceError, FilterState
from bayes_kf.inference.filtering.update_info import UpdateInfo
from bayes_kf.inference.fitting.selection import shared_update
from bayes_kf.inference.measurement_model import noise
from bayes_kf.inference.mixture.mixture_posterior import MixturePosterior
from bayes_kf.inference.posterior import Posterior
from bayes_kf.inference.predictive import predictive_distributions
from bayes_kf.inference.predictive.prediction import Prediction
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Batch, Inputs
from bayes_kf.validation import check_not_negative


class BankState(NamedTuple):
    """The state of a bank between updates; never changed in place.

    Attributes:
        states: of the candidates; None for one that diverged.
        own_passes: the number of updates in which each candidate made passes of its own.
        step: the number of updates.
        differences: Σ over updates of the squared differences of the candidates' evidence gains, (G, G), nats².
    """

    states: tuple[FilterState | None, ...]
    own_passes: tuple[int, ...]
    step: int
    differences: Tensor


class Bank:
    """Several filters over one model, and the evidence of each.

    Args:
        model: as for :class:`KalmanFilter`.
        configs: the settings of the candidates. All have the same likelihood, noise, curvature and seed, and
            "prequential" temperature.
        margin: :meth:`best` prefers a narrower prior if its evidence is lower by at most this many standard errors.

    Raises:
        ValueError: if there are no configs, they do not fit together, or the margin is negative.

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
        check_bank_configs(configs)
        self.margin = float(margin)
        self.adapter = model if isinstance(model, AdapterModel) else AdapterModel(model)
        self.filters = tuple(KalmanFilter(self.adapter, config) for config in configs)
        for kf in self.filters[1:]:
            kf.linearize = self.filters[0].linearize  # one linearization plan for all

    def init(self, inputs: Inputs | None = None) -> BankState:
        """The priors; ``inputs`` as for :meth:`KalmanFilter.init`."""
        return self.init_empty()._replace(states=tuple(kf.init(inputs) for kf in self.filters))

    def init_empty(self) -> BankState:
        """A state whose candidates are all missing, as if they had diverged; to be filled."""
        count = len(self.filters)
        return BankState((None,) * count, (0,) * count, 0, torch.zeros(count, count, dtype=torch.float64))

    def update(self, state: BankState, inputs: Inputs, targets: Tensor) -> tuple[BankState, UpdateInfo]:
        """All candidates after one more batch, and the report of the best. ``state`` is not changed.

        Outputs, log loss and correctness in the report are those of the candidates' predictions, averaged by
        :meth:`weights` before the batch. Each candidate in the average costs a forward pass.

        Raises:
            ValueError: if the inputs or targets do not fit.
            DivergenceError: if the updates of all remaining candidates diverge.
        """
        batch, begun = Batch.labelled(self.adapter.read(inputs), targets, self.adapter.device), time.perf_counter()
        with self.adapter.full_precision():
            after, info = self.filters[0].linearize.retry_in_smaller_chunks(
                lambda: self._update(state, batch), batch.size
            )
        return after, info._replace(seconds=time.perf_counter() - begun)

    def evidence(self, state: BankState, since: BankState | None = None) -> Tensor:
        """−Σ log loss of every candidate at its best temperature, (G,), in nats; −inf for one that diverged.

        It is 0 before the first update. Temperatures with an infinite log loss are left out; a candidate with no other
        gets the smallest finite number.

        Args:
            state: of the bank.
            since: an earlier state; only the updates after it count.
        """
        evidence = torch.full((len(state.states),), -math.inf, dtype=torch.float64)
        for number, now in enumerate(state.states):
            if now is None:
                continue
            total = now.temperature_scores.total
            if since is not None:
                before = since.states[number]
                assert before is not None  # a candidate that diverged does not come back
                total = (total - before.temperature_scores.total).nan_to_num(math.inf)  # if both are infinite
            evidence[number] = max(-float(total.min()), -sys.float_info.max)
        return evidence

    def weights(self, state: BankState) -> Tensor:
        """Posterior probability of every candidate under equal prior probabilities, (G,): softmax of the evidence."""
        return self.evidence(state).softmax(0)

    def best(self, state: BankState, since: BankState | None = None) -> int:
        """The number of the candidate with the largest evidence; the first among equals.

        With a ``margin``: of the candidates whose evidence is lower than the largest by at most ``margin`` standard
        errors of the difference, paired by update, the one with the narrowest prior. The first examples of a stream
        hardly distinguish prior widths; too wide a prior overfits, too narrow a one only converges slowly. Ours.

        Args:
            state: of the bank.
            since: an earlier state; only the updates after it count.
        """
        evidence = self.evidence(state, since)
        top = int(evidence.argmax())
        if self.margin == 0.0 or not math.isfinite(float(evidence[top])):
            return top
        deficit = evidence[top] - evidence
        error = torch.full_like(deficit, math.inf)
        steps = state.step - (since.step if since else 0)
        if steps > 1:
            squares = state.differences[top] - (since.differences[top] if since else 0.0) - deficit.square() / steps
            error = (squares.clamp_min(0.0) * steps / (steps - 1)).sqrt()
        finite = torch.isfinite(deficit).nonzero()[:, 0].tolist()
        near = [top, *(i for i in finite if deficit[i] <= self.margin * error[i])]
        return min(near, key=lambda i: (_prior_width(state.states[i]), -float(evidence[i]), i))

    def posterior(self, state: BankState, number: int | None = None) -> Posterior:
        """The posterior of one candidate, by default of the best.

        Raises:
            ValueError: if the candidate diverged, or there is none of this number.
        """
        number = self.best(state) if number is None else number
        chosen = state.states[number] if 0 <= number < len(state.states) else None
        if chosen is None:
            raise ValueError(f"`number` must be that of a candidate that did not diverge, got {number}.")
        return Posterior(self.filters[number], chosen)

    def mixture(self, state: BankState) -> MixturePosterior:
        """All candidates that did not diverge as a mixture, with :meth:`weights`.

        The weights are the candidates' posterior probabilities under equal prior ones. On a long stream one of them has
        nearly all of the weight.
        """
        weights = self.weights(state)
        numbers = [number for number, one in enumerate(state.states) if one is not None]
        members = tuple(self.posterior(state, number) for number in numbers)
        positive = weights[numbers].clamp_min(torch.finfo(torch.float64).tiny)
        return MixturePosterior(members, tuple((positive / positive.sum()).tolist()))

    def predict(self, state: BankState, inputs: Inputs, targets: Tensor | None = None, **settings: Any) -> Prediction:
        """The candidates' predictions, averaged by :meth:`weights` (Bayesian model averaging).

        Args:
            state: of the bank.
            inputs: as for :meth:`Posterior.predict`.
            targets: as for :meth:`Posterior.predict`.
            **settings: ``method``, ``num_samples`` and ``generator`` of :meth:`Posterior.predict`.
        """
        weights = self.weights(state)
        weights = torch.where(weights >= shared_update.MIN_RELATIVE_WEIGHT * weights.max(), weights, 0.0)
        numbers = [number for number, weight in enumerate(weights.tolist()) if weight > 0.0]
        predictions = [self.posterior(state, n).predict(inputs, targets=targets, **settings) for n in numbers]
        best = state.states[self.best(state)]
        assert best is not None  # its weight is the largest
        family = noise.likelihood(self.filters[0].config.noise_settings, best.noise)
        shares = (weights[numbers] / weights[numbers].sum()).tolist()
        return predictive_distributions.average(family, predictions, shares)

    def _update(self, state: BankState, batch: Batch) -> tuple[BankState, UpdateInfo]:
        """All candidates after a batch; if the best diverges, the next best leads."""
        started = shared_update.start_updates(self.filters, state.states, batch)
        before, best = self.evidence(state), self.best(state)
        order = before.argsort(descending=True, stable=True).tolist()
        order.sort(key=lambda number: number != best)  # the best first
        for leader in order:
            if started[leader] is None:
                continue
            try:
                updates = shared_update.update_candidates(self.filters, started, leader, batch)
            except DIVERGED:
                started[leader] = None
                continue
            if any(after is not None for after in updates.states):
                new = self._count_update(state, before, updates)
                sides = [s if after is not None else None for s, after in zip(started, updates.states, strict=True)]
                average = shared_update.average_predictions
                return new, average(self.filters, sides, leader, before, updates.info, batch)
            break
        last = state.states[order[0]]
        assert last is not None  # a state without candidates is never returned
        raise DivergenceError(state.step, "all candidates of the bank diverged", last)

    def _count_update(self, state: BankState, before: Tensor, updates: shared_update.CandidateUpdates) -> BankState:
        """The bank's state after the updates; ``before`` is the evidence before them, (G,)."""
        own = tuple(n + made for n, made in zip(state.own_passes, updates.made_own_passes, strict=True))
        new = BankState(tuple(updates.states), own, state.step + 1, state.differences)
        gains = self.evidence(new) - before
        squares = (gains[:, None] - gains).square()
        return new._replace(differences=state.differences + squares.nan_to_num(math.inf))


def candidates(config: KalmanConfig, grid: Mapping[str, Sequence[Any]]) -> list[KalmanConfig]:
    """The config with every combination of the grid's values.

    Example:
        >>> [c.initial_logit_sd for c in candidates(KalmanConfig(), {"initial_logit_sd": (1.0, 3.0, 10.0)})]
        [1.0, 3.0, 10.0]
    """
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return [dataclasses.replace(config, tune=None, **settings) for settings in combinations]


def check_bank_configs(configs: Sequence[KalmanConfig], name: str = "configs") -> None:
    """Raise ValueError if the configs cannot be the candidates of one bank; it calls them ``name``."""
    if not configs:
        raise ValueError(f"`{name}` must hold at least one KalmanConfig, got none.")
    for config in configs:
        check_config(config, name)
    for setting in OBSERVED:
        values = {getattr(config, setting) for config in configs}
        if len(values) > 1:
            raise ValueError(f"`{name}` must have the same `{setting}`, got {', '.join(sorted(map(repr, values)))}.")
    for config in configs:
        if config.temperature != "prequential":
            raise ValueError(f"`{name}` must have `temperature` 'prequential', got {config.temperature!r}.")


def _prior_width(state: FilterState | None) -> float:
    """Total prior variance of a candidate."""
    return math.inf if state is None else float(state.prior.variance.double().sum())
