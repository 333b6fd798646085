"""Files of a report: the page, its numbers (.json) and its sheet of figures (.png)."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from bayes_kf.files.staging import remove_abandoned, staging

PAGE_MARK = "<!-- written by bayes_kf -->\n"  # last line of a page
SHEET_MARK = "bayes_kf"  # PNG keyword Software of a sheet
JSON_KEYS = {"title", "scores", "not_finite", "verdict", "sizes", "config", "fingerprints"}


def check_page(page: Path, name: str = "path") -> None:
    """Check that a report can be saved to ``page``.

    Raises:
        ValueError: If the path does not end in .html, or if a file of this name with .html, .json or .png exists and
            belongs to no earlier report.
    """
    if page.suffix != ".html":
        raise ValueError(f"`{name}` must end in .html, got {str(page)!r}.")
    for path in (page, page.with_suffix(".json"), page.with_suffix(".png")):
        if os.path.lexists(path) and not _is_ours(path):
            raise ValueError(
                f"`{name}` must be a new name or that of an earlier report, got {page}, where {path.name} belongs to "
                "no report: move it, or choose another name."
            )


def write_page(page: Path, writers: dict[str, Callable[[Path], None]]) -> None:
    """Write the files of a report; each file is replaced atomically.

    Args:
        page: Path of the page.
        writers: Suffix to the function that writes that file. A sheet of an earlier report without a writer is removed.

    Raises:
        ValueError: As :func:`check_page`; nothing has changed then.
    """
    check_page(page)
    page.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(page.parent)
    with staging(page.parent) as stage:
        for suffix, write in writers.items():
            write(stage / f"report{suffix}")
        check_page(page)  # again: writing took a while
        for suffix in writers:
            os.replace(stage / f"report{suffix}", page.with_suffix(suffix))
    if ".png" not in writers:
        page.with_suffix(".png").unlink(missing_ok=True)


def _is_ours(path: Path) -> bool:
    """Whether a report wrote this file."""
    from PIL import Image  # slow to import

    if path.is_symlink() or not path.is_file():
        return False
    try:
        if path.suffix == ".html":
            return path.read_bytes().endswith(PAGE_MARK.encode())
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            return isinstance(content, dict) and content.keys() >= JSON_KEYS
        with Image.open(path) as sheet:
            return re.match(SHEET_MARK, str(sheet.info.get("Software", ""))) is not None
    except (OSError, ValueError, RecursionError, Image.DecompressionBombError):
        return False
