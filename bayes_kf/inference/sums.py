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
EDITABLE = (SUMS_FILE, "README.md", "adapter_config.json")


def write_sums(folder: Path, names: Sequence[str] | None = None) -> None:
    """Note the checksums of some files in ``folder``, of all that nobody edits by default."""
    every = [path for path in folder.rglob("*") if path.is_file() and path.name not in EDITABLE]
    files = sorted(every) if names is None else [folder / name for name in names]
    lines = [f"{_digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path) -> None:
    """Raises ValueError where a file of ``folder`` is not the one that was noted; nothing was in older folders."""
    path = folder / SUMS_FILE
    if not path.is_file():
        return
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"`folder` must hold a readable {SUMS_FILE}, got {path}: {error}.") from error
    for number, line in enumerate(lines, 1):
        noted = re.fullmatch(r"([0-9a-f]{64})  ([^\0]+)", line)
        file = folder / noted[2] if noted else folder
        if noted is None or not file.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"`folder` must hold a sound {SUMS_FILE}, got line {number} of {path}: {line[:80]!r}.")
        try:
            found = _digest(file)
        except OSError as error:
            raise ValueError(f"`folder` must hold {noted[2]}, which {path} names, got: {error}.") from error
        if found != noted[1]:
            raise ValueError(f"`folder` must hold {noted[2]} as it was saved, got another in {folder}: damaged?")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
