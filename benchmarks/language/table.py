"""The results of ``run.py`` as Markdown: all sets together, then a table for each set of questions and reading."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from benchmarks.common.result_files import markdown_table, mean_sd
from benchmarks.language.measured import BASE, Cell, Panel, mean_gap, paired, panels
from benchmarks.language.rows import ROWS
from benchmarks.quality.split.measured import average, cost, mean_of

LEGEND = (
    "SmolLM2-135M-Instruct with LoRA of rank 8 on queries and values of the last five of its thirty layers (sets that"
    " end in -all: on all linear layers there). 200 questions to learn, 300 to test. Mean ± sd over seeds. NLL and ECE"
    " (15 bins; in [ ] its null band, what a calibrated model would show in 95 % of samples of this size) of the right"
    " option. Less AdamW's: the difference of NLL, paired by question, ± its standard error. Errors: area under the ROC"
    " curve of total entropy for wrong answers. At 80 %: accuracy on the 80 % of the questions with the highest"
    " confidence. OOD: the same area for questions of other sets, and for gibberish (words reversed and in another"
    " order), by total / epistemic entropy. Cost: processor seconds of learning over those of an epoch of AdamW with"
    " batches of 16, from steps timed in the same process; in parentheses without the runs of the rate search that"
    " predict nothing. Chance is 25 %, Winogrande's 50 %."
)
TOGETHER = (
    "Differences to AdamW's row, paired by set and reading, ± their standard error over the sets and readings; lower is"
    " better in NLL and ECE, higher in the other columns."
)
SCORES = {
    "accuracy": "accuracy",
    "NLL": "nll",
    "ECE": "ece",
    "errors": "error_auroc",
    "at 80 %": "answered_80",
    "OOD": "outside",
}


def render(cells: Mapping[str, Cell]) -> list[str]:
    """Body of the Markdown file."""
    given = panels(cells)
    lines = [LEGEND, *_together([panel for panel in given if BASE in panel.rows])]
    for panel in given:
        lines += ["", f"## {panel.name}, by {panel.reading}", "", *_table(panel)]
    return lines


def _together(given: Sequence[Panel]) -> list[str]:
    """Mean differences over all sets and readings."""
    table = []
    for row, (title, _) in ROWS.items():
        shared = [panel for panel in given if row in panel.rows]
        if row == BASE or not shared:
            continue
        shown = []
        for score in SCORES.values():
            pairs = [(_mean(panel.rows[row], score), _mean(panel.rows[BASE], score)) for panel in shared]
            known = [own - base for own, base in pairs if own is not None and base is not None]
            shown.append(str(mean_gap(known)).replace(" ± nan", "") if known else "–")
        costs = [cost(list(panel.rows[row].values()), "epoch_seconds")[0] for panel in shared]
        table.append([title, *shown, f"{statistics.mean(costs):.1f}", str(len(shared))])
    if not table:
        return []
    return ["", "## All sets", "", TOGETHER, "", *markdown_table(["", *SCORES, "cost", "sets and readings"], table)]


def _mean(cells: Mapping[str, Cell], score: str) -> float | None:
    """A row's mean score over seeds; "outside" is the mean of the areas for other questions, by total entropy."""
    if score != "outside":
        return mean_of(list(cells.values()), score)
    areas = [
        value
        for cell in cells.values()
        for name, value in cell.items()
        if name.startswith("ood_") and not name.endswith("_epistemic")
    ]
    return average(areas)


def _table(panel: Panel) -> list[str]:
    table = []
    for row, by_seed in panel.rows.items():
        measured = list(by_seed.values())
        low, high = (statistics.mean(cell[f"ece_null_{end}"] for cell in measured) for end in ("low", "high"))
        gap = paired(panel, row, BASE) if row != BASE else None
        table.append([
            ROWS[row][0],
            _scores(measured, "accuracy"),
            _scores(measured, "nll"),
            "–" if gap is None else str(gap),
            f"{_scores(measured, 'ece')} [{low:.3f}, {high:.3f}]",
            _scores(measured, "error_auroc"),
            _scores(measured, "answered_80"),
            *(_outside(measured, other) for other in panel.others),
            _cost(measured),
            f"{mean_of(measured, 'predict_seconds'):.0f} s",
            f"{mean_of(measured, 'mib'):.0f}",
            str(len(measured)),
        ])  # fmt: skip
    outside = [f"OOD {other}" for other in panel.others]
    header = ["", "accuracy", "NLL", "less AdamW's", "ECE", "errors", "at 80 %", *outside, "cost", "predicting", "MiB"]
    lines = markdown_table([*header, "seeds"], table) if table else []
    return [*lines, *(["", f"Without a result: {'; '.join(panel.missing)}."] if panel.missing else [])]


def _scores(measured: Sequence[Cell], score: str) -> str:
    return mean_sd([cell[score] for cell in measured if cell[score] is not None])


def _outside(measured: Sequence[Cell], other: str) -> str:
    values = [average([cell.get(f"ood_{other}{end}") for cell in measured]) for end in ("", "_epistemic")]
    return " / ".join("–" if value is None else f"{value:.3f}" for value in values)


def _cost(measured: Sequence[Cell]) -> str:
    full, rest = cost(measured, "epoch_seconds")
    return f"{full:.1f}" if full == rest else f"{full:.1f} ({rest:.1f})"
