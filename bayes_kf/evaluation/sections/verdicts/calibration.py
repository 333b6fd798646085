"""Sentences on accuracy, confidence and calibration of a classifier."""

import math
from collections.abc import Mapping

from bayes_kf.evaluation.classification.score_summary import PRIMARY
from bayes_kf.evaluation.score import Score
from bayes_kf.evaluation.sections.verdicts.phrases import (
    DETECTABLE_ERROR,
    decimal_range,
    minus,
    null_band_of,
    percent,
    round_up,
)

MIN_TARGETS_ASKED = 16  # 0.9^16 < 0.2: one error among examples of confidence 1


def confidence_verdict(scores: Mapping[str, Score]) -> str:
    """Mean confidence beside accuracy, with the null band of their difference. It states numbers and judges nothing."""
    gap = scores["confidence_gap"]
    low, high = null_band_of(gap)
    return (
        f"Mean confidence is {percent(scores['confidence'].value)}, accuracy {percent(scores['accuracy'].value)}: a "
        f"difference of {_signed_points(gap.value)} points (null band {_signed_points(low)} to {_signed_points(high)})."
    )


def calibration_verdict(scores: Mapping[str, Score], num_targets: int) -> str:
    """Whether the model is calibrated, miscalibrated, or there are too few examples to tell.

    This is the one test of calibration of a report, by the score `PRIMARY`. For a calibrated model it says
    "miscalibrated" in at most 5 % of data sets.
    """
    error = scores[PRIMARY]
    null_band = null_band_of(error)
    error_text = f"the smooth calibration error is {error.value:.3f}"
    band = f"its null band of {decimal_range(null_band)}"
    targets = f"{num_targets:,} target{'s' if num_targets != 1 else ''}"
    if error.null_position > 0:
        return f"Miscalibrated{_direction(scores['confidence_gap'])}: {error_text}, above {band} ({targets})."
    if error.null_position < 0:
        return f"{error_text.capitalize()}, below {band}: are the targets independent?"
    detectable = detectable_error(null_band.high, scores["confidence"].value, num_targets)
    if detectable > DETECTABLE_ERROR:
        needed = round_up(max(MIN_TARGETS_ASKED, num_targets * (detectable / DETECTABLE_ERROR) ** 2))
        return (
            f"Too few examples to tell whether the model is calibrated: {error_text}, inside {band} ({targets}). "
            f"About {needed:,} targets would detect an error of {DETECTABLE_ERROR:g} in four of five data sets."
        )
    return (
        f"No miscalibration detected: {error_text}, inside {band}. With {targets}, an error of {detectable:.2g} would "
        "be detected in four of five data sets."
    )


def detectable_error(null_high: float, confidence: float, num_targets: int) -> float:
    """The smallest calibration error that the test detects in at least 80 % of data sets of this size, approximately.

    It is the upper end of the null band plus 0.84 standard deviations of the accuracy that a model with an error of
    `DETECTABLE_ERROR` has, and at least the error rate at which 20 % of data sets have no error among N examples.
    """
    accuracy = min(max(confidence - DETECTABLE_ERROR, 0.0), 1.0)
    accuracy_sd = math.sqrt(max(accuracy * (1 - accuracy), 0.0) / num_targets)
    return max(null_high + 0.8416 * accuracy_sd, 1 - 0.2 ** (1 / num_targets))


def loss_verdict(scores: Mapping[str, Score]) -> str | None:
    """A warning if the log loss is infinite, else None."""
    if math.isfinite(scores["nll"].value):
        return None
    return "At least one label has predicted probability zero, so the negative log-likelihood is infinite."


def _direction(gap: Score) -> str:
    """The direction of the miscalibration, if the confidence gap is outside its null band too."""
    return ("", ", over-confident on average", ", under-confident on average")[gap.null_position]


def _signed_points(share: float) -> str:
    """A difference in percentage points with its sign; zero has none."""
    text = minus(f"{100 * share:+.1f}")
    return "0.0" if text in ("+0.0", "−0.0") else text
