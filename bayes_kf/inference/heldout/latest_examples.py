"""Size and sharpness of a stream's posterior, chosen by its latest examples.

A stream has no held-out examples. But the belief from before its latest ones has not learned them, and their joint
likelihood under that belief chooses a size (:mod:`.covariance_size`), as held-out examples do. So the stream keeps its
latest 64 to 128 examples and a belief from before them: two windows of ``WINDOW`` examples at most, the older of which
is dropped when the newer is full. Ours.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.heldout import calibration
from bayes_kf.inference.heldout.covariance_size import with_size
from bayes_kf.inference.predictive.gaussian_posterior import GaussianPosterior
from bayes_kf.models.batch import Inputs

WINDOW = 64  # examples
FEWEST = 50  # examples, below which a joint likelihood says little about the size of a covariance

P = TypeVar("P", bound=GaussianPosterior)


class LatestExamples(NamedTuple):
    """The latest examples of a stream.

    Attributes:
        before: the state before all of them.
        between: the state after the older window; None while there is only one.
        older: batches ``(inputs, targets)``.
        newer: batches since ``between``.
    """

    before: FilterState
    between: FilterState | None = None
    older: tuple[tuple[Inputs, Tensor], ...] = ()
    newer: tuple[tuple[Inputs, Tensor], ...] = ()

    @property
    def batches(self) -> list[tuple[Inputs, Tensor]]:
        """All of them."""
        return [*self.older, *self.newer]


def add(latest: LatestExamples, inputs: Inputs, targets: Tensor, after: FilterState) -> LatestExamples:
    """The latest examples with one more batch; ``after`` is the state that has learned it."""
    if latest.between is None:
        older = (*latest.older, (inputs, targets))
        return latest._replace(older=older, between=after if _count(older) >= WINDOW else None)
    newer = (*latest.newer, (inputs, targets))
    if _count(newer) < WINDOW:
        return latest._replace(newer=newer)
    return LatestExamples(latest.between, after, newer)


def init(state: FilterState) -> LatestExamples:
    """No examples yet, after a state whose prior has its scale (``KalmanFilter.init`` with inputs)."""
    return LatestExamples(state)


def calibrate(posterior: P, latest: LatestExamples, *, stacklevel: int = 3) -> P:
    """The posterior of a stream with the size and the sharpness that its latest examples choose.

    They are chosen for the belief before these examples. With fewer than ``FEWEST`` examples the posterior is returned
    as it is.

    Args:
        posterior: after all examples.
        latest: the latest ones.
        stacklevel: of warnings about values at an end of what was tried.
    """
    if _count(latest.batches) < FEWEST:
        return posterior
    before = replace(posterior, state=latest.before, history={})
    chosen = calibration.calibrate([before], [1.0], latest.batches, stacklevel=stacklevel + 1)[0]
    sized = with_size(posterior, float(chosen.history["size"][0]))
    sharp = sized.with_settings(softmax_temperature=chosen.softmax_temperature)
    return replace(sharp, history=posterior.history | chosen.history)


def _count(batches: Any) -> int:
    return sum(len(targets) for _, targets in batches)
