"""Which files of a folder a save may replace: only those that an earlier save wrote and that are unchanged since."""

from __future__ import annotations

import os
import re
import stat
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Self

from bayes_kf.files.checksums import digest, read_checksums


@dataclass(frozen=True)
class SaveKind:
    """The files that one kind of save writes.

    Attributes:
        checksums: name of its checksums file.
        names: a pattern of all files that the checksums file may list; only such files are ever removed.
        editable: folder -> name -> digest, at the time of the save, of further files that people may edit.
        may_keep: name -> whether a file of that name that is not ours stays instead of the new one, given the paths of
            both; if not, the save is refused.
        warn_if_kept: names of files whose staying causes a warning.
        overwrites: whether a file of that name is replaced even if it is not ours.
    """

    checksums: str
    names: re.Pattern[str]
    editable: Callable[[Path], dict[str, str]] = lambda folder: {}
    may_keep: Mapping[str, Callable[[Path, Path], bool]] = field(default_factory=dict)
    warn_if_kept: Collection[str] = ()
    overwrites: Callable[[str], bool] = lambda name: False


class SavePlan(NamedTuple):
    """The changes that a save makes to a folder, once all new files are written.

    Attributes:
        checksums: name of the checksums file.
        replaces: name of a new file -> digest of our old file of that name, "" if there is none.
        overwrites: names of new files that replace any file of that name.
        removes: name -> digest of our old files that are not needed any more.
    """

    checksums: str
    replaces: dict[str, str]
    overwrites: list[str]
    removes: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """The plan as a staging folder holds it."""
        fields = self._asdict()
        return {"sums": fields.pop("checksums")} | fields

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """The plan that :meth:`to_json` gave.

        Raises:
            ValueError, TypeError, AttributeError: if it is no plan, or a name is outside the folder.
        """
        fields = dict(value)
        plan = cls(checksums=fields.pop("sums", None), **fields)
        names = [plan.checksums, *plan.replaces, *plan.removes, *plan.overwrites]
        digests = [*plan.replaces.values(), *plan.removes.values()]
        if not all(isinstance(text, str) for text in names + digests):
            raise ValueError("not all names and digests are strings")
        outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
        if outside:
            raise ValueError(f"{outside[0]!r} is outside")
        return plan


def make_plan(folder: Path, files: Path, kind: SaveKind) -> SavePlan:
    """The plan to move the new files in ``files`` into ``folder``.

    If a file stays, the new file of that name is removed from ``files``.

    Raises:
        ValueError: if a file in the way is not ours.
    """
    owned = owned_files(folder, kind)
    names = sorted(path.relative_to(files).as_posix() for path in files.rglob("*") if path.is_file())
    conflicts, kept = find_conflicts(folder, names, owned, kind, files)
    obsolete = {name: saved for name, saved in owned.items() if name not in names and path_exists(folder / name)}
    conflicts |= {name: reason for name, saved in obsolete.items() if (reason := file_conflict(folder / name, saved))}
    raise_conflicts(folder, conflicts)
    for name in kept:
        (files / name).unlink()
        if name in kind.warn_if_kept:
            warnings.warn(
                f"{folder / name} was edited, or bayes_kf did not write it, and stays as it is: it may "
                "describe another posterior than the one saved beside it.",
                UserWarning,
                stacklevel=2,
            )
    names = [name for name in names if name not in kept and name != kind.checksums] + [kind.checksums]  # it comes last
    replaces = {name: owned.get(name, "") if path_exists(folder / name) else "" for name in names}
    return SavePlan(kind.checksums, replaces, [name for name in names if kind.overwrites(name)], obsolete)


def owned_files(folder: Path, kind: SaveKind) -> dict[str, str]:
    """Name -> digest of the files that an earlier save of this kind wrote.

    Raises:
        ValueError: if one was changed since: a posterior that somebody edited is not replaced.
    """
    path = folder / kind.checksums
    try:
        listed = read_checksums(path) if not path.is_symlink() and path.is_file() else {}
    except ValueError:
        listed = {}
    if not listed or not all(kind.names.fullmatch(name) for name in listed):
        return {}  # there is no list, or another program wrote it
    changed = {
        name: reason
        for name, saved in listed.items()
        if not kind.overwrites(name) and path_exists(folder / name) and (reason := file_conflict(folder / name, saved))
    }
    raise_conflicts(folder, changed)
    return listed | kind.editable(folder) | {kind.checksums: digest(path)}


def find_conflicts(
    folder: Path, names: Iterable[str], owned: Mapping[str, str], kind: SaveKind, files: Path | None = None
) -> tuple[dict[str, str], list[str]]:
    """Name -> reason for each new file whose place cannot be taken, and the names of files that stay.

    Args:
        folder: where the new files go.
        names: of the new files.
        owned: name -> digest of the files that may be replaced.
        kind: of the save.
        files: holds the new files; None before they are written.
    """
    conflicts, kept = {}, []
    for name in names:
        reason = parent_conflict(folder, name)
        if not reason and path_exists(folder / name):
            reason = file_conflict(folder / name, owned.get(name), kind.overwrites(name))
            if reason and name in kind.may_keep and (files is None or kind.may_keep[name](folder / name, files / name)):
                kept.append(name)
                continue
        if reason:
            conflicts[name] = reason
    return conflicts, kept


def parent_conflict(folder: Path, name: str) -> str:
    """Why the folders above a file cannot be made: a link or a file has the name of one. "" if they can."""
    parts = PurePosixPath(name).parts
    parents = [folder.joinpath(*parts[: k + 1]) for k in range(len(parts) - 1)]
    wrong = [path for path in parents if path_exists(path) and (path.is_symlink() or not path.is_dir())]
    return f"{wrong[0].name} is no folder" if wrong else ""


def file_conflict(path: Path, saved: str | None, overwrite: bool = False) -> str:
    """Why a file must not be replaced, "" if it may be.

    Args:
        path: of the file.
        saved: digest of the file when an earlier save wrote it; None if no save did.
        overwrite: whether it may be replaced even if no save wrote it.
    """
    if path.is_symlink():
        return "a link"
    if not path.is_file():
        return "not a file"
    if overwrite:
        return ""
    if saved is None or digest(path) != saved:
        return "not written by bayes_kf" if saved is None else "changed since it was saved"
    return "" if path.stat().st_mode & stat.S_IWUSR else "read-only"


def raise_conflicts(folder: Path, conflicts: Mapping[str, str]) -> None:
    """Raise ValueError if there are any conflicts, name -> reason."""
    if conflicts:
        text = ", ".join(f"{name} ({reason})" for name, reason in conflicts.items())
        raise ValueError(
            f"`folder` must have no other files where this would write, got {text} in {folder}: move "
            f"{'it' if len(conflicts) == 1 else 'them'} away, or take another folder."
        )


def path_exists(path: Path) -> bool:
    """Whether a path exists; a broken link does."""
    return os.path.lexists(path)
