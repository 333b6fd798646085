"""One update of several filters over the same model that share forward and backward passes where they can.

The model is linearized at the mean of one candidate, the leader, and again where its outputs leave that linearization.
Another candidate uses the leader's linearization if its mean changes no output by ``MAX_OUTPUT_SHIFT`` or more, to
first order, and its own outputs do not leave the linearization earlier. Otherwise it makes passes of its own. Ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.inference.filtering.gradient_penalty import PenalizedState, penalized_update
from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.linearization_check import is_small_change
from bayes_kf.inference.filtering.measurement import Measurement
from bayes_kf.inference.filtering.measurement_update import UpdatedStates
from bayes_kf.inference.filtering.state import DIVERGED, FilterState
from bayes_kf.inference.filtering.update_info import UpdateInfo, UpdateInfoBuilder
from bayes_kf.inference.measurement_model import noise
from bayes_kf.models.batch import Batch

MAX_OUTPUT_SHIFT = 0.2  # logits, or sds of Gaussian noise; at 1 the error of the evidence decided between candidates
MIN_RELATIVE_WEIGHT = 1e-3  # candidates with a smaller weight, relative to the largest, are left out of averages


class CandidateUpdates(NamedTuple):
    """The update of all candidates with one batch.

    Attributes:
        states: after it; None for a candidate that diverged.
        made_own_passes: whether each candidate made passes of its own.
        info: the report of the leader.
    """

    states: list[FilterState | None]
    made_own_passes: list[bool]
    info: UpdateInfo


def start_updates(
    filters: Sequence[KalmanFilter], states: Sequence[FilterState | None], batch: Batch
) -> list[PenalizedState | None]:
    """The state of every candidate after the dynamics, before the batch; None for one that diverged."""
    started: list[PenalizedState | None] = []
    for kf, state in zip(filters, states, strict=True):
        try:
            started.append(None if state is None else kf._start_update(state, batch))
        except DIVERGED:
            started.append(None)
    return started


def update_candidates(
    filters: Sequence[KalmanFilter],
    started: Sequence[PenalizedState | None],
    leader: int,
    batch: Batch,
) -> CandidateUpdates:
    """All candidates after the batch.

    Raises:
        FloatingPointError, LinAlgError: if the update of the leader diverges.
    """
    leading, first = filters[leader], started[leader]
    assert first is not None
    current, alone = list(started), [False] * len(started)

    def update_all(
        measurement: Measurement, state: PenalizedState, builder: UpdateInfoBuilder
    ) -> tuple[PenalizedState, UpdatedStates]:
        moved, updated = penalized_update(leading.config, state, measurement, builder)
        for number, kf in enumerate(filters):
            candidate = current[number]
            if number == leader or candidate is None or alone[number]:
                continue
            alone[number] = not _fits_linearization(kf, candidate, measurement)
            if not alone[number]:
                current[number], alone[number] = _update_shared(kf, candidate, measurement, updated.num_examples)
        return moved, updated

    led, info = leading._update_from(first, first.unpenalized.belief.mean, batch, update_all)
    after: list[FilterState | None] = [None] * len(started)
    for number, kf in enumerate(filters):
        before, moved = started[number], current[number]
        if number == leader:
            after[number] = led
        elif alone[number] and before is not None:
            after[number] = _update_alone(kf, before, batch)
        elif moved is not None and before is not None:
            after[number] = kf._finish_update(before.unpenalized, moved)
    return CandidateUpdates(after, alone, info)


def average_predictions(
    filters: Sequence[KalmanFilter],
    started: Sequence[PenalizedState | None],
    leader: int,
    evidence: Tensor,
    info: UpdateInfo,
    batch: Batch,
) -> UpdateInfo:
    """The leader's report with the predictions of all candidates, averaged by their evidence before the batch.

    It costs a forward pass for each candidate whose mean differs from the leader's.

    Args:
        filters: the candidates.
        started: their states before the batch; None for one that diverged in it.
        leader: the number of the leader.
        evidence: of all candidates before the batch, (G,).
        info: the leader's report.
        batch: with targets.
    """
    first = started[leader]
    if first is None:
        return info
    weights = evidence.softmax(0)
    counts = (weights >= MIN_RELATIVE_WEIGHT * weights.max()).tolist()
    states = {i: s.unpenalized for i, s in enumerate(started) if s is not None and counts[i]}
    start, outputs, log_probs = first.unpenalized.belief.mean, [], []
    differs = {i: not torch.equal(state.belief.mean, start) for i, state in states.items() if i != leader}
    if not any(differs.values()):
        return info
    for number, state in states.items():
        kf, mean = filters[number], state.belief.mean
        outputs.append(kf.adapter.outputs(mean, batch.inputs) if differs.get(number) else info.outputs)
        family = noise.likelihood(kf.config.noise_settings, state.noise)
        checked = family.check(outputs[-1], batch.required_targets)
        log_probs.append(family.log_prob(outputs[-1], checked))
    log_weights = evidence[list(states)].log_softmax(0).to(outputs[0])
    mixed = family.mixture(torch.stack(outputs), log_weights)
    log_loss = -(torch.stack(log_probs) + log_weights[:, None]).logsumexp(0)
    return info._replace(outputs=mixed, log_loss=log_loss, correct=family.correct(mixed, checked))


def _fits_linearization(kf: KalmanFilter, candidate: PenalizedState, measurement: Measurement) -> bool:
    """Whether a candidate can use the leader's linearization: to first order, its outputs are close to the leader's."""
    for state in filter(None, (candidate.unpenalized, candidate.penalized)):
        if state.belief.mean is measurement.point:
            continue
        shift = measurement.jacobian.matvec(state.belief.mean - measurement.point)
        family = noise.likelihood(kf.config.noise_settings, state.noise)
        if not is_small_change(shift, family, measurement.outputs, MAX_OUTPUT_SHIFT):
            return False
    return True


def _update_shared(
    kf: KalmanFilter, candidate: PenalizedState, measurement: Measurement, examples: int
) -> tuple[PenalizedState | None, bool]:
    """A candidate after the first ``examples`` of the leader's linearization, and whether that holds for fewer of them.

    The first is None if the candidate diverged.
    """
    try:
        moved, updated = penalized_update(kf.config, candidate, measurement, UpdateInfoBuilder(), examples)
    except DIVERGED:
        return None, False
    return moved, updated.num_examples < examples


def _update_alone(kf: KalmanFilter, started: PenalizedState, batch: Batch) -> FilterState | None:
    """A candidate after the batch, by passes of its own; None if it diverged."""
    try:
        return kf._update_from(started, started.unpenalized.belief.mean, batch)[0]
    except DIVERGED:
        return None
