"""Functions that run in a new process, and memory in use (Linux)."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

MIB = 2**20


def run_in_process(
    work: Callable[..., dict[str, Any]], *arguments: Any, threads: int = 1, exact_memory: bool = False
) -> dict[str, Any] | int:
    """The value of a function in a new process, or the exit code of the process if it ended early.

    The process is forked from a server that has imported the function's module and done nothing else.

    Args:
        work: the function, importable by name.
        *arguments: of ``work``.
        threads: of torch in the new process.
        exact_memory: whether freed memory returns to the system at once, so that peaks are exact; large temporaries are
            then slow.
    """
    if exact_memory:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # read at the server's start
    paths, here = os.environ.get("PYTHONPATH", "").split(os.pathsep), str(Path(__file__).parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([here, *filter(None, paths)]))
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([work.__module__])
    receiver, sender = forks.Pipe(duplex=False)
    child = forks.Process(target=_report, args=(sender, work, threads, arguments))
    child.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        child.join()
        assert child.exitcode is not None  # it has ended
        return child.exitcode
    child.join()
    return result


def alarmed(code: int) -> bool:
    """Whether a process ended by SIGALRM, because it took too long."""
    return code == -signal.SIGALRM


def _report(sender: Connection, work: Callable[..., dict[str, Any]], threads: int, arguments: tuple[Any, ...]) -> None:
    """Send the result and exit at once, because some peers raise errors when the interpreter ends."""
    torch.set_num_threads(threads)
    result = work(*arguments)
    sender.send(result)
    sender.close()
    os._exit(0)


def held(device: torch.device, reset: bool = False) -> int:
    """Bytes in use after garbage collection; ``reset`` restarts the peak here."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark falls to the present
    return status("VmRSS")


def peak(device: torch.device) -> int:
    """Peak bytes in use since the last call of :func:`held` with ``reset``."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status("VmHWM")


def status(field: str) -> int:
    """A field of this process's status, in bytes."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.partition(f"{field}:")[2].split()[0]) * 1024
