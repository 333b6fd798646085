"""The results of ``run.py`` as Markdown: means over data sets, differences to the strong row, a table for each set."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.bench.registry.data_split import SEEN, UNSEEN, part
from benchmarks.bench.registry.problems import QualityProblem, RegressionProblem
from benchmarks.common.result_files import markdown_table, mean_sd
from benchmarks.quality.split import regression_rows, rows
from benchmarks.quality.split.shift import SEVERITIES

Problem = QualityProblem | RegressionProblem
Cell = Mapping[str, Any]
BASE = "strong"  # the row that others are compared with

LEGEND = (
    "Mean ± sd over seeds (training examples and their order, adapter, classifier). The strong row: AdamW in batches of"
    " 16, at most ten epochs (regressions, from scratch: a hundred), four rates, early stopping; rate, stopping and"
    " temperature by a held-out eighth. The ensemble: its best run and two more at its rate, averaged. ECE: 15 bins; in"
    " [ ] its null band, what a calibrated model would show in 95 % of samples of this size. OOD: area under the ROC"
    " curve of total and of epistemic entropy as detectors of out-of-distribution inputs. Errors: the same of total"
    " entropy for wrong answers. AURC: area under the risk-coverage curve, by confidence; lower is better. Shift: mean"
    " over three severities of corrupted test inputs. Distance: Spearman's correlation, over the test inputs, of"
    " epistemic entropy with the distance to the nearest training example, in the inputs of the frozen network's"
    " classifier, each divided by its sd. Cost: processor seconds of learning over those of an epoch of AdamW with"
    " batches of 16 on all training examples, from steps timed in the same process before and after; in parentheses"
    " without the runs of the rate search that predict nothing. NLL, RMSE and CRPS of regressions are for targets with"
    " sd 1."
)
SEALED_NOTE = "These sets were opened once, after all settings were fixed; the table is printed as it came."
SPLIT_NOTE = (
    "How the sets were split into development and sealed ones: `benchmarks/bench/registry/data_split.py`. A row that is"
    " named after a version is that of an older default."
)


def render(cells: Mapping[str, Cell], problems: Mapping[str, Problem], sealed: bool) -> list[str]:
    """Body of the Markdown file of one part of the split."""
    chosen = {name: problem for name, problem in problems.items() if problem.sealed == sealed}
    lines = [LEGEND, "", *([SEALED_NOTE, ""] if sealed else []), SPLIT_NOTE, "", *_sets(chosen, problems, sealed)]
    for kind, title in ((QualityProblem, "classification"), (RegressionProblem, "regression")):
        names = [name for name, problem in chosen.items() if isinstance(problem, kind)]
        lines += _means(cells, names, title) + _differences(cells, names, title)
    for name, problem in chosen.items():
        if table := _table(cells, name, isinstance(problem, RegressionProblem)):
            lines += ["", f"## {name}", "", f"{problem.title}.", "", *table, *_missing(cells, name)]
    return lines


def _sets(chosen: Iterable[str], problems: Mapping[str, Problem], sealed: bool) -> list[str]:
    """The names of both parts."""
    seen = {name for names in SEEN.values() for name in names}
    other = [name for name, problem in problems.items() if problem.sealed != sealed]
    new = [name for names in UNSEEN.values() for name in names if name in chosen]
    texts = [f"{part(sealed).capitalize()} sets: {', '.join(chosen)}."]
    if not sealed:
        texts.append(f"Looked at before the split: {', '.join(name for name in chosen if name in seen)}.")
        texts.append(f"Not looked at before: {', '.join(new)} (UCI sets: see there).")
    return [
        text for line in [*texts, f"{part(not sealed).capitalize()} sets: {', '.join(other)}."] for text in (line, "")
    ]


CLASSIFICATION = {  # column -> score
    "accuracy": "accuracy",
    "NLL": "nll",
    "ECE": "ece",
    "OOD total": "ood_auroc",
    "OOD epistemic": "ood_auroc_epistemic",
    "errors": "error_auroc",
    "AURC": "aurc",
    "shift NLL": "shift_nll",
    "shift ECE": "shift_ece",
    "distance": "distance_correlation",
}
REGRESSION = {"NLL": "nll", "RMSE": "rmse", "CRPS": "crps", "50 %": "coverage_50", "90 %": "coverage_90"}
COMPARED = {"classification": ("nll", "ece", "ood_auroc", "shift_nll", "shift_ece"), "regression": ("nll", "crps")}
HIGHER_IS_BETTER = {"ood_auroc"}


def _means(cells: Mapping[str, Cell], names: Sequence[str], title: str) -> list[str]:
    """Each row's mean over the data sets that all rows of the table have, beside the number of sets that it has."""
    columns = CLASSIFICATION if title == "classification" else REGRESSION
    by_row = {row: {name: _measured(cells, name, row) for name in names} for row in _rows(cells, names)}
    by_row = {row: {name: measured for name, measured in sets.items() if measured} for row, sets in by_row.items()}
    by_row = {row: sets for row, sets in by_row.items() if sets}
    common = [name for name in names if all(name in sets for sets in by_row.values())]
    if not by_row or not common:
        return []
    lines = []
    for row, sets in by_row.items():
        values = [[_mean(sets[name], score) for name in common] for score in columns.values()]
        cost = [_cost(sets[name]) for name in common]
        lines.append([_title(row, title), *(_number(_average(v)) for v in values), _costs(cost), str(len(sets))])
    note = f"Over the {len(common)} sets that all rows have: {', '.join(common)}."
    header = ["", *columns, "cost", "sets"]
    return ["", f"## Means, {title}", "", note, "", *markdown_table(header, lines)]


