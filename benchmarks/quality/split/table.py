"""The results of ``run.py`` as Markdown: means over data sets, differences to the strong row, a table for each set."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.bench.registry.data_split import ADDED, SEEN, UNSEEN, part
from benchmarks.bench.registry.problems import QualityProblem, RegressionProblem
from benchmarks.common.result_files import markdown_table, mean_sd
from benchmarks.quality.split.measured import (
    BASES,
    Cell,
    average,
    cost,
    is_of,
    mean_of,
    measured_cells,
    paired_gaps,
    row_names,
    row_title,
    verdict,
)
from benchmarks.quality.split.shift import SEVERITIES

Problem = QualityProblem | RegressionProblem

LEGEND = (
    "Mean ± sd over seeds (training examples and their order, adapter, classifier). The strong row: AdamW in batches"
    " of 16, at most ten epochs (regressions, from scratch: a hundred), four rates, early stopping; rate, stopping and"
    " temperature S by a held-out eighth, with a standard deviation of 0.5 for ln S. The ensemble: its best run and"
    " two more at its rate, averaged. ECE: 15 bins; in [ ] its null band, what a calibrated model would show in 95 %"
    " of samples of this size. OOD: area under the ROC curve of total and of epistemic entropy as detectors of"
    " out-of-distribution inputs. Errors: the same of total entropy for wrong answers. AURC: area under the"
    " risk-coverage curve, by confidence; lower is better. Shift: mean over three severities of corrupted test inputs."
    " Distance: Spearman's correlation, over the test inputs, of epistemic entropy with the distance to the nearest"
    " training example, in the inputs of the frozen network's classifier, each divided by its sd. Cost: processor"
    " seconds of learning over those of an epoch of AdamW with batches of 16 on all training examples, from steps"
    " timed in the same process before and after; in parentheses without the runs of the rate search that predict"
    " nothing; beside it in epochs of batch 1. NLL, RMSE and CRPS of regressions are for targets with sd 1."
)
SEALED_NOTE = "These sets were opened once, after all settings were fixed; the table is printed as it came."
SPLIT_NOTE = (
    "How the sets were split into development and sealed ones: `benchmarks/bench/registry/data_split.py`. A row that is"
    " named after a version is that of an older default."
)


def render(cells: Mapping[str, Cell], problems: Mapping[str, Problem], sealed: int) -> list[str]:
    """Body of the Markdown file of one part of the split."""
    chosen = {name: problem for name, problem in problems.items() if problem.sealed == sealed}
    lines = [LEGEND, "", *([SEALED_NOTE, ""] if sealed else []), SPLIT_NOTE, "", *_sets(chosen, problems, sealed)]
    for kind, title in ((QualityProblem, "classification"), (RegressionProblem, "regression")):
        names = [name for name, problem in chosen.items() if isinstance(problem, kind)]
        lines += _means(cells, names, title)
        for base in BASES:
            lines += _differences(cells, names, title, base)
    for name, problem in chosen.items():
        if table := _table(cells, name, isinstance(problem, RegressionProblem)):
            lines += ["", f"## {name}", "", f"{problem.title}.", "", *table, *_missing(cells, name)]
    return lines


def _sets(chosen: Iterable[str], problems: Mapping[str, Problem], sealed: int) -> list[str]:
    """The names of all parts."""
    seen = {name for names in SEEN.values() for name in names}
    new = [name for names in UNSEEN.values() for name in names if name in chosen]
    texts = [f"{part(sealed).capitalize()} sets: {', '.join(chosen)}."]
    if not sealed:
        texts.append(f"Looked at before the split: {', '.join(name for name in chosen if name in seen)}.")
        texts.append(f"Not looked at before: {', '.join(new)} (UCI sets: see there).")
        texts.append(f"Added after the sealed images were opened: {', '.join(ADDED)}.")
    for other in sorted({problem.sealed for problem in problems.values()} - {sealed}):
        names = [name for name, problem in problems.items() if problem.sealed == other]
        texts.append(f"{part(other).capitalize()} sets: {', '.join(names)}.")
    return [text for line in texts for text in (line, "")]


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
    "NLL, S without prior": "nll_no_prior",
    "NLL, S = 1": "nll_unscaled",
}
REGRESSION = {"NLL": "nll", "RMSE": "rmse", "CRPS": "crps", "50 %": "coverage_50", "90 %": "coverage_90"}
UNITS = {"cost": "epoch_seconds", "cost, batch 1": "single_seconds"}
COMPARED = {
    "classification": ("nll", "ece", "ood_auroc", "ood_auroc_epistemic", "shift_nll", "shift_ece"),
    "regression": ("nll", "crps"),
}
HIGHER_IS_BETTER = {"ood_auroc", "ood_auroc_epistemic"}
OF_BASE = {"ood_auroc_epistemic": "ood_auroc"}  # a point estimate has total entropy alone


def _means(cells: Mapping[str, Cell], names: Sequence[str], title: str) -> list[str]:
    """Each row's mean over the sets that the base rows and the default have; dashes for a row without some of these.

    Without such a set: over those that the base rows have.
    """
    columns = CLASSIFICATION if title == "classification" else REGRESSION
    by_row = {row: {name: measured_cells(cells, name, row) for name in names} for row in row_names(cells, names)}
    by_row = {row: {name: measured for name, measured in sets.items() if measured} for row, sets in by_row.items()}
    for needed in ({**BASES, "default": "the default"}, BASES):
        common = [name for name in names if all(name in by_row.get(row, ()) for row in needed)]
        if common:
            break
    else:
        return []
    lines = []
    for row, sets in by_row.items():
        shown = ["–"] * (len(columns) + len(UNITS))
        if all(name in sets for name in common):
            values = [[mean_of(sets[name], score) for name in common] for score in columns.values()]
            costs = [_costs([cost(sets[name], unit) for name in common]) for unit in UNITS.values()]
            shown = [*(_number(average(v)) for v in values), *costs]
        lines.append([row_title(row, title), *shown, str(len(sets))])
    *first, last = needed.values()
    note = f"Over the {len(common)} sets that {', '.join(first)} and {last} have: {', '.join(common)}."
    header = ["", *columns, *UNITS, "sets"]
    return ["", f"## Means, {title}", "", note, "", *markdown_table(header, lines)]


def _differences(cells: Mapping[str, Cell], names: Sequence[str], title: str, base: str) -> list[str]:
    """Paired differences of every further row to a base row, by score, set by set, and over the sets of both."""
    lines = []
    for row in row_names(cells, names):
        for score in COMPARED[title] if row not in (base, "strong") else ():
            gaps = {name: paired_gaps(cells, name, row, base, score, OF_BASE.get(score)) for name in names}
            gaps = {name: values for name, values in gaps.items() if values}
            if not gaps:
                continue
            sign = -1 if score in HIGHER_IS_BETTER else 1
            means = [statistics.mean(values) for values in gaps.values()]
            counts = {"better": 0, "within noise": 0, "worse": 0, "one seed": 0}
            for values in gaps.values():
                counts[verdict([sign * value for value in values])] += 1
            told = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
            worst = max(gaps, key=lambda name: sign * statistics.mean(gaps[name]))
            line = [row_title(row, title), score.replace("_", " "), _signed(means), str(len(gaps)), told]
            lines.append([*line, f"{worst} {statistics.mean(gaps[worst]):+.3f}"])
    if not lines:
        return []
    note = (
        "Differences are paired by set and seed; ± is the standard error over sets. By set: better or worse by more"
        " than two standard errors over seeds."
    )
    if "ood_auroc_epistemic" in COMPARED[title]:
        note += " ood auroc epistemic: by epistemic entropy, against the other row's by total entropy."
    header = ["", "score", "mean difference", "sets", "by set", "worst set"]
    return ["", f"## Against {BASES[base]}, {title}", "", note, "", *markdown_table(header, lines)]


def _table(cells: Mapping[str, Cell], name: str, is_regression: bool) -> list[str]:
    title = "regression" if is_regression else "classification"
    header = ["", *(REGRESSION if is_regression else _set_columns()), *UNITS, "predicting", "MiB", "seeds"]
    lines = []
    for row in row_names(cells, [name]):
        if measured := measured_cells(cells, name, row):
            scores = _regression_scores(measured) if is_regression else _classification_scores(measured)
            costs = [_costs([cost(measured, unit)]) for unit in UNITS.values()]
            ends = [
                f"{mean_of(measured, 'predict_seconds'):.1f} s",
                f"{mean_of(measured, 'mib'):.0f}",
                str(len(measured)),
            ]
            lines.append([row_title(row, title), *scores, *costs, *ends])
    return markdown_table(header, lines) if lines else []


def _set_columns() -> list[str]:
    columns = ["accuracy", "NLL", "ECE [null band]", "OOD total", "OOD epistemic", "errors", "AURC"]
    return [
        *columns,
        *(f"NLL shift {s}" for s in SEVERITIES),
        *(f"ECE shift {s}" for s in SEVERITIES),
        "distance",
        "NLL, S without prior",
        "NLL, S = 1",
    ]


def _classification_scores(measured: Sequence[Cell]) -> list[str]:
    band = f"[{mean_of(measured, 'ece_null_low'):.3f}, {mean_of(measured, 'ece_null_high'):.3f}]"
    shown = [_spread(measured, "accuracy"), _spread(measured, "nll"), f"{_spread(measured, 'ece')} {band}"]
    shifts = [f"{score}_{severity}" for score in ("nll", "ece") for severity in SEVERITIES]
    others = [
        "ood_auroc",
        "ood_auroc_epistemic",
        "error_auroc",
        "aurc",
        *shifts,
        "distance_correlation",
        "nll_no_prior",
        "nll_unscaled",
    ]
    return shown + [_number(mean_of(measured, score)) for score in others]


def _regression_scores(measured: Sequence[Cell]) -> list[str]:
    return [_spread(measured, score) for score in ("nll", "rmse", "crps")] + [
        f"{mean_of(measured, score):.2f}" for score in ("coverage_50", "coverage_90")
    ]


def _missing(cells: Mapping[str, Cell], name: str) -> list[str]:
    """The reasons that rows have no result."""
    skipped = {
        key.split("/")[1]: cell["skipped"] for key, cell in cells.items() if is_of(key, name) and "skipped" in cell
    }
    told = "; ".join(f"{row}: {reason}" for row, reason in sorted(skipped.items()))
    return ["", f"Without a result: {told}."] if told else []


def _signed(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):+.3f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def _costs(costs: Sequence[tuple[float, float]]) -> str:
    full, rest = (statistics.mean(values) for values in zip(*costs, strict=True))
    return f"{full:.1f}" if math.isclose(full, rest) else f"{full:.1f} ({rest:.1f})"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _spread(measured: Sequence[Cell], score: str) -> str:
    return mean_sd([cell[score] for cell in measured])
