"""The results of ``run.py`` as Markdown: a table for each set of questions and reading."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common.result_files import markdown_table, mean_sd
from benchmarks.language.rows import ROWS
from benchmarks.quality.split.measured import average, cost, mean_of

Cell = Mapping[str, Any]
LEGEND = (
    "SmolLM2-135M-Instruct with LoRA of rank 8 on queries and values of the last ten of its thirty layers (sets that"
    " end in -all: on all linear layers there). 200 questions to learn, 300 to test. Mean ± sd over seeds. NLL and ECE"
    " (15 bins; in [ ] its null band, what a calibrated model would show in 95 % of samples of this size) of the right"
    " option. Errors: area under the ROC curve of total entropy for wrong answers. At 80 %: accuracy on the 80 % of"
    " the questions with the highest confidence. OOD: the same area for questions of other sets, and for gibberish"
    " (words reversed and in another order), by total / epistemic entropy. Cost: processor seconds of learning over"
    " those of an epoch of AdamW with batches of 16, from steps timed in the same process; in parentheses without the"
    " runs of the rate search that predict nothing. Chance is 25 %, Winogrande's 50 %."
)
COLUMNS = {"accuracy": "accuracy", "NLL": "nll", "errors": "error_auroc", "at 80 %": "answered_80"}


def render(cells: Mapping[str, Cell]) -> list[str]:
    """Body of the Markdown file."""
    lines = [LEGEND]
    for name, reading in sorted({tuple(key.split("/")[:2]) for key in cells}):
        lines += ["", f"## {name}, by {reading}", "", *_table(cells, name, reading)]
    return lines


def _table(cells: Mapping[str, Cell], name: str, reading: str) -> list[str]:
    table, missing = [], []
    others = sorted(
        {
            score.removeprefix("ood_")
            for key, cell in cells.items()
            if key.startswith(f"{name}/{reading}/")
            for score in cell
            if score.startswith("ood_") and not score.endswith("_epistemic")
        }
    )
    for row, (title, _) in ROWS.items():
        own = {key: cell for key, cell in cells.items() if key.startswith(f"{name}/{reading}/{row}/")}
        measured = [cell for cell in own.values() if "skipped" not in cell]
        missing += [
            f"{key.split('/')[2]} {key.split('/')[3]}: {c['skipped']}" for key, c in own.items() if "skipped" in c
        ]
        if not measured:
            continue
        shown = [mean_sd([cell[score] for cell in measured if cell[score] is not None]) for score in COLUMNS.values()]
        low, high = (statistics.mean(cell[f"ece_null_{end}"] for cell in measured) for end in ("low", "high"))
        shown.insert(2, f"{mean_sd([cell['ece'] for cell in measured])} [{low:.3f}, {high:.3f}]")
        ends = [f"{mean_of(measured, 'predict_seconds'):.0f} s", f"{mean_of(measured, 'mib'):.0f}", str(len(measured))]
        table.append([title, *shown, *(_outside(measured, other) for other in others), _cost(measured), *ends])
    header = ["", *list(COLUMNS)[:2], "ECE", *list(COLUMNS)[2:], *(f"OOD {other}" for other in others), "cost"]
    lines = markdown_table([*header, "predicting", "MiB", "seeds"], table) if table else []
    return [*lines, *(["", f"Without a result: {'; '.join(missing)}."] if missing else [])]


def _outside(measured: Sequence[Cell], other: str) -> str:
    values = [average([cell.get(f"ood_{other}{end}") for cell in measured]) for end in ("", "_epistemic")]
    return " / ".join("–" if value is None else f"{value:.3f}" for value in values)


def _cost(measured: Sequence[Cell]) -> str:
    full, rest = cost(measured, "epoch_seconds")
    return f"{full:.1f}" if full == rest else f"{full:.1f} ({rest:.1f})"