def _differences(cells: Mapping[str, Cell], names: Sequence[str], title: str) -> list[str]:
    """Paired differences of every row to the strong one, by score, set by set, and over the sets of both."""
    lines = []
    for row in _rows(cells, names):
        for score in COMPARED[title] if row != BASE else ():
            gaps = {name: _gaps(cells, name, row, score) for name in names}
            gaps = {name: values for name, values in gaps.items() if values}
            if not gaps:
                continue
            sign = -1 if score in HIGHER_IS_BETTER else 1
            means = [statistics.mean(values) for values in gaps.values()]
            counts = {"better": 0, "within noise": 0, "worse": 0, "one seed": 0}
            for values in gaps.values():
                counts[_verdict([sign * value for value in values])] += 1
            told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
            worst = max(gaps, key=lambda name: sign * statistics.mean(gaps[name]))
            line = [_title(row, title), score.replace("_", " "), _signed(means), str(len(gaps)), told]
            lines.append([*line, f"{worst} {statistics.mean(gaps[worst]):+.3f}"])
    if not lines:
        return []
    note = (
        "Differences are paired by set and seed; ± is the standard error over sets. By set: better or worse by more"
        " than two standard errors over seeds."
    )
    header = ["", "score", "mean difference", "sets", "by set", "worst set"]
    return ["", f"## Against the strong row, {title}", "", note, "", *markdown_table(header, lines)]


def _table(cells: Mapping[str, Cell], name: str, is_regression: bool) -> list[str]:
    title = "regression" if is_regression else "classification"
    header = ["", *(REGRESSION if is_regression else _set_columns()), "cost", "predicting", "MiB", "seeds"]
    lines = []
    for row in _rows(cells, [name]):
        if measured := _measured(cells, name, row):
            scores = _regression_scores(measured) if is_regression else _classification_scores(measured)
            ends = [f"{_mean(measured, 'predict_seconds'):.1f} s", f"{_mean(measured, 'mib'):.0f}", str(len(measured))]
            lines.append([_title(row, title), *scores, _costs([_cost(measured)]), *ends])
    return markdown_table(header, lines) if lines else []


def _set_columns() -> list[str]:
    columns = ["accuracy", "NLL", "ECE [null band]", "OOD total", "OOD epistemic", "errors", "AURC"]
    return [*columns, *(f"NLL shift {s}" for s in SEVERITIES), *(f"ECE shift {s}" for s in SEVERITIES), "distance"]


def _classification_scores(measured: Sequence[Cell]) -> list[str]:
    band = f"[{_mean(measured, 'ece_null_low'):.3f}, {_mean(measured, 'ece_null_high'):.3f}]"
    shown = [_spread(measured, "accuracy"), _spread(measured, "nll"), f"{_spread(measured, 'ece')} {band}"]
    shifts = [f"{score}_{severity}" for score in ("nll", "ece") for severity in SEVERITIES]
    others = ["ood_auroc", "ood_auroc_epistemic", "error_auroc", "aurc", *shifts, "distance_correlation"]
    return shown + [_number(_mean(measured, score)) for score in others]


