"""Several files are written into a folder as one change, beside files of other programs.

A save never removes or changes a file that the package did not write. A file is ours if a checksums file of ours lists
it with its present content. The save refuses to take the place of any other file.

1. All new files are written into a hidden staging folder inside the folder (:mod:`bayes_kf.files.staging`).
2. The save checks the files in their places. If one is not ours, it ends with a ValueError, and nothing has changed.
3. The staging folder, with a plan of what is replaced and removed, is renamed to ``.bayes_kf-commit``. This single step
   commits the save: from then on, readers take a file from that folder if it is there.
4. The files are renamed to their places one by one. Our old files that are not needed any more are removed, and then
   ``.bayes_kf-commit``. If the process is killed before the end, the next save or start completes this step.
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

from bayes_kf.files.checksums import CHECKSUMS_FILE
from bayes_kf.files.ownership import (
    SaveKind,
    SavePlan,
    file_conflict,
    find_conflicts,
    make_plan,
    owned_files,
    parent_conflict,
    path_exists,
    raise_conflicts,
)
from bayes_kf.files.staging import folder_lock, remove_abandoned, staging, sync_entries, sync_files

COMMIT, PLAN, FILES = ".bayes_kf-commit", "plan.json", "files"
READ_TIMEOUT = 20.0  # seconds in which a reader tries again, if another save happens in every attempt
T = TypeVar("T")


def write_files(folder: Path, write: Callable[[Path], None], kind: SaveKind) -> None:
    """Write files into ``folder``, all or none.

    Args:
        folder: made if missing.
        write: writes the files into an empty folder that it gets.
        kind: of the save.

    Raises:
        ValueError: if ``folder`` is a file, or a file in the way is not ours; nothing has changed then.
        OSError: if something cannot be written; the old files stay.
    """
    folder = _resolve(folder)
    made = _make_folders(folder)
    try:
        with staging(folder) as stage:
            files = stage / FILES
            files.mkdir()
            try:
                write(files)
            except SafetensorError as error:  # safetensors raises it if the disk is full
                raise OSError(f"{folder} could not be written: {error}") from error
            for file in files.rglob("*.safetensors"):
                file.chmod(0o644)  # safetensors makes files that only their owner can read
            with folder_lock(folder):
                _complete_commit(folder)
                remove_abandoned(folder)
                plan = make_plan(folder, files, kind)
                (stage / PLAN).write_text(json.dumps(plan.to_json()), encoding="utf-8")
                sync_files(stage)
                os.rename(stage, folder / COMMIT)
                _carry_out(folder, plan)
    except BaseException:
        for path in made:  # innermost first; rmdir fails on a folder that is not empty
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def check_target(folder: Path, names: Iterable[str], kind: SaveKind) -> None:
    """Raise ValueError if a save of these files into ``folder`` would be refused."""
    folder = _resolve(folder)
    if folder.exists():
        conflicts, _ = find_conflicts(folder, [*names, kind.checksums], owned_files(folder, kind), kind)
        raise_conflicts(folder, conflicts)


def recover(folder: Path) -> None:
    """Complete a committed save that was killed, and remove the staging folders of saves that were killed earlier."""
    folder = _resolve(folder)
    if folder.is_dir() and any(path.name.startswith(".bayes_kf-") for path in folder.iterdir()):
        with folder_lock(folder):
            _complete_commit(folder)
            remove_abandoned(folder)


def read_consistently(folder: Path, read: Callable[[Path], T], undo: Callable[[T], None] = lambda result: None) -> T:
    """The result of ``read`` on the files of one posterior, while other processes may save into ``folder``.

    It changes nothing in ``folder``, which may be read-only.

    Args:
        folder: the posterior's.
        read: gets ``folder``, or a copy of it if a save has not been completed. It is called again if another save
            happens meanwhile.
        undo: gets the result of an attempt that is repeated.
    """
    end = time.monotonic() + READ_TIMEOUT
    while True:
        before = _version(folder)
        try:
            with _whole_folder(folder) as source:
                result = read(source)
        except (ValueError, OSError):
            if _version(folder) == before or time.monotonic() > end:
                raise
            continue
        if _version(folder) == before:
            return result
        undo(result)
        if time.monotonic() > end:
            raise ValueError(f"`folder` must not be saved into all the time while it is read, got that in {folder}.")


@contextlib.contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A folder with all files of one posterior: ``folder``, or a copy that includes the files of a pending save."""
    plan = _pending_plan(folder)
    if plan is None or plan.checksums != CHECKSUMS_FILE:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="bayes_kf-") as scratch:
        copy = Path(scratch) / folder.name
        copy.mkdir()
        for root in (folder, folder / COMMIT / FILES):  # the later files take precedence
            for path in [*root.glob("*"), *root.glob("member_*/*")]:
                name = path.relative_to(root)
                if path.is_file() and name.as_posix() not in plan.removes:
                    (copy / name).parent.mkdir(exist_ok=True)
                    with contextlib.suppress(FileNotFoundError):  # another process completes the save
                        shutil.copyfile(path, copy / name)
        yield copy


def _version(folder: Path) -> tuple[tuple[int, int] | None, ...]:
    """A value that changes with every save of a posterior into ``folder``."""
    return tuple(_inode_and_time(path) for path in (folder / CHECKSUMS_FILE, folder / COMMIT / PLAN))


def _inode_and_time(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _resolve(folder: Path) -> Path:
    """The folder that a link points to, so that the link stays."""
    try:
        folder = folder.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise ValueError(f"`folder` must be a folder or new, got {folder}: {error}.") from error
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`folder` must be a folder or new, got the file {folder}.")
    return folder


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and those above it, and return the new ones, innermost first."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return new


# ---- from the staging folder to their places ----


def _pending_plan(folder: Path) -> SavePlan | None:
    """The plan of a save that is committed and not complete."""
    path = folder / COMMIT / PLAN
    try:
        return SavePlan.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"`folder` must hold a valid {COMMIT}/{PLAN} or none, got {path}: {error}.") from error


def _complete_commit(folder: Path) -> None:
    """Carry out the plan of a process that was killed.

    Raises:
        ValueError: if a file is in the way that somebody has written since.
    """
    plan = _pending_plan(folder)
    if plan is None:
        if path_exists(folder / COMMIT):
            raise_conflicts(folder, {COMMIT: "not written by bayes_kf"})
        return
    waiting = {name: saved for name, saved in plan.replaces.items() if (folder / COMMIT / FILES / name).is_file()}
    raise_conflicts(folder, {name: reason for name in waiting if (reason := parent_conflict(folder, name))})
    checked = {name: saved or None for name, saved in waiting.items() if name not in plan.overwrites}
    conflicts = {
        name: file_conflict(folder / name, saved) for name, saved in checked.items() if path_exists(folder / name)
    }
    raise_conflicts(folder, {name: reason for name, reason in conflicts.items() if reason})
    removes = {
        name: saved
        for name, saved in plan.removes.items()
        if path_exists(folder / name) and not parent_conflict(folder, name) and not file_conflict(folder / name, saved)
    }
    _carry_out(folder, plan._replace(replaces=waiting, removes=removes))


def _carry_out(folder: Path, plan: SavePlan) -> None:
    """Move every file to its place, remove old files, and end the save."""
    for name in plan.replaces:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / COMMIT / FILES / name, folder / name)
    for name in plan.removes:
        path = folder / name
        path.unlink()
        if path.parent != folder:
            with contextlib.suppress(OSError):  # the folder is not empty
                path.parent.rmdir()
    sync_entries(folder)
    with staging(folder) as scratch:
        os.rename(folder / COMMIT, scratch / COMMIT)
