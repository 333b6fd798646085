"""The table of the demo, as Markdown and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tutorials.digits_demo.data import SEVERITY, Size
from tutorials.digits_demo.methods import Row


def _score(name: str, digits: int = 3) -> Callable[[Row], str]:
    return lambda row: f"{row.report.scores[name]:.{digits}f}"


def _ece(row: Row) -> str:
    value, low, high = (row.report.scores[f"ece{suffix}"] for suffix in ("", "_null_low", "_null_high"))
    return f"{value:.3f} ({low:.3f}–{high:.3f})"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "": lambda row: row.name + (f", rate {row.notes['learning_rate']:g}" if "learning_rate" in row.notes else ""),
    "accuracy online": _score("online_accuracy"),
    "held out": _score("accuracy"),
    "NLL": _score("nll"),
    "ECE (null band)": _ece,
    "AUROC corrupted": _score("ood_corrupted_auroc"),
    "photos": _score("ood_photos_auroc"),
    "seconds": lambda row: f"{row.seconds:.1f}",
}


def markdown_table(rows: list[Row]) -> str:
    """The table in Markdown, with aligned columns."""
    cells = [list(COLUMNS), *[[column(row) for column in COLUMNS.values()] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    rule = ["-" * widths[0], *["-" * (width - 1) + ":" for width in widths[1:]]]
    return "\n".join(_line(line, widths) for line in [cells[0], rule, *cells[1:]])


def caption(rows: list[Row], size: Size, rank: int, seed: int) -> str:
    """The caption, which explains the columns."""
    accuracy_by_rate: dict[float, float] = next(
        (row.notes["online_accuracy_by_rate"] for row in rows if "online_accuracy_by_rate" in row.notes), {}
    )
    rates = ", ".join(f"{rate:g}" for rate in accuracy_by_rate)
    total = sum(row.notes.get("seconds_of_all_rates", 0.0) for row in rows)
    return (
        f"A digit transformer trained on MNIST learns {size.stream:,} UCI digits online (one pass, one image at a time,"
        f" LoRA rank {rank} and the head, seed {seed}). Online accuracy scores each image before its update;"
        f" the other scores are on {size.heldout:,} held-out images. The null band of an ECE holds the values of a"
        f" perfectly calibrated model with these confidences. AUROC: entropy separates held-out digits from corrupted"
        f" copies (severity {SEVERITY} of 5), and from patches of photographs. AdamW has the best online rate of"
        f" {rates}, chosen in hindsight; all rates took {total:.1f} s."
    )


def save_table(rows: list[Row], size: Size, rank: int, seed: int, folder: Path) -> None:
    """Write demo.md and demo.json."""
    text = f"# UCI digits, online\n\n{markdown_table(rows)}\n\n{caption(rows, size, rank, seed)}\n"
    (folder / "demo.md").write_text(text, encoding="utf-8")
    content = {"setting": size._asdict() | {"rank": rank, "seed": seed}, "rows": [_record(row) for row in rows]}
    (folder / "demo.json").write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _record(row: Row) -> dict[str, Any]:
    """A row for JSON; numbers that are not finite become null."""
    scores = {name: value if math.isfinite(value) else None for name, value in row.report.scores.items()}
    return {"name": row.name, "seconds": row.seconds, "notes": row.notes, "scores": scores}


def _line(cells: list[str], widths: list[int]) -> str:
    numbers = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return f"| {' | '.join([cells[0].ljust(widths[0]), *numbers])} |"
