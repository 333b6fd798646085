"""Whose the files of a folder are: only those that an earlier save wrote, and nobody changed since, are replaced."""

from __future__ import annotations

import os
import re
import stat
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from bayes_kf.files.checksums import digest, read_sums

Keeps = Callable[[Path, Path], bool]


@dataclass(frozen=True)
class Kind:
    """What one kind of save writes.

    Attributes:
        sums: its file of checksums.
        names: a pattern that all files match that a save lists there; only such files are ever removed.
        editable: folder -> digests of further files as they were saved, which people may edit.
        keeps: name -> whether a file that is not ours stays in the place of a new one, given both; if not, the save
            is refused.
        warned: names of these whose staying is warned of.
        overwrites: whether a file of that name is replaced whoever wrote it.
    """

    sums: str
    names: re.Pattern[str]
    editable: Callable[[Path], dict[str, str]] = lambda folder: {}
    keeps: Mapping[str, Keeps] = field(default_factory=dict)
    warned: Collection[str] = ()
    overwrites: Callable[[str], bool] = lambda name: False


class Plan(NamedTuple):
    """A save, once everything is written.

    Attributes:
        sums: of its kind.
        replaces: name -> the digest of the file of ours in its place, "" where there is none.
        overwrites: names among these whose place is taken whatever is there.
        removes: name -> digest of files of ours that are not needed any more.
    """

    sums: str
    replaces: dict[str, str]
    overwrites: list[str]
    removes: dict[str, str]


def planned(folder: Path, files: Path, kind: Kind) -> Plan:
    """What is to be done with ``files``; those that make way for a file that is not ours are removed from there.

    Raises:
        ValueError: where a file in the way is not ours.
    """
    owned = owned_files(folder, kind)
    names = sorted(path.relative_to(files).as_posix() for path in files.rglob("*") if path.is_file())
    conflicts, kept = conflicts_of(folder, names, owned, kind, files)
    obsolete = {name: noted for name, noted in owned.items() if name not in names and exists(folder / name)}
    conflicts |= {name: reason for name, noted in obsolete.items() if (reason := reason_against(folder / name, noted))}
    refuse(folder, conflicts)
    for name in kept:
        (files / name).unlink()
        if name in kind.warned:
            warnings.warn(
                f"{folder / name} was edited, or bayes_kf did not write it, and stays as it is: it may say nothing "
                "about the posterior saved beside it.",
                UserWarning,
                stacklevel=2,
            )
    names = [name for name in names if name not in kept and name != kind.sums] + [kind.sums]  # which comes last
    replaces = {name: owned.get(name, "") if exists(folder / name) else "" for name in names}
    return Plan(kind.sums, replaces, [name for name in names if kind.overwrites(name)], obsolete)


def owned_files(folder: Path, kind: Kind) -> dict[str, str]:
    """Name -> digest of the files that an earlier save of this kind wrote.

    Raises:
        ValueError: where one was changed since: a posterior that somebody edited is not replaced.
    """
    path = folder / kind.sums
    try:
        listed = read_sums(path) if not path.is_symlink() and path.is_file() else {}
    except ValueError:
        listed = {}
    if not listed or not all(kind.names.fullmatch(name) for name in listed):
        return {}  # none, or somebody else's checksums
    changed = {
        name: reason
        for name, noted in listed.items()
        if not kind.overwrites(name) and exists(folder / name) and (reason := reason_against(folder / name, noted))
    }
    refuse(folder, changed)
    return listed | kind.editable(folder) | {kind.sums: digest(path)}


def conflicts_of(
    folder: Path, names: Iterable[str], owned: Mapping[str, str], kind: Kind, files: Path | None = None
) -> tuple[dict[str, str], list[str]]:
    """Name -> why a file in its way cannot be replaced; and the names of new files that make way."""
    found, kept = {}, []
    for name in names:
        reason = blocked_above(folder, name)
        if not reason and exists(folder / name):
            reason = reason_against(folder / name, owned.get(name), kind.overwrites(name))
            if reason and name in kind.keeps and (files is None or kind.keeps[name](folder / name, files / name)):
                kept.append(name)
                continue
        if reason:
            found[name] = reason
    return found, kept


def blocked_above(folder: Path, name: str) -> str:
    """Why a file cannot lie where its name says, "" where it can: a link or a file is in the place of a folder."""
    parts = PurePosixPath(name).parts
    above = [folder.joinpath(*parts[: k + 1]) for k in range(len(parts) - 1)]
    wrong = [path for path in above if exists(path) and (path.is_symlink() or not path.is_dir())]
    return f"{wrong[0].name} is no folder" if wrong else ""


def reason_against(path: Path, noted: str | None, whoever: bool = False) -> str:
    """Why a file is not to be replaced, "" where it may be."""
    if path.is_symlink():
        return "a link"
    if not path.is_file():
        return "not a file"
    if whoever:
        return ""
    if noted is None or digest(path) != noted:
        return "not written by bayes_kf" if noted is None else "changed since it was saved"
    return "" if path.stat().st_mode & stat.S_IWUSR else "read-only"


def refuse(folder: Path, conflicts: Mapping[str, str]) -> None:
    """Raise ValueError for any files, name -> reason, that cannot be replaced."""
    if conflicts:
        text = ", ".join(f"{name} ({reason})" for name, reason in conflicts.items())
        raise ValueError(
            f"`folder` must have no other files where this would write, got {text} in {folder}: move "
            f"{'it' if len(conflicts) == 1 else 'them'} away, or take another folder."
        )


def exists(path: Path) -> bool:
    """Whether anything is there, if only a link that leads nowhere."""
    return os.path.lexists(path)
