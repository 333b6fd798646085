"""Hidden staging folders, in which files are written before they are moved to their places.

The name of a staging folder is ``.bayes_kf-save-`` and eight random characters. It holds a marker file, and its process
locks it. The next save into the same folder removes the staging folders of killed processes. It leaves alone those that
a living process has locked, and folders of such a name without the marker.
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
ABANDONED_AGE = 24 * 3600.0  # seconds after which a staging folder counts as abandoned if folders cannot be locked
LOCK_TIMEOUT = 60.0  # seconds to wait for another process's save
LOCKED_ERRORS = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # another process holds the lock


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A new staging folder in ``folder``; it is removed at the end, with the files that are still in it."""
    while True:
        stage = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
        with _open(stage) as handle:
            _lock(handle, wait=True)
            try:
                (stage / MARKER).touch()
            except FileNotFoundError:  # another process removed it as abandoned before it was locked
                continue
            try:
                yield stage
            finally:
                _remove(stage)
            return


def remove_abandoned(folder: Path) -> None:
    """Remove the staging folders of killed processes from ``folder``."""
    for path in [entry for entry in folder.iterdir() if NAME.fullmatch(entry.name)]:
        if path.is_symlink() or not path.is_dir() or not _is_marked(path):
            continue
        with contextlib.suppress(FileNotFoundError), _open(path) as handle:
            if _is_abandoned(handle, path):
                _remove(path)


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Keep other processes from saving into ``folder``.

    Raises:
        OSError: if another process holds the lock for a minute.
    """
    with _open(folder) as handle:
        end = time.monotonic() + LOCK_TIMEOUT
        while _lock(handle) is False:
            if time.monotonic() > end:
                raise OSError(errno.EBUSY, "another process has been saving into it for a minute", str(folder))
            time.sleep(0.01)
        yield


def sync_files(folder: Path) -> None:
    """Write all files in ``folder`` to the disk, so that a later rename cannot reach the disk before them."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    sync_entries(folder)


def sync_entries(folder: Path) -> None:
    """Write the names in ``folder`` to the disk, if the system can."""
    with _open(folder) as handle, contextlib.suppress(OSError):
        if handle is not None:
            os.fsync(handle)


def _remove(stage: Path) -> None:
    """Remove a staging folder, its marker last, so that a process killed here leaves a folder with the marker."""
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
    """Whether a folder of that name is a staging folder; one whose process was killed at once is empty."""
    return (path / MARKER).is_file() or not any(path.iterdir())


def _is_abandoned(handle: int | None, path: Path) -> bool:
    locked = _lock(handle)
    if locked is None:
        return time.time() - path.stat().st_mtime > ABANDONED_AGE
    return locked


@contextlib.contextmanager
def _open(folder: Path) -> Iterator[int | None]:
    """A file descriptor of a folder; None on Windows, which has none."""
    if sys.platform == "win32":
        yield None
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield handle
    finally:
        os.close(handle)


def _lock(handle: int | None, wait: bool = False) -> bool | None:
    """Whether this call locked the folder; None if folders cannot be locked."""
    if sys.platform == "win32" or handle is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in LOCKED_ERRORS else None
    return True
