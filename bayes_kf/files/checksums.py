"""Checksums of the files of a folder, so that a damaged, exchanged or edited file is not loaded.

``SHA256SUMS`` has the format of ``sha256sum``. It does not list files that people may edit: the model card, and
``adapter_config.json``, whose important settings are compared with the record in the state file.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

CHECKSUMS_FILE = "SHA256SUMS"
EDITABLE = ("README.md", "adapter_config.json")
LAST = "kalman_state.safetensors"  # listed last: a truncated list lacks it
LINE = re.compile(r"([0-9a-f]{64})  ([^\0]+)")


def write_checksums(folder: Path, names: Sequence[str] | None = None) -> None:
    """Write the checksums of the named files of ``folder``; by default of all files that nobody edits."""
    if names is None:
        files = [path for path in folder.rglob("*") if path.is_file() and path.name not in (CHECKSUMS_FILE, *EDITABLE)]
        files.sort(key=lambda path: (path == folder / LAST, path))
    else:
        files = [folder / name for name in names]
    write_digests(folder / CHECKSUMS_FILE, {path.relative_to(folder).as_posix(): digest(path) for path in files})


def write_digests(path: Path, digests: dict[str, str]) -> None:
    """Write name -> digest in the format of ``sha256sum``."""
    path.write_text("".join(f"{value}  {name}\n" for name, value in digests.items()), encoding="utf-8")


def read_checksums(path: Path) -> dict[str, str]:
    """Name -> digest of a checksums file.

    Raises:
        ValueError: if it cannot be read, or a line has another format.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"`folder` must hold a readable {CHECKSUMS_FILE}, got {path}: {error}.") from error
    digests = {}
    for number, line in enumerate(lines, 1):
        entry = LINE.fullmatch(line)
        if entry is None or not _stays_inside(entry[2]):
            raise ValueError(
                f"`folder` must hold a valid {CHECKSUMS_FILE}, got line {number} of {path}: {line[:80]!r}."
            )
        digests[entry[2]] = entry[1]
    return digests


def _stays_inside(name: str) -> bool:
    """Whether a relative path leads nowhere out of its folder; the files may be links, as in the cache of the Hub."""
    return not os.path.isabs(name) and os.path.normpath(name).split(os.sep)[0] not in (os.pardir, os.curdir)


def verify_checksums(folder: Path) -> None:
    """Check every listed file of ``folder``; folders of earlier versions have no list.

    Raises:
        ValueError: if a file is missing or differs.
    """
    path = folder / CHECKSUMS_FILE
    if not path.is_file():
        return
    for name, expected in read_checksums(path).items():
        try:
            actual = digest(folder / name)
        except OSError as error:
            raise ValueError(f"`folder` must hold {name}, which {path} names, got: {error}.") from error
        if actual != expected:
            raise ValueError(f"`folder` must hold {name} as it was saved, got another in {folder}: damaged?")


def is_listed(folder: Path, name: str) -> bool:
    """Whether a file of ``folder`` belongs to its posterior: it is listed, or the folder has no list."""
    if not (folder / name).is_file():
        return False
    path = folder / CHECKSUMS_FILE
    if not path.is_file():
        return True
    digests = read_checksums(path)
    if LAST not in digests:
        raise ValueError(f"`folder` must hold a valid {CHECKSUMS_FILE}, got one without {LAST} in {folder}.")
    return name in digests


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
