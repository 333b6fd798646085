"""The table of scores: a row for each score, under the heading of its group."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from bayes_kf.evaluation.report.score_labels import known_label
from bayes_kf.evaluation.report.sortable_tables import EMPTY, Cell, Column, number, range_cell
from bayes_kf.evaluation.score import Score

OTHERS = "Other scores"
GROUPS = {  # title to names of its scores, and to prefixes of such names
    "Accuracy and likelihood": (
        ("accuracy", "nll", "perplexity", "brier", "rps", "ordinal_error", "weighted_kappa", "rmse", "mse", "crps"),
        ("brier_",),
    ),
    "Calibration": (
        ("confidence", "confidence_gap", "ks", "mce", "spiegelhalter", "ence", "pit_ks", "quantile_error"),
        ("ece", "coverage_", "surprise_gap"),
    ),
    "Uncertainty": (
        ("entropy", "margin", "aleatoric", "epistemic", "sharpness", "spread_spearman", "surprise_spearman"),
        (),
    ),
    "Selective prediction and error detection": ((), ("aurc", "accuracy_at_", "error_")),
    "Out-of-distribution detection": ((), ("ood_",)),
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


def score_table(scores: Mapping[str, Score], tested: Collection[str] = ()) -> ScoreTable:
    """Every score with its interval, null band and p-value; a column that no score needs is left out.

    A name without a label stands under "Other scores" as it is. Scores named "model/score" stand under their score,
    one row for each model.

    Args:
        scores: Name to score.
        tested: Names of the scores that the report tests; only these are marked if they are outside their null band.

    Example:
        >>> table = score_table({"pit_ks": Score(0.1, null_band=(0.0, 0.05)), "mine": Score(2.0)}, tested=["pit_ks"])
        >>> [column.name for column in table.columns], [group.title for group in table.groups]
        (['Score', 'Value', 'Null band'], ['Calibration', 'Other scores'])
        >>> table.groups[0].rows[0][2].text, table.groups[0].rows[0][2].note
        ('0.0000 to 0.0500', 'value above')
    """
    shown = [column for column in OPTIONAL if any(column.cell(score, False) != EMPTY for score in scores.values())]
    groups: dict[tuple[str, str], list[tuple[Cell, ...]]] = {}
    for name, score in scores.items():
        heading, label = _place(name)
        is_tested = name in tested
        value = Cell(number(score.value), score.value, is_outside=is_tested and score.null_position != 0)
        groups.setdefault(heading, []).append((label, value, *(column.cell(score, is_tested) for column in shown)))
    return ScoreTable(
        (Column("Score", False), Column("Value", True), *(Column(column.title, True) for column in shown)),
        tuple(column.note for column in shown if column.note),
        [ScoreGroup(*heading, groups[heading]) for heading in sorted(groups, key=_rank)],
    )


def group_of(name: str) -> str:
    """The heading of a score with a label.

    Example:
        >>> group_of("ece_equal_mass"), group_of("ood_noise_auroc"), group_of("mine")
        ('Calibration', 'Out-of-distribution detection', 'Other scores')
    """
    for title, (names, prefixes) in GROUPS.items():
        if name in names or name.startswith(prefixes):
            return title
    return OTHERS


def _place(name: str) -> tuple[tuple[str, str], Cell]:
    """Heading with its remark, and the label of the row."""
    label = known_label(name)
    if label is not None:
        return (group_of(name), ""), Cell(label.name, note=label.remark)
    model, _, score = name.rpartition("/")
    label_of_score = known_label(score)
    if model and label_of_score is not None:
        return label_of_score, Cell(model)
    return (OTHERS, ""), Cell(name)


def _rank(heading: tuple[str, str]) -> int:
    """Position of a group: the known ones in their order, then those of comparisons, then the other scores."""
    titles = [*GROUPS]
    return titles.index(heading[0]) if heading[0] in GROUPS else len(titles) + (heading[0] == OTHERS)


def _interval(score: Score, is_tested: bool) -> Cell:
    """The confidence interval."""
    return EMPTY if score.interval is None else range_cell(*score.interval)


def _null_band(score: Score, is_tested: bool) -> Cell:
    """The null band; of a tested score outside it, also the side."""
    if score.null_band is None:
        return EMPTY
    side = ("", "value above", "value below")[score.null_position]
    return range_cell(*score.null_band, note=side if is_tested else "")


def _p_value(score: Score, is_tested: bool) -> Cell:
    """The p-value."""
    p = score.p_value
    if p is None:
        return EMPTY
    return Cell("<\u00a00.001" if p < 0.001 else number(p) if math.isnan(p) else f"{p:.3f}", p)


class _Optional(NamedTuple):
    """A column that is shown if some score needs it."""

    title: str
    cell: Callable[[Score, bool], Cell]
    note: str


OPTIONAL = (
    _Optional(
        "95 % interval",
        _interval,
        "The 95 % interval covers the true score in at least 90 % of simulated data sets. A score without an interval "
        "has none that is known to do so.",
    ),
    _Optional(
        "Null band",
        _null_band,
        "The null band (perfect calibration) holds 95 % of the values that a perfectly calibrated model with the same "
        "confidences shows at this sample size. For coverage the reference is correct intervals, for innovations a "
        "consistent filter. With many scores, some lie outside their band even for a calibrated model. A report "
        "therefore tests one score for each question, and prints it in bold if it lies outside its band.",
    ),
    _Optional("p-value", _p_value, ""),
)
