"""Work on a batch that several processes share: each has some of its examples, and gets the results of all.

Every process runs the same program on the same data. Where a model is run on a batch, each process takes its share of
the examples, and the rows of all come together in each; a gradient is summed. So all the rest (the update of a belief,
choices, random draws) is the same everywhere, and equals that of one process to rounding.

An error on one process is raised on all of them, before the next collective would wait for ever.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bayes_kf.processes.process_group import Group

T = TypeVar("T")

MOST_ELEMENTS = 4096  # of a parameter that are compared
READ_WHOLE = "the whole loader belongs in every process, which takes a part of each batch"

_present: ContextVar[Group | None] = ContextVar("processes that share the work", default=None)


@contextmanager
def shared(group: Group | None) -> Iterator[None]:
    """Inside, the processes of a group share the work on every batch; with None each does all of it."""
    token = _present.set(group)
    try:
        yield
    finally:
        _present.reset(token)


def present_group() -> Group | None:
    """The processes that share the work here; None if this one does all of it."""
    return _present.get()


def is_first() -> bool:
    """Whether this process writes files and shows progress."""
    group = _present.get()
    return group is None or group.rank == 0


class Share:
    """The examples of a batch that this process has.

    Args:
        group: the processes.
        size: the number of examples of the batch, B.

    Attributes:
        where: this process's examples. One that all others have too, if there are fewer examples than processes.
        sizes: the number of examples of every process.
    """

    def __init__(self, group: Group, size: int) -> None:
        least, more = divmod(size, group.size)
        self._group = group
        self.sizes = [least + (rank < more) for rank in range(group.size)]
        start = sum(self.sizes[: group.rank])
        self.where = slice(start, start + self.sizes[group.rank]) if self.sizes[group.rank] else slice(0, 1)

    @property
    def is_empty(self) -> bool:
        """Whether the examples of ``where`` are those of another process."""
        return self.sizes[self._group.rank] == 0

    def gathered(self, rows: Tensor) -> Tensor:
        """The rows of all examples, (B, ...), from those of ``where``.

        Raises:
            RuntimeError: in this process, if the model has not one row for each of them.
        """
        if len(rows) != max(1, self.sizes[self._group.rank]):
            raise RuntimeError(f"`model` must give a row for each example, got {len(rows)} of {self.sizes}.")
        return self._group.all_gather_rows(rows[: self.sizes[self._group.rank]], self.sizes)


def share_of(size: int) -> Share | None:
    """This process's share of a batch; None if it does all of the work, or there is none to share."""
    group = _present.get()
    return None if group is None or size < 2 else Share(group, size)


def done_everywhere(call: Callable[[], T], *, is_share: bool = False) -> T:
    """The result of ``call`` in this process, once it has succeeded in all of them.

    Args:
        call: what this process does.
        is_share: whether every process does its part of the same work, so that all should take the same time.

    Raises:
        Exception: the error of this process.
        OtherProcessError: if only other processes have one.
    """
    group = _present.get()
    if group is None:
        return call()
    failure, result, begun = None, None, time.perf_counter()
    try:
        result = call()
    except Exception as raised:  # of any kind, or the other processes would wait for this one
        failure = raised
    group.seconds_worked += (time.perf_counter() - begun) if is_share else 0.0
    group.raise_together(failure)
    return result  # type: ignore[return-value]  # it is there if nothing was raised


def all_reduced(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    group = _present.get()
    return tensor if group is None else group.all_reduce(tensor)


def is_equal_everywhere(value: Any) -> bool:
    """Whether a value has the same ``repr`` in all processes."""
    group = _present.get()
    return group is None or group.is_equal(value)


def union(names: Iterable[str]) -> list[str]:
    """The names that any process gives, sorted."""
    group = _present.get()
    return sorted(set(names)) if group is None else group.union(names)


def check_same_batch(*parts: Any) -> None:
    """Check that every process has the same batch.

    Args:
        parts: inputs, targets, and what else must be the same.

    Raises:
        RuntimeError: in every process, if they differ.
    """
    group = _present.get()
    if group is not None:
        group.check_equal(f"the batches of `loader` ({READ_WHOLE})", _fingerprint(parts))


def same_batches(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, each once every process has got it.

    Raises:
        RuntimeError: if another process has another batch, or none.
        OtherProcessError: if the loader of another process raises an error.
    """
    group = _present.get()
    return iter(batches) if group is None else _same_batches(batches)


def _same_batches(batches: Iterable[Any]) -> Iterator[Any]:
    iterator = done_everywhere(lambda: iter(batches))
    while True:
        batch = done_everywhere(lambda: next(iterator, None))
        check_same_batch(batch)
        if batch is None:
            return
        yield batch


def _fingerprint(batch: Any) -> Any:
    """Shapes and contents of all tensors of a batch."""
    if isinstance(batch, Tensor):
        return tuple(batch.shape), str(batch.dtype), _digest(batch)
    if isinstance(batch, Mapping):
        return {name: _fingerprint(value) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [_fingerprint(value) for value in batch]
    return type(batch).__name__


def _digest(tensor: Tensor, most: int | None = None) -> str:
    """A hash of a tensor's elements, or of ``most`` of them, evenly spaced; of one that holds none, the empty text."""
    if tensor.is_meta or tensor.layout != torch.strided or hasattr(tensor, "to_local"):
        return ""
    flat = tensor.detach().reshape(-1)
    if most is not None:
        flat = flat[:: max(1, -(-len(flat) // most))]
    return hashlib.blake2b(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()


def check_same(name: str, value: Any) -> None:
    """Check that a value has the same ``repr`` in every process.

    Raises:
        RuntimeError: in every process, if it differs.
    """
    group = _present.get()
    if group is not None:
        group.check_equal(name, value)


def check_same_model(model: nn.Module, settings: Any) -> None:
    """Check that every process has the same model and settings.

    Args:
        model: every parameter and buffer counts, by some thousand elements; those that are divided among the processes
            or on another device than memory, by their shapes.
        settings: anything whose ``repr`` must be the same.

    Raises:
        RuntimeError: in every process, if they differ.
    """
    group = _present.get()
    if group is None:
        return
    group.check_equal("the arguments of `fit`", settings)
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    found = [(name, t.requires_grad, tuple(t.shape), str(t.dtype), _digest(t, MOST_ELEMENTS)) for name, t in tensors]
    group.check_equal("`model` (seed torch before it is made, or load it)", found)


def numbers_of_first(numbers: Sequence[int]) -> list[int]:
    """The whole numbers of the first process, on which all have to agree."""
    group = _present.get()
    return list(numbers) if group is None else group.numbers_of_first(numbers)
