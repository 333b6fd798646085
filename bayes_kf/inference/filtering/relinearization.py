"""The update from a batch in chunks, with a new linearization whenever the last one is no longer accurate.

The whole batch is linearized once, at the mean before it. If that linearization becomes inaccurate, the rest is
linearized at the present mean: as many examples as the last linearization served, twice as many if it was accurate to
its end. A model that is linear over a batch is linearized once. A model that is far from linear is linearized about
once per block, and each example at most three times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filtering.gradient_penalty import PenalizedState, penalized_update
from bayes_kf.inference.filtering.measurement import Measurement
from bayes_kf.inference.filtering.measurement_update import UpdatedStates
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.filtering.update_info import UpdateInfoBuilder
from bayes_kf.inference.measurement_model import noise

Measure = Callable[[FilterState, slice, Tensor], Iterator[Measurement]]
"""From a state, some of the examples and θ to their chunks, linearized there."""

Update = Callable[[Measurement, PenalizedState, UpdateInfoBuilder], tuple[PenalizedState, UpdatedStates]]
"""From a chunk, the state and the report to the state after the chunk."""


class ChunkResult(NamedTuple):
    """The result of one chunk.

    Attributes:
        num_examples: examples used, from the first on.
        accurate: whether the linearization is still accurate.
        mean: θ after it, (n,).
    """

    num_examples: int
    accurate: bool
    mean: Tensor


def update_in_chunks(
    size: int,
    point: Tensor,
    measure: Callable[[slice, Tensor], Iterator[Measurement]],
    update: Callable[[Measurement], ChunkResult],
) -> int:
    """Update with a batch of ``size`` examples; returns how often its rest was linearized again.

    Args:
        size: of the batch.
        point: θ of the first linearization, (n,).
        measure: from some of its examples and θ to their chunks, linearized there.
        update: uses a chunk. It uses some example of the first chunk that is linearized at the mean of its last step.
    """
    first, reach, relinearized = 0, size, -1
    while first < size:
        start, accurate = first, True
        relinearized += 1
        stop = min(first + reach, size)
        for measurement in measure(slice(first, stop), point):
            result = update(measurement)
            first, point = first + result.num_examples, result.mean
            accurate = result.accurate and result.num_examples == len(measurement.targets)
            if not accurate:
                break
        reach = (first - start) * (2 if accurate else 1) or reach
    return relinearized


def update_from_batch(
    config: KalmanConfig,
    state: PenalizedState,
    point: Tensor,
    targets: Tensor,
    measure: Measure,
    outputs_at_point: Callable[[slice], Tensor],
    update: Update | None = None,
) -> tuple[PenalizedState, UpdateInfoBuilder, int]:
    """The state after a batch, its report, and how often its rest was linearized again.

    Args:
        config: the settings.
        state: before the batch.
        point: θ of the first linearization, (n,).
        targets: of the batch.
        measure: linearizes some of the examples.
        outputs_at_point: of some of the examples at ``point``.
        update: uses a chunk; :func:`~bayes_kf.inference.filtering.gradient_penalty.penalized_update` by default.
    """
    builder, size = UpdateInfoBuilder(), len(targets)

    def use(measurement: Measurement) -> ChunkResult:
        nonlocal state
        if measurement.point is point:
            family = noise.likelihood(config.noise_settings, state.unpenalized.noise)
            builder.add_outputs(measurement.outputs, measurement.targets, family)
        builder.add_linearization(len(measurement.targets), measurement.projected.lumped)
        if update is None:
            state, updated = penalized_update(config, state, measurement, builder)
        else:
            state, updated = update(measurement, state, builder)
        return ChunkResult(updated.num_examples, updated.accurate, state.unpenalized.belief.mean)

    relinearized = update_in_chunks(size, point, lambda where, at: measure(state.unpenalized, where, at), use)
    if builder.num_examples < size:  # some examples were never linearized at the first point
        rest = slice(builder.num_examples, size)
        family, outputs = noise.likelihood(config.noise_settings, state.unpenalized.noise), outputs_at_point(rest)
        builder.add_outputs(outputs, family.check(outputs, targets[rest]), family)
        builder.add_check(len(outputs))
    return state, builder, relinearized
