"""Sentences on the calibration of a regression."""

from bayes_kf.evaluation.score import Score
from bayes_kf.evaluation.sections.verdicts.phrases import (
    DETECTABLE_ERROR,
    null_band_of,
    p_value_text,
    percent,
    percent_range,
    round_up,
)

DETECTION_FACTOR = 1.31  # 1 + 0.84·½/1.36: from the distance at the 5 % level to that detected in 80 % of data sets


def coverage_verdict(coverage: Score, level_percent: int) -> str:
    """Coverage of intervals beside its null band. It states numbers; the PIT test gives the verdict."""
    return (
        f"The {level_percent} % intervals contain {percent(coverage.value)} of the targets (null band "
        f"{percent_range(null_band_of(coverage))})."
    )


def pit_verdict(pit_ks: Score, mean_z: float, variance_z: float) -> str:
    """Whether the PIT values are uniform, and if not, in which way the forecasts are wrong.

    Args:
        pit_ks: Kolmogorov-Smirnov distance of the PIT values, with its null band and p-value.
        mean_z: Mean of the PIT values minus that of uniform values, in standard errors.
        variance_z: Variance about ½ of the PIT values minus that of uniform values, in standard errors.
    """
    p = pit_ks.p_value
    assert p is not None
    test = f"Kolmogorov-Smirnov {p_value_text(p)}"
    if p >= 0.05 and DETECTION_FACTOR * null_band_of(pit_ks).high > DETECTABLE_ERROR:
        needed = round_up((DETECTION_FACTOR * 1.36 / DETECTABLE_ERROR) ** 2)  # 1.36/√N: critical distance at 5 %
        return (
            f"Too few targets to tell whether the PIT values are uniform ({test}). About {needed:,} would detect a "
            f"distance of {DETECTABLE_ERROR:g} in four of five data sets."
        )
    if p >= 0.05:
        return f"No deviation of the PIT values from uniform detected ({test})."
    if max(abs(mean_z), abs(variance_z)) < 2:
        return f"The PIT values are not uniform ({test}): the shape of the forecasts is wrong."
    if abs(mean_z) > abs(variance_z):
        place, direction = ("upper half", "low") if mean_z > 0 else ("lower half", "high")
    else:
        place, direction = ("tails", "narrow") if variance_z > 0 else ("middle", "wide")
    return (
        f"The PIT values are not uniform ({test}): too many targets lie in the {place} of their forecasts, so the "
        f"forecasts are too {direction}."
    )


def ence_verdict(ence: Score) -> str | None:
    """Relative error of the predicted standard deviations beside its null band; None without a null band."""
    if ence.null_band is None:
        return None
    return (
        f"Predicted standard deviations differ from the observed errors by {percent(ence.value)} on average over bins "
        f"of equal size (null band up to {percent(ence.null_band.high)})."
    )
