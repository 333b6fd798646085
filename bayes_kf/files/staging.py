"""Files prepared in a hidden folder beside their final places, so that each is there whole or not at all.

A staging folder is called ``.bayes_kf-save-`` and eight random characters and holds a marker file. Its process locks it
while it lives. One that a killed process left is removed by the next save into the same folder; one that a living
process is writing, and a folder of that name without the marker, is left alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl

PREFIX = ".bayes_kf-save-"
NAME = re.compile(re.escape(PREFIX) + r"[a-z0-9_]{8}")
MARKER = "unfinished-save-of-bayes_kf"
OLD = 24 * 3600.0  # seconds after which a staging folder is abandoned where folders cannot be locked
PATIENCE = 60.0  # seconds to wait for another process's save
HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # by another process


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A new staging folder in ``folder``, which is removed in the end; what was moved out of it stays."""
    while True:
        stage = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
        with _open(stage) as handle:
            _lock(handle, wait=True)
            try:
                (stage / MARKER).touch()
            except FileNotFoundError:  # another process took it for an abandoned one before it was locked
                continue
            try:
                yield stage
            finally:
                _remove(stage)
            return


def clear_abandoned(folder: Path) -> None:
    """Remove the staging folders in ``folder`` that a killed process left."""
    for path in [entry for entry in folder.iterdir() if NAME.fullmatch(entry.name)]:
        if path.is_symlink() or not path.is_dir() or not _is_marked(path):
            continue
        with contextlib.suppress(FileNotFoundError), _open(path) as handle:
            if _abandoned(handle, path):
                _remove(path)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` against other processes' saves.

    Raises:
        OSError: when another process holds it for a minute.
    """
    with _open(folder) as handle:
        end = time.monotonic() + PATIENCE
        while _lock(handle) is False:
            if time.monotonic() > end:
                raise OSError(errno.EBUSY, "another process has been saving into it for a minute", str(folder))
            time.sleep(0.01)
        yield


def synchronize(folder: Path) -> None:
    """Put everything in ``folder`` on the disk, so that a later rename cannot come before it."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    synchronize_entries(folder)


def synchronize_entries(folder: Path) -> None:
    """Put the names in ``folder`` on the disk, where the system can."""
    with _open(folder) as handle, contextlib.suppress(OSError):
        if handle is not None:
            os.fsync(handle)


def _remove(stage: Path) -> None:
    """Remove a staging folder, its marker last: until then it is known for what it is."""
    with contextlib.suppress(OSError):
        for path in stage.iterdir():
            if path.name == MARKER:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        (stage / MARKER).unlink(missing_ok=True)
        stage.rmdir()


def _is_marked(path: Path) -> bool:
    """Whether a folder of that name is ours: killed at once, it is still empty."""
    return (path / MARKER).is_file() or not any(path.iterdir())


def _abandoned(handle: int | None, path: Path) -> bool:
    taken = _lock(handle)
    if taken is None:
        return time.time() - path.stat().st_mtime > OLD
    return taken


@contextlib.contextmanager
def _open(folder: Path) -> Iterator[int | None]:
    """A handle of a folder; None on Windows, which has none."""
    if sys.platform == "win32":
        yield None
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield handle
    finally:
        os.close(handle)


def _lock(handle: int | None, wait: bool = False) -> bool | None:
    """Whether the folder could be locked; None where folders cannot be."""
    if sys.platform == "win32" or handle is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in HELD else None
    return True
