"""Snapshots of folders, and processes that are killed at a chosen change to the file system."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")
Tree = dict[str, Any]


def snapshot(folder: Path) -> Tree:
    """Every file and link below ``folder``: name -> (mode, content) of a file, or the target of a link."""
    tree: Tree = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            tree[name] = str(path.readlink())
        elif path.is_file():
            tree[name] = (path.stat().st_mode, path.read_bytes())
    return tree


def killed_at(change: int, work: Callable[[], object]) -> bool:
    """Whether a fork of this process that runs ``work`` was killed at its ``change``-th change to the file system."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of forks while threads exist; none is active here
        child = os.fork()
    if child == 0:
        left = [change]

        def hook(event: str, args: tuple[Any, ...]) -> None:
            writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
            if event in CHANGES or writes:
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)

        status = 1
        try:
            torch.set_num_threads(1)
            warnings.simplefilter("ignore")
            sys.addaudithook(hook)
            work()
            status = 0
        except (ValueError, OSError):
            status = 0  # refused
        finally:
            os._exit(status)  # without exit handlers
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, 9):
        raise AssertionError(f"the process ended with {status}")
    return status == 9
