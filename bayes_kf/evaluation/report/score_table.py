"""The table of scores: which of them belong together, and which are only the interval or the band of another."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from bayes_kf.evaluation.classification.score_summary import PRIMARY
from bayes_kf.evaluation.report.html_page import known_label, number
from bayes_kf.evaluation.report.sortable_tables import Cell, Column, sort_value
from bayes_kf.evaluation.score import position_in_band

Found = Mapping[str, float]  # suffix to number; the score itself has the empty suffix

SUFFIXES = ("_null_mean", "_null_low", "_null_high", "_p_value", "_low", "_high")
OTHERS = "Other scores"
TESTED = (PRIMARY, "pit_ks", "conformal_coverage", "innovation_ratio")  # one test for each thing a report tests
GROUPS = {  # title to the names of its scores, and to what names of its scores start with
    "Accuracy and likelihood": (("accuracy", "nll", "brier", "rps", "rmse", "crps"), ("brier_",)),
    "Calibration": (
        ("confidence", "confidence_gap", "ks", "mce", "spiegelhalter", "ence", "pit_ks", "quantile_error"),
        ("ece", "coverage_"),
    ),
    "Uncertainty": (("entropy", "margin", "aleatoric", "epistemic", "sharpness"), ()),
    "Selective prediction and error detection": ((), ("aurc", "accuracy_at_", "error_")),
    "Foreign inputs": ((), ("ood_",)),
    "Recalibration": ((), ("recalibrated_",)),
    "Conformal sets": ((), ("conformal_",)),
    "Agreement with people": ((), ("human_",)),
    "Online": ((), ("online_", "prequential_", "innovation_")),
}


class ScoreGroup(NamedTuple):
    """Rows under one heading."""

    title: str
    note: str
    rows: list[tuple[Cell, ...]]


class ScoreTable(NamedTuple):
    """The table of scores, ready for the template."""

    columns: tuple[Column, ...]
    notes: tuple[str, ...]  # what the columns mean
    groups: list[ScoreGroup]


def score_table(scores: Mapping[str, float]) -> ScoreTable:
    """Every score with its interval, band of chance and p-value; only columns that some score has.

    `x_low` and `x_high` are the interval of a score `x`, `x_null_low` and `x_null_high` its null band, `x_p_value` its
    p-value: where there is an `x`. Of the scores with bands only those that a report tests are marked outside them. A
    name without a label stands under "Other scores" as it is. Scores named "model/score" stand under their score, a row
    for each model.

    Args:
        scores: Name to number.

    Example:
        >>> table = score_table({"pit_ks": 0.1, "pit_ks_null_low": 0.0, "pit_ks_null_high": 0.05, "mine": 2.0})
        >>> [column.name for column in table.columns], [group.title for group in table.groups]
        (['Score', 'Value', 'Chance alone'], ['Calibration', 'Other scores'])
        >>> table.groups[0].rows[0][2].text, table.groups[0].rows[0][2].note
        ('0.0000 to 0.0500', 'value above')
    """
    found = _gathered(scores)
    optional = [column for column in OPTIONAL if any(column.suffix in parts for parts in found.values())]
    groups: dict[tuple[str, str], list[tuple[Cell, ...]]] = {}
    for name, parts in found.items():
        heading, label = _place(name)
        shown = parts | {"tested": float(name in TESTED)}
        row = (label, _value(shown), *(column.cell(shown) for column in optional))
        groups.setdefault(heading, []).append(row)
    columns = (Column("Score", False), Column("Value", True), *(Column(column.title, True) for column in optional))
    return ScoreTable(
        columns,
        tuple(column.note for column in optional if column.note),
        [ScoreGroup(*heading, groups[heading]) for heading in sorted(groups, key=_rank)],
    )


def group_of(name: str) -> str:
    """The heading that a score with a label stands under.

    Example:
        >>> group_of("ece_equal_mass"), group_of("ood_noise_auroc"), group_of("mine")
        ('Calibration', 'Foreign inputs', 'Other scores')
    """
    for title, (names, starts) in GROUPS.items():
        if name in names or name.startswith(starts):
            return title
    return OTHERS


def _gathered(scores: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Name of each score to its number and those of its interval, band and test, by suffix."""
    found: dict[str, dict[str, float]] = {}
    for name, value in scores.items():
        owner = _owner(name, scores)
        found.setdefault(owner, {})[name.removeprefix(owner)] = value
    return found


def _owner(name: str, scores: Mapping[str, float]) -> str:
    """The score that a name says something about: the one it is the interval, band or p-value of, or itself."""
    for suffix in SUFFIXES:
        base = name.removesuffix(suffix)
        if base != name and base in scores and _owner(base, scores) == base:
            return base
    return name


def _place(name: str) -> tuple[tuple[str, str], Cell]:
    """Heading with its remark, and the label of the row."""
    label = known_label(name)
    if label is not None:
        return (group_of(name), ""), Cell(label[0], note=label[1])
    model, _, score = name.rpartition("/")
    of_model = known_label(score)
    if model and of_model is not None:
        return of_model, Cell(model)
    return (OTHERS, ""), Cell(name)


def _rank(heading: tuple[str, str]) -> int:
    """Groups in their order, then those of comparisons as they came, then the rest."""
    titles = [*GROUPS]
    return titles.index(heading[0]) if heading[0] in GROUPS else len(titles) + (heading[0] == OTHERS)


def _value(parts: Found) -> Cell:
    """The value of a score."""
    return Cell(number(parts[""]), sort_value(parts[""]), is_outside=_side(parts) != "")


def _interval(parts: Found) -> Cell:
    """The interval of a score."""
    return _span(parts, "_low", "_high")


def _band(parts: Found) -> Cell:
    """What chance alone would show, and on which side of it the score lies."""
    return _span(parts, "_null_low", "_null_high")._replace(note=_side(parts))


def _span(parts: Found, low: str, high: str) -> Cell:
    """Both ends, or nothing."""
    if low not in parts and high not in parts:
        return Cell("")
    ends = parts.get(low, math.nan), parts.get(high, math.nan)
    if all(math.isnan(end) for end in ends):
        return Cell(number(math.nan))
    return Cell(f"{number(ends[0])} to {number(ends[1])}", sort_value(ends[0]))


def _side(parts: Found) -> str:
    """A word where a score that is tested lies outside its null band."""
    if not parts["tested"]:
        return ""
    where = position_in_band(parts[""], parts.get("_null_low", -math.inf), parts.get("_null_high", math.inf))
    return ("", "value above", "value below")[where]


def _p_value(parts: Found) -> Cell:
    """The p-value of a score."""
    p = parts.get("_p_value")
    if p is None:
        return Cell("")
    return Cell("<\u00a00.001" if p < 0.001 else number(p) if math.isnan(p) else f"{p:.3f}", sort_value(p))


class _Optional(NamedTuple):
    """A column that stands only where some score has it."""

    title: str
    suffix: str
    cell: Callable[[Found], Cell]
    note: str


OPTIONAL = (
    _Optional(
        "95 % interval",
        "_low",
        _interval,
        "“95 % interval” covers the true score in at least 90 % of simulated data sets; of scores without one no such "
        "interval is known.",
    ),
    _Optional(
        "Chance alone",
        "_null_low",
        _band,
        "“Chance alone” is the range that holds 95 % of what a perfectly calibrated model of the same confidences (for "
        "coverage: right intervals; for innovations: a consistent filter) would show at this sample size. "
        "Many scores leave their ranges by chance more often than one. A report tests one score for each question and "
        "prints it bold where it lies outside its range.",
    ),
    _Optional("p-value", "_p_value", _p_value, ""),
)
