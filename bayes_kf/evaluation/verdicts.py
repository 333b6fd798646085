"""Scores in plain sentences."""

import math
from collections.abc import Mapping

Scores = Mapping[str, float]


def confidence_verdict(scores: Scores) -> str:
    """Is the model too sure, or not sure enough, on average?"""
    gap, low, high = (scores[f"confidence_gap{suffix}"] for suffix in ("", "_null_low", "_null_high"))
    chance = high if gap > 0 else -low
    levels = f"mean confidence {_percent(scores['confidence'])}, accuracy {_percent(scores['accuracy'])}"
    if low <= gap <= high:
        return (
            f"Confidence and accuracy agree on average ({levels}): a difference of {_points(gap)} is within the "
            f"{100 * chance:.1f} that chance alone would show."
        )
    direction = "Over-confident" if gap > 0 else "Under-confident"
    return f"{direction} by {_points(gap)} on average ({levels}); chance alone would show up to {100 * chance:.1f}."


def calibration_verdict(scores: Scores, num_targets: int) -> str:
    """Is the calibration error more than chance?"""
    ece, low, high = (scores[f"ece{suffix}"] for suffix in ("", "_null_low", "_null_high"))
    chance = f"{low:.3f} to {high:.3f}"
    if ece > high:
        return f"Miscalibrated: ECE is {ece:.3f}, where chance alone would show {chance} with {num_targets:,} targets."
    if ece < low:
        return (
            f"ECE is {ece:.3f}, lower than the {chance} of a perfectly calibrated model: are the targets independent?"
        )
    size = f"{num_targets:,} targets"
    return f"No miscalibration can be seen: ECE is {ece:.3f}, and chance alone would show {chance} with {size}."


def loss_verdict(scores: Scores) -> str | None:
    """A word where the log loss is infinite."""
    if math.isfinite(scores["nll"]):
        return None
    return "At least one label was given probability zero, so the negative log-likelihood is infinite."


def ood_verdict(name: str, auroc: float) -> str:
    """How well entropy tells a foreign set."""
    share = _percent(auroc)
    return f"Foreign inputs “{name}” have the higher entropy in {share} of pairs with a known input (50 % is chance)."


def coverage_verdict(scores: Scores, percent: int) -> str:
    """Are intervals as wide as they should be?"""
    share, low, high = (scores[f"coverage_{percent}{suffix}"] for suffix in ("", "_null_low", "_null_high"))
    chance = f"right intervals would hold {_percent(low)} to {_percent(high)}"
    word = "too narrow" if share < low else "too wide" if share > high else "as it should be"
    return f"Intervals of {percent} % hold {_percent(share)} of the targets; {chance}: {word}."


def innovation_verdict(scores: Scores) -> str:
    """Is the filter as sure as its errors allow?"""
    ratio, low, high = (scores[f"innovation_ratio{suffix}"] for suffix in ("", "_null_low", "_null_high"))
    word = (
        "surer than its errors allow" if ratio > high else "less sure than it could be" if ratio < low else "consistent"
    )
    return (
        f"The filter was {word}: squared innovations are {ratio:.2f} times what it expected, "
        f"where a consistent filter would show {low:.2f} to {high:.2f}."
    )


def whiteness_verdict(scores: Scores) -> str:
    """Do innovations foretell each other?"""
    p = scores["innovation_whiteness_p"]
    size = f"p = {p:.2g}" if p >= 1e-4 else "p < 0.0001"
    if p >= 0.01:
        return f"Innovations follow each other at random, as far as can be seen ({size}, ranks, ten lags)."
    return (
        f"Large innovations come in runs ({size}, ranks, ten lags): the stream changes, or the filter lags behind it."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(gap: float) -> str:
    return f"{100 * abs(gap):.1f} points"
