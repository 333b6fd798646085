"""The processes that ``torchrun`` or ``accelerate launch`` has started, found without a word from the user."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch.distributed as dist

from bayes_kf.processes import shared_work
from bayes_kf.processes.process_group import Group

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # environment variables that a launcher sets

_is_alone: ContextVar[bool] = ContextVar("whether this process works alone", default=False)


def launched_group() -> Group | None:
    """All processes of this run; None if there is one, or inside :func:`alone`.

    Under a launcher that has set the environment, torch.distributed is initialized if it is not yet.
    """
    if _is_alone.get() or not dist.is_available():
        return None
    if not dist.is_initialized():
        if any(name not in os.environ for name in LAUNCHED) or os.environ["WORLD_SIZE"] == "1":
            return None
        dist.init_process_group()
        atexit.register(_leave)
    group = Group()
    return group if group.size > 1 else None


@contextmanager
def working_together(call: str) -> Iterator[bool]:
    """Inside, the processes of this run share the work. Yields True for the outermost call.

    Args:
        call: the name of the function, which every process must call.

    Raises:
        RuntimeError: if another process has called another one.
    """
    if shared_work.present_group() is not None or (group := launched_group()) is None:
        yield False
        return
    group.check_equal("the function that shares its work between processes", call)
    with shared_work.shared(group):
        yield True


@contextmanager
def together() -> Iterator[None]:
    """Inside, the processes of this run share the work on every batch: for loops of your own.

    All of them make the same updates and predictions. If batches or means differ, an update raises an error in all.
    """
    with working_together("together"):
        yield


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works alone, also under a launcher: for a fit of its own in each process."""
    token = _is_alone.set(True)
    try:
        with shared_work.shared(None):
            yield
    finally:
        _is_alone.reset(token)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