def _regression_scores(measured: Sequence[Cell]) -> list[str]:
    return [_spread(measured, score) for score in ("nll", "rmse", "crps")] + [
        f"{_mean(measured, score):.2f}" for score in ("coverage_50", "coverage_90")
    ]


def _missing(cells: Mapping[str, Cell], name: str) -> list[str]:
    """The reasons that rows have no result."""
    skipped = {
        key.split("/")[1]: cell["skipped"] for key, cell in cells.items() if _of(key, name) and "skipped" in cell
    }
    told = "; ".join(f"{row}: {reason}" for row, reason in sorted(skipped.items()))
    return ["", f"Without a result: {told}."] if told else []


def _rows(cells: Mapping[str, Cell], names: Sequence[str]) -> list[str]:
    """The rows that have cells, in the order of the rows; older defaults before the present one."""
    order = [*dict.fromkeys([*rows.ROWS, *regression_rows.ROWS])]
    present = {key.split("/")[1] for key in cells if any(_of(key, name) for name in names)}

    def place(row: str) -> tuple[int, bool, str]:
        base = "default" if row.startswith("default") else row
        return (order.index(base) if base in order else len(order), row == base, row)

    return sorted(present, key=place)


def _title(row: str, title: str) -> str:
    if row.startswith("default-"):
        return f"ours, default of {row.removeprefix('default-')}"
    table = rows.ROWS if title == "classification" else regression_rows.ROWS
    return table[row][0] if row in table else row


def _of(key: str, name: str) -> bool:
    return key.startswith(f"{name}/")


def _seeds(cells: Mapping[str, Cell], name: str, row: str) -> dict[str, Cell]:
    """Measured cells of a row by seed."""
    found = {key.rpartition("/")[2]: cell for key, cell in cells.items() if key.startswith(f"{name}/{row}/")}
    return {seed: _with_shift(cell) for seed, cell in found.items() if "skipped" not in cell}


def _with_shift(cell: Cell) -> Cell:
    """The cell with means over the severities."""
    if "nll_1" not in cell:
        return cell
    means = {f"shift_{s}": statistics.mean(cell[f"{s}_{severity}"] for severity in SEVERITIES) for s in ("nll", "ece")}
    return {**cell, **means}


def _measured(cells: Mapping[str, Cell], name: str, row: str) -> list[Cell]:
    return list(_seeds(cells, name, row).values())


def _gaps(cells: Mapping[str, Cell], name: str, row: str, score: str) -> list[float]:
    own, base = _seeds(cells, name, row), _seeds(cells, name, BASE)
    return [own[seed][score] - base[seed][score] for seed in own if seed in base]


def _verdict(gaps: Sequence[float]) -> str:
    if len(gaps) < 2:
        return "one seed"
    gap, error = statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))
    return "better" if gap < -2 * error else "within noise" if gap <= 2 * error else "worse"


def _signed(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):+.3f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def _cost(measured: Sequence[Cell]) -> tuple[float, float]:
    """Epochs in all, and without the runs of the search that predict nothing."""
    full = statistics.mean(cell["seconds"] / cell["epoch_seconds"] for cell in measured)
    rest = statistics.mean(
        (cell["seconds"] - cell.get("search_seconds", 0.0)) / cell["epoch_seconds"] for cell in measured
    )
    return full, rest


def _costs(costs: Sequence[tuple[float, float]]) -> str:
    full, rest = (statistics.mean(values) for values in zip(*costs, strict=True))
    return f"{full:.1f}" if math.isclose(full, rest) else f"{full:.1f} ({rest:.1f})"


def _mean(measured: Sequence[Cell], score: str) -> float | None:
    return _average([cell.get(score) for cell in measured])


def _average(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are there; None if none is."""
    numbers = [value for value in values if value is not None]
    return statistics.mean(numbers) if numbers else None


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _spread(measured: Sequence[Cell], score: str) -> str:
    return mean_sd([cell[score] for cell in measured])
