"""The processes that ``torchrun`` or ``accelerate launch`` has started, found without a word from the user."""

from __future__ import annotations

import atexit
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch.distributed as dist

from bayes_kf.processes import shared_work
from bayes_kf.processes.process_group import Group, others_answer

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # environment variables that a launcher sets

SLOW_RATIO, SLOW_SECONDS = 1.5, 5.0  # a process above both, beside the others' mean, is reported

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
        with others_answer():
            _initialize()
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

    Warns:
        UserWarning: if the others waited long for one process.
    """
    if shared_work.present_group() is not None or (group := launched_group()) is None:
        yield False
        return
    group.check_equal("the function that shares its work between processes", call)
    with shared_work.shared(group):
        yield True
    slowest, longest, others = group.slowest()
    if group.rank == 0 and longest > SLOW_RATIO * others and longest > others + SLOW_SECONDS:
        warnings.warn(
            f"process {slowest} worked {longest:.0f} seconds on its share of `{call}`, the others {others:.0f}: they "
            "waited for it; is its device slower, or shared?",
            stacklevel=4,
        )


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


def _initialize() -> None:
    """Initialize torch.distributed.

    Processes that ``torchrun --max-restarts`` starts again find what those before them wrote into its store, and may
    wait for these (pytorch issue 135712). So each start on one machine gets keys of its own. On several machines the
    numbers of restarts can differ, and the user has to switch the shared store off.
    """
    restarts, agents_store = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), "TORCHELASTIC_USE_AGENT_STORE"
    if restarts == "0" or os.environ.get(agents_store) != "True" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        dist.init_process_group()
        return
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(store=dist.PrefixStore(f"restart-{restarts}", store), rank=rank, world_size=size)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
