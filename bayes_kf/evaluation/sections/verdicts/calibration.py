"""Sentences on accuracy, confidence and calibration of a classifier."""

import math
from collections.abc import Collection, Mapping

from bayes_kf.evaluation.calibration.score_summary import PRIMARY
from bayes_kf.evaluation.report.contents import Answer, Card
from bayes_kf.evaluation.score import Score
from bayes_kf.evaluation.sections.verdicts.phrases import (
    DETECTABLE_ERROR,
    decimal_range,
    minus,
    null_band_of,
    percent,
    round_up,
)

SLIGHT_ERROR = 0.05  # a smaller calibration error is called slight
MIN_TARGETS_ASKED = 16  # 0.9^16 < 0.2: one error among examples of confidence 1


def confidence_verdict(scores: Mapping[str, Score]) -> str:
    """Mean confidence beside accuracy, with the null band of their difference. It states numbers and judges nothing."""
    gap = scores["confidence_gap"]
    low, high = null_band_of(gap)
    return (
        f"Mean confidence is {percent(scores['confidence'].value)}, accuracy {percent(scores['accuracy'].value)}: a "
        f"difference of {_signed_points(gap.value)} points (null band {_signed_points(low)} to {_signed_points(high)})."
    )


def calibration_answer(scores: Mapping[str, Score], num_targets: int) -> Answer:
    """Whether the probabilities are right, by the one test of calibration of a report, the score `PRIMARY`.

    "no" comes in at most 5 % of data sets of a calibrated model; "yes" only if an error of `DETECTABLE_ERROR` would be
    detected in four of five.
    """
    if scores[PRIMARY].null_position:
        return "no"
    return "too few" if _detectable(scores, num_targets) > DETECTABLE_ERROR else "yes"


def calibration_card(
    scores: Mapping[str, Score], num_targets: int, directions: Collection[int] = (), unit: str = "examples"
) -> Card:
    """The answer with its headline and its main numbers.

    Args:
        scores: Of the report.
        num_targets: Number of independent examples, or of clusters.
        directions: 1 if some range of confidence is too sure, −1 if some range is right more often than it says.
        unit: What is counted.
    """
    answer, error = calibration_answer(scores, num_targets), scores[PRIMARY]
    confidence, accuracy = (percent(scores[name].value) for name in ("confidence", "accuracy"))
    high = null_band_of(error).high
    reason = f"Calibration error {error.value:.3f}; chance alone explains up to {high:.3f}"
    if answer == "yes":
        headline = "Its probabilities can be trusted on inputs like these."
        reason += f". An error below {_detectable(scores, num_targets):.2g} could go unnoticed."
    elif answer == "too few":
        headline = f"{num_targets:,} {unit} are too few to tell whether its probabilities can be trusted."
        reason += f". About {needed_targets(scores, num_targets):,} in all would show an error of 0.1."
    elif error.null_position > 0:
        how = ("wrong", "too high", "too low")[scores["confidence_gap"].null_position]
        numbers = f"on average it says {confidence}, and {accuracy} are right"
        if len(set(directions)) > 1:
            how, numbers = "too high in some ranges and too low in others", "see below"
        headline = f"Do not trust its probabilities, they are {how}: {numbers}."
        if error.value < SLIGHT_ERROR:
            headline = f"Its probabilities are slightly {how}: {numbers}."
        reason += "."
    else:
        headline = "Its probabilities fit better than chance allows: are the targets independent?"
        reason = f"Calibration error {error.value:.3f}; chance alone gives at least {null_band_of(error).low:.3f}."
    return Card("probabilities", "Are the probabilities right?", answer, reason, headline)


def calibration_verdict(scores: Mapping[str, Score], num_targets: int, unit: str = "target") -> str:
    """The answer of `calibration_answer` in a sentence with its numbers; `unit` is what is counted."""
    error, answer = scores[PRIMARY], calibration_answer(scores, num_targets)
    null_band = null_band_of(error)
    error_text = f"the smooth calibration error is {error.value:.3f}"
    band = f"its null band of {decimal_range(null_band)}"
    targets = f"{num_targets:,} {unit}{'s' if num_targets != 1 else ''}"
    if error.null_position > 0:
        return f"Miscalibrated{_direction(scores['confidence_gap'])}: {error_text}, above {band} ({targets})."
    if error.null_position < 0:
        return f"{error_text.capitalize()}, below {band}: are the targets independent?"
    detectable = _detectable(scores, num_targets)
    if answer == "too few":
        few = "examples" if unit == "target" else f"{unit}s"
        return (
            f"Too few {few} to tell whether the model is calibrated: {error_text}, inside {band} ({targets}). "
            f"About {needed_targets(scores, num_targets):,} {unit}s would detect an error of {DETECTABLE_ERROR:g} in "
            "four of five data sets."
        )
    return (
        f"No miscalibration detected: {error_text}, inside {band}. With {targets}, an error of {detectable:.2g} would "
        "be detected in four of five data sets."
    )


def needed_targets(scores: Mapping[str, Score], num_targets: int) -> int:
    """About the number of targets that detects an error of `DETECTABLE_ERROR` in four of five data sets."""
    ratio = _detectable(scores, num_targets) / DETECTABLE_ERROR
    return round_up(max(MIN_TARGETS_ASKED, num_targets * ratio**2))


def _detectable(scores: Mapping[str, Score], num_targets: int) -> float:
    return detectable_error(null_band_of(scores[PRIMARY]).high, scores["confidence"].value, num_targets)


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
