"""The loop over a data loader: every pass, selection and sum over a data set runs in it.

The loop checks each batch once, updates a state with it, calls the callbacks, and moves the progress bar. An error
names the batch in which it occurs. The callbacks do the rest: they record scores, sum residuals and write checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

from bayes_kf.inference.filtering.state import DivergenceError
from bayes_kf.inference.fitting.progress import ProgressBar
from bayes_kf.models.batch import Inputs, split_batch
from bayes_kf.processes import shared_work

S = TypeVar("S")  # the state: of a filter or a bank, or a sum
I = TypeVar("I")  # noqa: E741 - the report of an update


class LoopStep(NamedTuple, Generic[S, I]):
    """One step of a loop, as callbacks get it.

    Attributes:
        number: the index of the batch in the loader.
        before: the state before the batch.
        state: the state after it.
        targets: the targets of the batch.
        info: the report of the update.
    """

    number: int
    before: S
    state: S
    targets: Tensor
    info: I


Callback = Callable[[LoopStep[S, I]], object]


def run_loop(
    batches: Iterable[Any],
    state: S,
    update: Callable[[S, Any, Any], tuple[S, I]],
    callbacks: Sequence[Callback[S, I]] = (),
    progress: ProgressBar | None = None,
    summary: Callable[[], str] = str,
    split: Callable[[Any, int], tuple[Any, Any]] | None = None,
) -> S:
    """The state after an update with every batch.

    Args:
        batches: a data loader, or some of its batches.
        state: before the first batch.
        update: from a state, the inputs and the targets of a batch to the state after it and a report.
        callbacks: called in turn after every update.
        progress: advanced after every update; it also numbers the batches. None: no progress bar.
        summary: returns the text beside the progress bar, called after the callbacks.
        split: from a batch and its number to inputs and targets; by default :func:`inputs_and_targets`.

    Raises:
        ValueError: if a batch has no targets or does not fit; the message ends with the number of the batch.
    """
    progress, split = progress or ProgressBar(), split or inputs_and_targets
    for batch in shared_work.same_batches(batches):
        inputs, targets = split(batch, progress.done)
        with batch_in_errors(progress.done):
            after, info = update(state, inputs, targets)
        for callback in callbacks:
            callback(LoopStep(progress.done, state, after, targets, info))
        state = after
        progress.advance(summary())
    return state


def every_updates(count: int, action: Callable[[S], object]) -> Callback[S, Any]:
    """A callback that runs ``action`` on the state after every ``count`` updates."""

    def callback(step: LoopStep[S, Any]) -> None:
        if (step.number + 1) % count == 0:
            action(step.state)

    return callback


def inputs_and_targets(batch: Any, number: int) -> tuple[Inputs, Tensor]:
    """The inputs and targets of a batch.

    Raises:
        ValueError: if the batch has no targets, or is not a batch.
    """
    inputs, targets = split_batch(batch)
    if targets is None:
        is_text = isinstance(inputs, Mapping) and "input_ids" in inputs
        hint = "; `PreferencePairs(model)` takes pairs without labels" if is_text else ""
        raise ValueError(f"`loader` must yield targets with every batch, got none in batch {number}{hint}.")
    return inputs, targets


@contextmanager
def batch_in_errors(number: int) -> Iterator[None]:
    """Add the number of the batch to errors that are raised inside."""
    try:
        yield
    except DivergenceError:
        raise
    except ValueError as error:
        raise ValueError(f"{error} (batch {number} of `loader`)") from error
    except RuntimeError as error:  # raised by the model
        error.add_note(f"in batch {number} of `loader`")
        raise
