"""The results of ``streams.py`` as Markdown: differences between rows, held-out scores, a table for each stream."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.common.result_files import markdown_table, mean_sd

Cell = Mapping[str, Any]
LEGEND = (
    "One pass, one example at a time. Online scores come before each update, by the mean; the others are of held-out"
    " examples after the pass, by the posterior. Epistemic: mutual information of label and parameters, mean in nats."
    " ECE [upper end of the null band]. T: temperature. Mean ± sd over seeds where there are several."
)
PAIRS = {
    "default − before": ("stream", "before"),
    "whitened − default": ("stream-whitened", "stream"),
    "whitened − not, `KalmanConfig()`": ("single-whitened", "single"),
}
SHORT = {"before": "before", "stream": "default", "stream-whitened": "whitened", "stream-latest": "latest"}
ONLINE, HELD_OUT = ["online log loss", "online accuracy"], ["NLL", "accuracy", "ECE", "epistemic"]
HEADER = ["", *ONLINE, *HELD_OUT, "T", "size", "sharpness", "ms"]


def render(cells: Mapping[str, Cell], problems: Mapping[str, str], rows: Mapping[str, str]) -> list[str]:
    """Body of the Markdown file.

    Args:
        cells: by "problem/row/seed".
        problems: name -> title.
        rows: name -> title.
    """
    lines = [LEGEND, "", "## Differences of online log loss", ""]
    lines += ["In nats an example ± standard error over blocks of 25; negative: the first is better.", ""]
    lines += markdown_table(
        ["", *PAIRS],
        [[title, *(difference(cells, name, *pair) for pair in PAIRS.values())] for name, title in problems.items()],
    )
    header = ["", *(f"{score} {short}" for score in ("NLL", "epistemic") for short in SHORT.values())]
    lines += ["", "## Held out", ""]
    lines += markdown_table(header, [_held_out(cells, name, title) for name, title in problems.items()])
    for name, title in problems.items():
        measured = {row: found for row in rows if (found := _of(cells, name, row))}
        if measured:
            first = next(iter(measured.values()))
            lines += ["", f"## {title}", "", f"{first[0]['examples']:,} examples, seeds: {len(first)}.", ""]
            lines += markdown_table(HEADER, [_line(rows[row], found) for row, found in measured.items()])
    return lines


def difference(cells: Mapping[str, Cell], name: str, first: str, second: str) -> str:
    """The text "mean ± standard error" of the differences of two rows' losses, paired by block; a dash for none."""
    pairs = [(cell, cells.get(key.replace(f"/{first}/", f"/{second}/"))) for key, cell in _items(cells, name, first)]
    values = [
        a - b for one, other in pairs if other is not None for a, b in zip(one["blocks"], other["blocks"], strict=True)
    ]
    if len(values) < 2:
        return "–"
    differences = torch.tensor(values, dtype=torch.float64)
    return f"{differences.mean():+.3f} ± {differences.std() / math.sqrt(len(values)):.3f}"


def _held_out(cells: Mapping[str, Cell], name: str, title: str) -> list[str]:
    """The means of held-out log loss and epistemic entropy of a stream's rows."""
    found = [_of(cells, name, row) for row in SHORT]
    return [title, *(_mean(row, score) for score in ("nll", "epistemic") for row in found)]


def _mean(cells: Sequence[Cell], score: str) -> str:
    values = [cell[score] for cell in cells if score in cell]
    return f"{sum(values) / len(values):.3f}" if values else "–"


def _items(cells: Mapping[str, Cell], name: str, row: str) -> list[tuple[str, Cell]]:
    return [(key, cell) for key, cell in sorted(cells.items()) if key.startswith(f"{name}/{row}/")]


def _of(cells: Mapping[str, Cell], name: str, row: str) -> list[Cell]:
    return [cell for _, cell in _items(cells, name, row)]


def _line(title: str, cells: Sequence[Cell]) -> list[str]:
    """A row of a stream's table."""

    def text(name: str, digits: int = 3) -> str:
        return mean_sd([cell[name] for cell in cells if cell.get(name) is not None], digits)

    def listed(name: str) -> str:
        return ", ".join(f"{cell[name]:.3g}" for cell in cells if cell[name] is not None) or "–"

    band = f" [{max(cell['ece_null_high'] for cell in cells):.3f}]" if "ece" in cells[0] else ""
    scores = [text("nll"), text("accuracy"), text("ece") + band, text("epistemic")]
    chosen = [listed("temperature"), listed("size"), listed("sharpness")]
    return [title, text("online_log_loss"), text("online_accuracy"), *scores, *chosen, text("milliseconds", 0)]
