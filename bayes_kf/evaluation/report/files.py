"""The files of a report: the page, its numbers and its sheet of figures, which replace those of an earlier report."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from bayes_kf.files.staging import remove_abandoned, staging

PAGE_MARK = "<!-- written by bayes_kf -->\n"  # at the end of a page
SHEET_MARK = "bayes_kf"  # the sheet's PNG keyword Software
NUMBERS = {"title", "scores", "not_finite", "verdict", "sizes", "config", "fingerprints"}


def check_page(page: Path, name: str = "path") -> None:
    """Raise ValueError where a report cannot be saved to ``page``.

    It must end in .html, and what is there of this name with .html, .json or .png must be of an earlier report.
    """
    if page.suffix != ".html":
        raise ValueError(f"`{name}` must end in .html, got {str(page)!r}.")
    for path in (page, page.with_suffix(".json"), page.with_suffix(".png")):
        if os.path.lexists(path) and not _is_ours(path):
            raise ValueError(
                f"`{name}` must be a new name or that of an earlier report, got {page}, where {path.name} is not of a "
                "report: move it away, or take another name."
            )


def write_page(page: Path, writers: dict[str, Callable[[Path], None]]) -> None:
    """Write files of a report, each whole or not at all.

    Args:
        page: where the page goes.
        writers: suffix -> what writes that file. A file of an earlier report that has no writer now is removed.

    Raises:
        ValueError: as :func:`check_page`; nothing has changed then.
    """
    check_page(page)
    page.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(page.parent)
    with staging(page.parent) as stage:
        for suffix, write in writers.items():
            write(stage / f"report{suffix}")
        check_page(page)  # drawing takes a while
        for suffix in writers:
            os.replace(stage / f"report{suffix}", page.with_suffix(suffix))
    if ".png" not in writers:
        page.with_suffix(".png").unlink(missing_ok=True)


def _is_ours(path: Path) -> bool:
    """Whether a report wrote a file."""
    from PIL import Image  # takes a while to import

    if path.is_symlink() or not path.is_file():
        return False
    try:
        if path.suffix == ".html":
            return path.read_bytes().endswith(PAGE_MARK.encode())
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            return isinstance(content, dict) and content.keys() >= NUMBERS
        with Image.open(path) as sheet:
            return re.match(SHEET_MARK, str(sheet.info.get("Software", ""))) is not None
    except (OSError, ValueError, RecursionError, Image.DecompressionBombError):
        return False
