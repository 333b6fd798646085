"""The results of ``run.py`` as Markdown: a table for each data set, and a comparison with the best other row."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.bench.registry.problems import QualityProblem
from benchmarks.common.result_files import markdown_table, mean_sd
from benchmarks.quality.rows import ROWS

Cells = Mapping[str, Mapping[str, Any]]
# rows that are compared with the best other row
OURS = {"default": "default", "sampled": "sampled", "post-hoc": "post hoc", "post-hoc-on": "post hoc, on"}

LEGEND = (
    "One pass over the stream, one example at a time; AdamW with three passes takes three, and this package's default"
    " eight examples at a time, a pass of the filter and three of the mean, twice over. Mean ± sd over"
    " seeds (order, adapter, classifier, and where there is no official split the split). ECE: 15 bins; in [ ] what a"
    " calibrated model with these confidences would show in 95 % of samples of this size. OOD, errors: area under the"
    " ROC curve of predictive entropy as a detector of out-of-distribution inputs and of wrong answers. Cost: processor"
    " seconds of learning over those of a pass of AdamW, from steps timed in the same process before and after;"
    " predicting: seconds for the held-out part. MiB: peak while learning. Rates of AdamW, IVON and SVI were chosen on"
    " the last eighth of seed 0's stream, which is not counted as cost (3.5 passes for AdamW's four). The row"
    " with sampled curvature was measured as a default. On CLINC150 the rows of a single pass and post hoc have sampled"
    " curvature, as `fit` takes it above 32 outputs. People: cross-entropy against the shares of CIFAR-10H's"
    " answers."
)


def render(cells: Cells, problems: Mapping[str, QualityProblem]) -> list[str]:
    """Body of the Markdown file."""
    lines = [LEGEND, "", *_summary(cells, problems)]
    for data, problem in problems.items():
        rows = [row for row in ROWS if _seeds(cells, data, row)]
        if rows:
            lines += ["", f"## {data}", "", f"{problem.title}.", "", *_table(cells, data, rows), *_notes(cells, data)]
    return lines


def _table(cells: Cells, data: str, rows: Sequence[str]) -> list[str]:
    human = any("human_nll" in c for row in rows for c in _seeds(cells, data, row).values())
    header = ["", "online", "accuracy", "NLL", "Brier", "ECE [null band]"] + ["people"] * human
    header += ["OOD", "errors", "cost", "predicting", "MiB", "seeds"]
    lines = []
    for row in rows:
        measured = [c for c in _seeds(cells, data, row).values() if "skipped" not in c]
        name = ROWS[row][0]
        if not measured:
            lines.append([name, *["–"] * (len(header) - 1)])
            continue
        band = f"[{_mean(measured, 'ece_null_low'):.3f}, {_mean(measured, 'ece_null_high'):.3f}]"
        line = [name, f"{_mean(measured, 'online_accuracy'):.3f}" if "online_accuracy" in measured[0] else "–"]
        line += [_spread(measured, "accuracy"), _spread(measured, "nll"), f"{_mean(measured, 'brier'):.3f}"]
        line += [f"{_spread(measured, 'ece')} {band}"]
        line += [f"{_mean(measured, 'human_nll'):.3f}"] if human else []
        line += [f"{_mean(measured, 'ood_auroc'):.3f}", f"{_mean(measured, 'error_auroc'):.3f}"]
        cost = statistics.mean(c["seconds"] / c["adamw_seconds"] for c in measured)
        line += [
            f"{cost:.1f}",
            f"{_mean(measured, 'predict_seconds'):.1f} s",
            f"{_mean(measured, 'mib'):.0f}",
            str(len(measured)),
        ]
        lines.append(line)
    return markdown_table(header, lines)


def _notes(cells: Cells, data: str) -> list[str]:
    """Chosen rates, and the reasons that rows could not run."""
    lines = []
    for key, cell in cells.items():
        place, kind, what = key.split("/")
        if place == data and kind == "rates":
            lines.append(f"{what}: " + ", ".join(f"{name} {value:g}" for name, value in cell["choice"].items()))
    missing = {
        f"{ROWS[row][0]}: {cell['skipped']}"
        for row in ROWS
        for cell in _seeds(cells, data, row).values()
        if "skipped" in cell
    }
    notes = [("Chosen rates", lines), ("Without a result", missing)]
    return [text for what, texts in notes if texts for text in ("", f"{what}: {'; '.join(sorted(texts))}.")]


def _summary(cells: Cells, problems: Iterable[str]) -> list[str]:
    """NLL and ECE of the package's main rows and the best other row, over the seeds that both have."""
    lines = []
    for data in problems:
        for (ours, name), score in itertools.product(OURS.items(), ("nll", "ece")):
            own = _scores(cells, data, ours, score)
            others = {row: _scores(cells, data, row, score) for row in ROWS if not _is_ours(row)}
            if ours.startswith("post-hoc"):
                others = {"adamw": others["adamw"]}
            most = max((len(set(own) & set(by_seed)) for by_seed in others.values()), default=0)
            if most == 0:
                continue
            others = {row: by_seed for row, by_seed in others.items() if len(set(own) & set(by_seed)) == most}
            own = {seed: value for seed, value in own.items() if all(seed in by_seed for by_seed in others.values())}
            if not own:
                continue
            best = min(others, key=lambda row: statistics.mean(others[row][seed] for seed in own))
            gaps = [own[seed] - others[best][seed] for seed in own]
            gap, error = statistics.mean(gaps), _error(gaps)
            verdict = "better" if gap < -2 * error else "within noise" if gap <= 2 * error else "worse"
            verdict = "one seed" if math.isnan(error) else verdict
            mean, theirs = statistics.mean(own.values()), statistics.mean(others[best][s] for s in own)
            lines.append(
                [
                    data,
                    name,
                    score.upper(),
                    f"{mean:.3f}",
                    f"{theirs:.3f}",
                    ROWS[best][0],
                    f"{gap:+.3f}" if math.isnan(error) else f"{gap:+.3f} ± {error:.3f}",
                    verdict,
                ]
            )
    if not lines:
        return []
    header = ["data", "row", "score", "ours", "theirs", "best other row", "difference ± se", ""]
    note = (
        "Against the best other row by the mean, picked after the fact (the post hoc rows: against the adapter that"
        " they are given), over the seeds that rows share with it. Standard error over paired seeds; within noise:"
        " within two of them. Two or three seeds make that a rough one."
    )
    return ["## Against the best", "", note, "", *markdown_table(header, lines)]


def _is_ours(row: str) -> bool:
    return row in ("diagonal", "online", *OURS)


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _scores(cells: Cells, data: str, row: str, score: str) -> dict[str, float]:
    return {seed: c[score] for seed, c in _seeds(cells, data, row).items() if "skipped" not in c}


def _spread(measured: Sequence[Mapping[str, Any]], key: str) -> str:
    return mean_sd([cell[key] for cell in measured])


def _mean(measured: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.mean(cell[key] for cell in measured)


def _seeds(cells: Cells, data: str, row: str) -> dict[str, Mapping[str, Any]]:
    """The cells of a row, by seed."""
    return {key.rpartition("/")[2]: cell for key, cell in cells.items() if key.startswith(f"{data}/{row}/")}
