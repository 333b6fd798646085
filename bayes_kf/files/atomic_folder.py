"""Several files written into a folder as one, among files of other people.

A save never removes or changes a file that the package did not write. Ours are the files that a file of checksums
lists and whose content still is what it says; the save refuses to take any other file's place.

1. All new files are written into a hidden staging folder inside the folder (:mod:`bayes_kf.files.staging`).
2. Files in the way are looked at. Where one is not ours, the save ends with a ValueError, and nothing has changed.
3. The staging folder, with a plan of what is to be replaced and removed, is renamed to ``.bayes_kf-commit``. From this
   one step on the save counts: readers take a file from there if it is there.
4. Its files are renamed to their places one by one, old files of ours that are not needed any more are removed, and
   ``.bayes_kf-commit`` goes. If the process is killed before that, the next save or start completes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from bayes_kf.files.checksums import SUMS_FILE
from bayes_kf.files.ownership import (
    Kind,
    Plan,
    blocked_above,
    conflicts_of,
    exists,
    owned_files,
    planned,
    reason_against,
    refuse,
)
from bayes_kf.files.staging import clear_abandoned, locked, staging, synchronize, synchronize_entries

COMMIT, PLAN, FILES = ".bayes_kf-commit", "plan.json", "files"
READING = 20.0  # seconds in which a reader tries again where every time a save comes between
T = TypeVar("T")


def write_files(folder: Path, write: Callable[[Path], None], kind: Kind) -> None:
    """Let ``write`` fill an empty folder, then put its files into ``folder``, all or none.

    Raises:
        ValueError: where ``folder`` is a file, or a file in the way is not ours; nothing has changed then.
        OSError: where something cannot be written; what was there stays.
    """
    folder = _resolved(folder)
    made = _make(folder)
    try:
        with staging(folder) as stage:
            files = stage / FILES
            files.mkdir()
            try:
                write(files)
            except SafetensorError as error:  # what it makes of a full disk
                raise OSError(f"{folder} could not be written: {error}") from error
            for file in files.rglob("*.safetensors"):
                file.chmod(0o644)  # safetensors makes files that only their owner can read
            with locked(folder):
                _complete(folder)
                clear_abandoned(folder)
                plan = planned(folder, files, kind)
                (stage / PLAN).write_text(json.dumps(plan._asdict()), encoding="utf-8")
                synchronize(stage)
                os.rename(stage, folder / COMMIT)
                _carry_out(folder, plan)
    except BaseException:
        for path in made:  # innermost first; one that holds something stays
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def check_target(folder: Path, names: Iterable[str], kind: Kind) -> None:
    """Raise ValueError where a save of these files into ``folder`` would be refused."""
    folder = _resolved(folder)
    if folder.exists():
        found, _ = conflicts_of(folder, [*names, kind.sums], owned_files(folder, kind), kind)
        refuse(folder, found)


def recover(folder: Path) -> None:
    """Complete a save that was killed after it counted, and clear away what others that were killed left."""
    folder = _resolved(folder)
    if folder.is_dir() and any(path.name.startswith(".bayes_kf-") for path in folder.iterdir()):
        with locked(folder):
            _complete(folder)
            clear_abandoned(folder)


def read_whole(folder: Path, read: Callable[[Path], T], undo: Callable[[T], None] = lambda found: None) -> T:
    """What ``read`` finds in a folder with one posterior's files, while other processes may save into ``folder``.

    Reading changes nothing in ``folder``, which may be read-only.

    Args:
        folder: where posteriors are saved.
        read: called with ``folder``, or where a save into it is not complete, with a copy; again where a save came
            between.
        undo: called with what was read before that.
    """
    end = time.monotonic() + READING
    while True:
        before = _stamp(folder)
        try:
            with _readable(folder) as source:
                found = read(source)
        except (ValueError, OSError):
            if _stamp(folder) == before or time.monotonic() > end:
                raise
            continue
        if _stamp(folder) == before:
            return found
        undo(found)
        if time.monotonic() > end:
            raise ValueError(f"`folder` must not be saved into all the time while it is read, got that in {folder}.")


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[Path]:
    """A folder with a whole posterior's files: ``folder``, or a copy with those of a save that is not complete."""
    plan = _pending(folder)
    if plan is None or plan.sums != SUMS_FILE:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="bayes_kf-") as scratch:
        copy = Path(scratch) / folder.name
        copy.mkdir()
        for path in [*folder.iterdir(), *(folder / COMMIT / FILES).glob("*")]:  # the later ones take precedence
            if path.is_file() and path.name not in plan.removes:
                with contextlib.suppress(FileNotFoundError):  # another process completes the save: the stamp tells
                    shutil.copyfile(path, copy / path.name)
        yield copy


def _stamp(folder: Path) -> tuple[tuple[int, int] | None, ...]:
    """Changes with every save of a posterior, so that a reader knows whether all it read is of one."""
    return tuple(_identity(path) for path in (folder / SUMS_FILE, folder / COMMIT / PLAN))


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _resolved(folder: Path) -> Path:
    """A folder behind links: a link to a folder stays one."""
    try:
        folder = folder.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise ValueError(f"`folder` must be a folder or new, got {folder}: {error}.") from error
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`folder` must be a folder or new, got the file {folder}.")
    return folder


def _make(folder: Path) -> list[Path]:
    """Make a folder and those above it; the new ones, innermost first."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return new


# ---- from the staging folder to their places ----


def _pending(folder: Path) -> Plan | None:
    """The plan of a save that counts and is not complete."""
    path = folder / COMMIT / PLAN
    try:
        plan = Plan(**json.loads(path.read_text(encoding="utf-8")))
        names = [plan.sums, *plan.replaces, *plan.removes, *plan.overwrites]
        digests = [*plan.replaces.values(), *plan.removes.values()]
        if not all(isinstance(text, str) for text in names + digests):
            raise ValueError("not all names and digests are strings")
        outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
        if outside:
            raise ValueError(f"{outside[0]!r} is outside")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"`folder` must hold a sound {COMMIT}/{PLAN} or none, got {path}: {error}.") from error
    return plan


def _complete(folder: Path) -> None:
    """Carry out what a process planned that was killed.

    Raises:
        ValueError: where somebody has put a file in its way meanwhile.
    """
    plan = _pending(folder)
    if plan is None:
        if exists(folder / COMMIT):
            refuse(folder, {COMMIT: "not written by bayes_kf"})
        return
    waiting = {name: noted for name, noted in plan.replaces.items() if (folder / COMMIT / FILES / name).is_file()}
    refuse(folder, {name: reason for name in waiting if (reason := blocked_above(folder, name))})
    strict = {name: noted or None for name, noted in waiting.items() if name not in plan.overwrites}
    late = {name: reason_against(folder / name, noted) for name, noted in strict.items() if exists(folder / name)}
    refuse(folder, {name: reason for name, reason in late.items() if reason})
    removes = {
        name: noted
        for name, noted in plan.removes.items()
        if exists(folder / name) and not blocked_above(folder, name) and not reason_against(folder / name, noted)
    }
    _carry_out(folder, plan._replace(replaces=waiting, removes=removes))


def _carry_out(folder: Path, plan: Plan) -> None:
    """Move every file to its place, remove what is not needed any more, and end the save."""
    for name in plan.replaces:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / COMMIT / FILES / name, folder / name)
    for name in plan.removes:
        path = folder / name
        path.unlink()
        if path.parent != folder:
            with contextlib.suppress(OSError):  # holds something else
                path.parent.rmdir()
    synchronize_entries(folder)
    with staging(folder) as scratch:
        os.rename(folder / COMMIT, scratch / COMMIT)
