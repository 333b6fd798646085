"""A folder put in another's place so that at every moment one of the two is there, whole."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2
UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)  # by this kernel or file system


def replace_folder(fresh: Path, folder: Path) -> None:
    """Move ``fresh`` to ``folder``; what was there is removed afterwards.

    Both must be on one file system. Where Linux can exchange two folders in one step, there is no moment without the
    one or the other, whatever kills the process; elsewhere the old one is moved aside first, and back where the move
    fails.
    """
    if not folder.exists():
        os.replace(fresh, folder)
    elif _exchanged(fresh, folder):
        shutil.rmtree(fresh, ignore_errors=True)
    else:
        _swapped(fresh, folder)


def _exchanged(first: Path, second: Path) -> bool:
    """Exchange two folders in one step; False where that cannot be done here."""
    rename = _renameat2()
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(second))


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    """The C library's function; None where it has none."""
    if sys.platform != "linux":
        return None
    try:
        found = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    found.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    found.restype = ctypes.c_int
    return found


def _swapped(fresh: Path, folder: Path) -> None:
    """Two moves; the old folder comes back where the second fails."""
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    os.replace(folder, aside)
    try:
        os.replace(fresh, folder)
    except OSError:
        os.replace(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)
