"""The headline scores as strips: value, null band and interval of each on an axis of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from bayes_kf.evaluation.report.score_labels import label_of
from bayes_kf.evaluation.report.sortable_tables import number
from bayes_kf.evaluation.score import Interval, Score

MOST = 8
HEADLINES = (
    "accuracy",
    "nll",
    "brier",
    "rmse",
    "crps",
    "surprise_gap",
    "surprise_spearman",
    "ece_smooth",
    "confidence_gap",
    "pit_ks",
    "coverage_50",
    "coverage_80",
    "coverage_95",
    "ence",
    "error_entropy_auroc",
    "spread_spearman",
    "accuracy_at_80",
)
AT_ZERO = ("confidence_gap", "spread_spearman", "surprise_gap", "surprise_spearman")
REFERENCES = {"error_entropy_auroc": 0.5} | dict.fromkeys(AT_ZERO, 0.0)  # what chance gives
OOD_REFERENCE = 0.5
MARGIN = 0.12  # of the axis on both sides


class Strip(NamedTuple):
    """A score, ready for the template; places are percentages of the axis.

    Attributes:
        name: Of the score for readers.
        remark: On its direction.
        text: The value.
        value: Its place.
        interval: Places of the ends of its interval, None without one.
        band: Places of the ends of its null band, None without one.
        reference: Place of what chance gives, None where that is unknown.
        ends: The numbers at both ends of the axis.
        is_outside: Whether the score is tested and outside its null band.
        description: The strip in words.
    """

    name: str
    remark: str
    text: str
    value: float
    interval: tuple[float, float] | None
    band: tuple[float, float] | None
    reference: float | None
    ends: tuple[str, str]
    is_outside: bool
    description: str


def score_strips(scores: Mapping[str, Score], tested: list[str]) -> list[Strip]:
    """Strips of the main scores, at most `MOST`; a score that is not finite has none.

    Example:
        >>> score = Score(0.3, Interval(0.2, 0.4), Interval(0.0, 0.1))
        >>> strip, = score_strips({"ece_smooth": score, "mine": Score(1.0)}, ["ece_smooth"])
        >>> strip.text, strip.is_outside, strip.ends, round(strip.value)
        ('0.3000', True, ('0', '0.448'), 67)
    """
    chosen = [name for name in HEADLINES if name in scores]
    detectors = [name for name in scores if name.startswith("ood_") and name.endswith("_auroc")]
    room = MOST - min(2, len(detectors))
    names = [*chosen[:room], *detectors[: MOST - len(chosen[:room])]]
    return [_strip(name, scores[name], name in tested) for name in names if math.isfinite(scores[name].value)]


def _strip(name: str, score: Score, is_tested: bool) -> Strip:
    reference = OOD_REFERENCE if name.startswith("ood_") else REFERENCES.get(name)
    known = [score.value, *(score.interval or ()), *(score.null_band or ())]
    known += [] if reference is None else [reference]
    low, high = _axis([place for place in known if math.isfinite(place)])

    def place(value: float) -> float:
        return 100 * min(max((value - low) / (high - low), 0.0), 1.0)

    def both(ends: Interval | None) -> tuple[float, float] | None:
        return None if ends is None or any(map(math.isnan, ends)) else (place(ends.low), place(ends.high))

    label = label_of(name)
    described = [f"{label.name} {number(score.value)}"]
    if score.interval is not None:
        described.append(f"95 % interval {number(score.interval.low)} to {number(score.interval.high)}")
    if score.null_band is not None:
        described.append(f"null band {number(score.null_band.low)} to {number(score.null_band.high)}")
    return Strip(
        label.name,
        label.remark,
        number(score.value),
        place(score.value),
        both(score.interval),
        both(score.null_band),
        None if reference is None else place(reference),
        (_short(low), _short(high)),
        is_tested and score.null_position != 0,
        ", ".join(described) + ".",
    )


def _axis(known: list[float]) -> tuple[float, float]:
    """Ends of an axis that holds all numbers with a margin; it does not pass zero or one unless they do."""
    least, most = min(known), max(known)
    margin = MARGIN * (most - least) or 0.05 * (abs(most) or 1.0)
    low, high = least - margin, most + margin
    low = max(low, 0.0) if least >= 0 else low
    high = min(high, 1.0) if most <= 1 else high
    return (low, high) if high > low else (low, low + 1.0)


def _short(value: float) -> str:
    """An end of an axis with three digits."""
    return f"{value:.3g}".replace("-", "−")
