"""Sentences on the calibration of a regression."""

import math
from typing import Literal

from bayes_kf.evaluation.report.contents import Card
from bayes_kf.evaluation.score import Score
from bayes_kf.evaluation.sections.verdicts.phrases import (
    DETECTABLE_ERROR,
    interval_of,
    minus,
    null_band_of,
    p_value_text,
    percent,
    percent_range,
    round_up,
)

DETECTABLE_CORRELATION = 0.3
GOOD_CORRELATION = 0.5  # between predicted sd and size of the error
DETECTION_FACTOR = 1.31  # 1 + 0.84·½/1.36: from the distance at the 5 % level to that detected in 80 % of data sets


def coverage_verdict(coverage: Score, level_percent: int) -> str:
    """Coverage of intervals beside its null band. It states numbers; the PIT test gives the verdict."""
    return (
        f"The {level_percent} % intervals contain {percent(coverage.value)} of the targets (null band "
        f"{percent_range(null_band_of(coverage))})."
    )


def pit_answer(pit_ks: Score) -> Literal["yes", "no", "too few"]:
    """Whether the forecasts are right, by the Kolmogorov-Smirnov test of the PIT values at the 5 % level.

    "yes" only if a distance of `DETECTABLE_ERROR` would be detected in four of five data sets.
    """
    assert pit_ks.p_value is not None
    if pit_ks.p_value < 0.05:
        return "no"
    return "too few" if DETECTION_FACTOR * null_band_of(pit_ks).high > DETECTABLE_ERROR else "yes"


def pit_card(pit_ks: Score, mean_z: float, variance_z: float, coverage: Score, num_targets: int) -> Card:
    """The answer with its headline and the coverage of the 80 % intervals; other arguments as for `pit_verdict`."""
    answer = pit_answer(pit_ks)
    inside = percent(coverage.value)
    headline = {
        "yes": "Its intervals can be trusted on inputs like these.",
        "too few": f"{num_targets:,} targets are too few to tell whether its intervals can be trusted.",
        "no": f"Do not trust its intervals, they are {_wrong_way(mean_z, variance_z)}: those of 80 % contain {inside}.",
    }[answer]
    reason = f"The 80 % intervals contain {inside}; chance alone explains {percent_range(null_band_of(coverage))}."
    return Card("probabilities", "Are the intervals right?", answer, reason, headline)


def spread_card(spearman: Score, num_targets: int) -> Card:
    """Whether errors are larger where the forecast is wider, with its headline.

    Args:
        spearman: Rank correlation of predicted standard deviations and absolute errors; NaN if all forecasts are
            equally wide.
        num_targets: Number of targets.
    """
    question = "Does it know where it errs?"
    if math.isnan(spearman.value):
        return Card(
            "errors", question, "no", "All forecasts are equally wide.", "It is equally sure of every forecast."
        )
    reason = (
        f"Rank correlation of predicted sd and size of the error {minus(f'{spearman.value:.2f}')}; guessing gives 0."
    )
    random = 1.96 / math.sqrt(max(num_targets - 1, 1))
    if spearman.value > random and interval_of(spearman).low > 0:
        if spearman.value < GOOD_CORRELATION:
            return Card("errors", question, "partly", reason, "It knows in part where it errs.")
        return Card("errors", question, "yes", reason, "It knows where it errs.")
    if 1.43 * random > DETECTABLE_CORRELATION:
        return Card("errors", question, "too few", reason, "Too few targets to tell whether it knows where it errs.")
    return Card(
        "errors",
        question,
        "no",
        reason,
        "It does not know where it errs: wide forecasts are no worse than narrow ones.",
    )


def _wrong_way(mean_z: float, variance_z: float) -> str:
    """In which way forecasts are wrong, by the mean and the variance of their PIT values."""
    if max(abs(mean_z), abs(variance_z)) < 2:
        return "of the wrong shape"
    if abs(mean_z) > abs(variance_z):
        return "too low" if mean_z > 0 else "too high"
    return "too narrow" if variance_z > 0 else "too wide"


def pit_verdict(pit_ks: Score, mean_z: float, variance_z: float) -> str:
    """Whether the PIT values are uniform, and if not, in which way the forecasts are wrong.

    Args:
        pit_ks: Kolmogorov-Smirnov distance of the PIT values, with its null band and p-value.
        mean_z: Mean of the PIT values minus that of uniform values, in standard errors.
        variance_z: Variance about ½ of the PIT values minus that of uniform values, in standard errors.
    """
    p, answer = pit_ks.p_value, pit_answer(pit_ks)
    assert p is not None
    test = f"Kolmogorov-Smirnov {p_value_text(p)}"
    if answer == "too few":
        needed = round_up((DETECTION_FACTOR * 1.36 / DETECTABLE_ERROR) ** 2)  # 1.36/√N: critical distance at 5 %
        return (
            f"Too few targets to tell whether the PIT values are uniform ({test}). About {needed:,} would detect a "
            f"distance of {DETECTABLE_ERROR:g} in four of five data sets."
        )
    if answer == "yes":
        return f"No deviation of the PIT values from uniform detected ({test})."
    way = _wrong_way(mean_z, variance_z)
    if way == "of the wrong shape":
        return f"The PIT values are not uniform ({test}): the shape of the forecasts is wrong."
    place = {"too low": "upper half", "too high": "lower half", "too narrow": "tails", "too wide": "middle"}[way]
    return (
        f"The PIT values are not uniform ({test}): too many targets lie in the {place} of their forecasts, so the "
        f"forecasts are {way}."
    )


def ence_verdict(ence: Score) -> str | None:
    """Relative error of the predicted standard deviations beside its null band; None without a null band."""
    if ence.null_band is None:
        return None
    return (
        f"Predicted standard deviations differ from the observed errors by {percent(ence.value)} on average over bins "
        f"of equal size (null band up to {percent(ence.null_band.high)})."
    )
