"""Checksums of a folder's files, so that one that was damaged, exchanged or edited is not loaded.

``SHA256SUMS`` is what ``sha256sum`` writes and checks. Files that people may edit are left out: the model card, and
``adapter_config.json``, of which what matters is compared with the belief's own record.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

SUMS_FILE = "SHA256SUMS"
EDITABLE = ("README.md", "adapter_config.json")
LAST = "kalman_state.safetensors"  # listed last: a list that was cut short lacks it
LINE = re.compile(r"([0-9a-f]{64})  ([^\0]+)")


def write_sums(folder: Path, names: Sequence[str] | None = None) -> None:
    """Note the checksums of some files in ``folder``, of all that nobody edits by default."""
    every = [path for path in folder.rglob("*") if path.is_file() and path.name not in (SUMS_FILE, *EDITABLE)]
    files = (
        sorted(every, key=lambda path: (path.name == LAST, path))
        if names is None
        else [folder / name for name in names]
    )
    write_lines(folder / SUMS_FILE, {path.relative_to(folder).as_posix(): digest(path) for path in files})


def write_lines(path: Path, digests: dict[str, str]) -> None:
    """Write name -> digest as ``sha256sum`` does."""
    path.write_text("".join(f"{value}  {name}\n" for name, value in digests.items()), encoding="utf-8")


def read_sums(path: Path) -> dict[str, str]:
    """Name -> digest of a file of checksums.

    Raises:
        ValueError: where it cannot be read, or a line is not sound.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"`folder` must hold a readable {SUMS_FILE}, got {path}: {error}.") from error
    found = {}
    for number, line in enumerate(lines, 1):
        noted = LINE.fullmatch(line)
        if noted is None or not (path.parent / noted[2]).resolve().is_relative_to(path.parent.resolve()):
            raise ValueError(f"`folder` must hold a sound {SUMS_FILE}, got line {number} of {path}: {line[:80]!r}.")
        found[noted[2]] = noted[1]
    return found


def check_sums(folder: Path) -> None:
    """Raises ValueError where a file of ``folder`` is not the one that was noted; nothing was in older folders."""
    path = folder / SUMS_FILE
    if not path.is_file():
        return
    for name, noted in read_sums(path).items():
        try:
            found = digest(folder / name)
        except OSError as error:
            raise ValueError(f"`folder` must hold {name}, which {path} names, got: {error}.") from error
        if found != noted:
            raise ValueError(f"`folder` must hold {name} as it was saved, got another in {folder}: damaged?")


def is_listed(folder: Path, name: str) -> bool:
    """Whether ``folder`` has a file that belongs to its posterior: in folders with checksums, one of those listed."""
    if not (folder / name).is_file():
        return False
    path = folder / SUMS_FILE
    if not path.is_file():
        return True
    listed = read_sums(path)
    if LAST not in listed:
        raise ValueError(f"`folder` must hold a sound {SUMS_FILE}, got one without {LAST} in {folder}.")
    return name in listed


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
