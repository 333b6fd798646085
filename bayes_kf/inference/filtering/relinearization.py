"""A batch learned piece by piece, and linearized again where an earlier linearization does not hold any more.

First the whole batch is linearized where it begins. Where that stops to hold (``trust``), the rest is linearized at the
mean that was reached: as many examples as the last linearization served, twice as many where it held to its end. So a
model that is linear over a batch is linearized once, and one that is far from it about once for every part that is
solved together, each example at most three times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filtering import gradient_penalty
from bayes_kf.inference.filtering.gradient_penalty import Sides
from bayes_kf.inference.filtering.measurement import Batch, Tally
from bayes_kf.inference.filtering.measurement_update import Learned
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.measurement_model import noise

Observe = Callable[[FilterState, slice, Tensor], Iterator[Batch]]
Learn = Callable[[Batch, Sides, Tally], tuple[Sides, Learned]]


class Step(NamedTuple):
    """What came of a piece.

    Attributes:
        examples: how many of its examples were learned, from the first on.
        holds: whether its linearization still holds.
        mean: θ after it, (n,).
    """

    examples: int
    holds: bool
    mean: Tensor


def learn_all(
    size: int,
    start: Tensor,
    observe: Callable[[slice, Tensor], Iterator[Batch]],
    learn: Callable[[Batch], Step],
) -> int:
    """Learn a batch of ``size``; how often its rest was linearized again.

    Args:
        size: of the batch.
        start: θ to linearize at first, (n,).
        observe: from some of its examples and θ to their pieces, linearized there.
        learn: takes in a piece. Of the first that was linearized at the mean of its last step it learns some example.
    """
    first, reach, again = 0, size, -1
    while first < size:
        begun, again, held = first, again + 1, True
        stop = min(first + reach, size)
        for batch in observe(slice(first, stop), start):
            step = learn(batch)
            first, start = first + step.examples, step.mean
            held = step.holds and step.examples == len(batch.targets)
            if not held:
                break
        reach = (first - begun) * (2 if held else 1) or reach
    return again


def learn_batch(
    config: KalmanConfig,
    sides: Sides,
    start: Tensor,
    targets: Tensor,
    observe: Observe,
    outputs: Callable[[slice], Tensor],
    learn: Learn | None = None,
) -> tuple[Sides, Tally, int]:
    """The sides after a batch, what to report, and how often its rest was linearized again.

    Args:
        config: the settings.
        sides: before it.
        start: θ to linearize at first, (n,).
        targets: of the batch.
        observe: from a state, some of the examples and θ to their pieces, linearized there.
        outputs: of some of the examples at ``start``.
        learn: from a piece, the sides and the report to the sides after it; :func:`penalty.learn` by default.
    """
    tally, size = Tally(), len(targets)

    def step(batch: Batch) -> Step:
        nonlocal sides
        if batch.start is start:
            tally.piece(batch.outputs, batch.targets, noise.likelihood(config, sides.plain.noise))
        tally.linearized(batch)
        sides, learned = learn(batch, sides, tally) if learn else gradient_penalty.learn(config, sides, batch, tally)
        return Step(learned.examples, learned.holds, sides.plain.belief.mean)

    again = learn_all(size, start, lambda where, mean: observe(sides.plain, where, mean), step)
    if tally.examples < size:  # some were never linearized where the batch began
        rest = slice(tally.examples, size)
        family, found = noise.likelihood(config, sides.plain.noise), outputs(rest)
        tally.piece(found, family.check(found, targets[rest]), family)
        tally.checked(len(found))
    return sides, tally, again
