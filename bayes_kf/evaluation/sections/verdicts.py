"""Scores in plain sentences."""

import math
import re
from collections.abc import Mapping

from bayes_kf.evaluation.classification.comparison import ScoreComparison
from bayes_kf.evaluation.classification.score_summary import PRIMARY
from bayes_kf.evaluation.score import position_in_band

Scores = Mapping[str, float]

PLAIN_NAME = re.compile(r"[\w./+-]*\w")
UNNOTICED = 0.6  # an AUROC known to be below is of no use, where one half is chance
TOLD_ERROR = 0.1  # fewer examples than show a calibration error of this size in 80 % of data sets are too few
PIT_TOLD = 1.31  # 1 + 0.84·½/1.36: from the distance that chance shows in 5 % to what a test sees in 80 %
TOLD_AUROC = 0.15  # above one half, for the detection of errors
TOLD_RANK = 0.3  # for rank correlations
TOLD_RATIO = 1.5  # squared innovations over what was expected: a band that reaches further tells little
FEWEST_TOLD = 16  # 0.9^16 < 0.2: one error among examples of confidence 1


def confidence_verdict(scores: Scores) -> str:
    """Mean confidence beside accuracy, with the null band of their difference; a number, not a verdict."""
    gap, low, high = (scores[f"confidence_gap{suffix}"] for suffix in ("", "_null_low", "_null_high"))
    return (
        f"Mean confidence is {_percent(scores['confidence'])}, accuracy {_percent(scores['accuracy'])}: a difference "
        f"of {_signed_points(gap)} points, where chance alone shows {_signed_points(low)} to {_signed_points(high)}."
    )


def calibration_verdict(scores: Scores, num_targets: int) -> str:
    """Is the model calibrated, is it not, or are there too few examples to tell?

    This is the one test of calibration of a report, by `PRIMARY`; of a calibrated model it says "miscalibrated" in at
    most 5 % of data sets.
    """
    error, low, high = (scores[f"{PRIMARY}{suffix}"] for suffix in ("", "_null_low", "_null_high"))
    chance, where = f"{low:.3f} to {high:.3f}", position_in_band(error, low, high)
    found = f"the smooth calibration error is {error:.3f}"
    targets = f"{num_targets:,} target{'s' if num_targets != 1 else ''}"
    if where > 0:
        return f"Miscalibrated{_direction(scores)}: {found}, where chance alone would show {chance} with {targets}."
    if where < 0:
        return f"{found.capitalize()}, lower than the {chance} of a calibrated model: are the targets independent?"
    least = detectable_error(high, scores["confidence"], num_targets)
    if least > TOLD_ERROR:
        needed = _rounded_up(max(FEWEST_TOLD, num_targets * (least / TOLD_ERROR) ** 2))
        return (
            f"Too few examples to tell whether the model is calibrated: {found}, and chance alone would show {chance} "
            f"with {targets}. About {needed:,} would show an error of {TOLD_ERROR:g} in four of five data sets."
        )
    return (
        f"No miscalibration can be seen: {found}, and chance alone would show {chance}. With {targets} an error of "
        f"{least:.2g} would be seen in four of five data sets."
    )


def detectable_error(null_high: float, confidence: float, num_targets: int) -> float:
    """The smallest calibration error that a test shows in at least 80 % of data sets of this size, about.

    The upper end of the null band and 0.84 standard deviations of the accuracy that a model off by `TOLD_ERROR` has;
    and no less than the share of errors that leaves N examples without one in 20 % of data sets.
    """
    accuracy = min(max(confidence - TOLD_ERROR, 0.0), 1.0)
    spread = math.sqrt(max(accuracy * (1 - accuracy), 0.0) / num_targets)
    return max(null_high + 0.8416 * spread, 1 - 0.2 ** (1 / num_targets))


def _direction(scores: Scores) -> str:
    """On which side a miscalibrated model is on average, where that is more than chance too."""
    gap, low, high = (scores[f"confidence_gap{suffix}"] for suffix in ("", "_null_low", "_null_high"))
    return ("", ", over-confident on average", ", under-confident on average")[position_in_band(gap, low, high)]


def _rounded_up(number: float) -> int:
    """To two digits."""
    unit = 10 ** max(0, math.floor(math.log10(number)) - 1)
    return math.ceil(number / unit - 1e-9) * unit


def _signed_points(share: float) -> str:
    """A difference in points with its sign; what rounds to nothing has none."""
    text = f"{100 * share:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def loss_verdict(scores: Scores) -> str | None:
    """A word where the log loss is infinite."""
    if math.isfinite(scores["nll"]):
        return None
    return "At least one label was given probability zero, so the negative log-likelihood is infinite."


def coverage_verdict(scores: Scores, percent: int) -> str:
    """How many targets intervals hold, beside the null band; a number, not a verdict: that is the PIT's."""
    share, low, high = (scores[f"coverage_{percent}{suffix}"] for suffix in ("", "_null_low", "_null_high"))
    chance = f"right intervals would hold {_percent(low)} to {_percent(high)}"
    return f"Intervals of {percent} % hold {_percent(share)} of the targets; {chance}."


def innovation_verdict(scores: Scores) -> str:
    """Is the filter as sure as its errors allow?"""
    ratio, low, high = (scores[f"innovation_ratio{suffix}"] for suffix in ("", "_null_low", "_null_high"))
    where = position_in_band(ratio, low, high)
    if where == 0 and high > TOLD_RATIO:
        needed = _rounded_up(2.0 * (1.96 / (TOLD_RATIO - 1.0)) ** 2)  # χ²/d has the variance 2/d
        return (
            f"Too few updates to tell whether the filter was consistent: squared innovations are {ratio:.2f} times "
            f"what it expected, where a consistent filter would show {low:.2f} to {high:.2f}. About {needed:,} "
            f"degrees of freedom would tell {TOLD_RATIO:g} from 1."
        )
    word = ("consistent", "surer than its errors allow", "less sure than it could be")[where]
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


def pit_verdict(scores: Scores, mean_z: float, spread_z: float) -> str:
    """Do targets fall where their forecasts say, and if not, in which way?

    `mean_z` and `spread_z` are the mean and the variance of the PIT values less those of right forecasts, in standard
    errors.
    """
    p = scores["pit_ks_p_value"]
    size = f"p = {p:.2g}" if p >= 1e-4 else "p < 0.0001"
    test = f"Kolmogorov-Smirnov {size}"
    least = PIT_TOLD * scores["pit_ks_null_high"]
    if p >= 0.05 and least > TOLD_ERROR:
        needed = _rounded_up((PIT_TOLD * 1.36 / TOLD_ERROR) ** 2)  # 1.36/√N is what chance shows in 5 %
        return (
            f"Too few targets to tell whether they fall evenly over their forecasts ({test}). About {needed:,} would "
            f"show a distance of {TOLD_ERROR:g} in four of five data sets."
        )
    if p >= 0.05:
        return f"Targets fall evenly over their forecasts, as far as can be seen ({test})."
    if max(abs(mean_z), abs(spread_z)) < 2:
        return f"Targets do not fall evenly over their forecasts ({test}): their shape is not right."
    if abs(mean_z) > abs(spread_z):
        place, bias = ("upper", "low") if mean_z > 0 else ("lower", "high")
        return f"Targets fall too often into the {place} half of their forecasts ({test}): forecasts are too {bias}."
    place, width = ("tails", "narrow") if spread_z > 0 else ("middle", "wide")
    return f"Targets fall too often into the {place} of their forecasts ({test}): forecasts are too {width}."


def spread_verdict(scores: Scores) -> str | None:
    """How far errors are from predicted spreads, beside the null band; None where none is known."""
    if "ence_null_high" not in scores:
        return None
    ence, high = scores["ence"], scores["ence_null_high"]
    return (
        f"Predicted spreads are {_percent(ence)} off the errors found, on average over bins from the surest to the "
        f"least sure forecasts, where chance alone would show up to {_percent(high)}."
    )


def human_verdict(scores: Scores) -> str:
    """What people's answers cost under the predicted probabilities, and how much of it people's own doubt is."""
    nll, entropy, divergence = (scores[f"human_{name}"] for name in ("nll", "entropy", "kl"))
    if not math.isfinite(nll):
        return "At least one answer that people gave has probability zero, so their log-likelihood is infinite."
    low, high = scores.get("human_kl_low"), scores.get("human_kl_high")
    span = "" if low is None or high is None else f" ({low:.3f} to {high:.3f})"
    return (
        f"People's answers cost {nll:.3f} nats each, of which {entropy:.3f} are their own disagreement and "
        f"{divergence:.3f}{span} the model's difference from them."
    )


def doubt_verdict(scores: Scores) -> str:
    """Does the model doubt where people do?"""
    rank = scores["human_entropy_spearman"]
    if math.isnan(rank):
        return "Whether the model doubts where people do cannot be said: all entropies of one of them are equal."
    if "human_entropy_spearman_low" not in scores:
        return f"Too few examples to tell whether the model doubts where people do (rank correlation {_signed(rank)})."
    low, high = scores["human_entropy_spearman_low"], scores["human_entropy_spearman_high"]
    size = f"rank correlation of the entropies {_signed(rank)}, {_signed(low)} to {_signed(high)}"
    if low > 0:
        return f"The model doubts where people do ({size})."
    if high < 0:
        return f"The model is surest where people doubt ({size})."
    if (high - low) / 2 * 1.43 > TOLD_RANK:
        return f"Too few examples to tell whether the model doubts where people do ({size})."
    return f"That the model doubts where people do cannot be seen ({size})."


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def quoted(name: str) -> str:
    """A model's name as it stands in a sentence: in quotation marks unless it is one word.

    Example:
        >>> quoted("low-rank_20"), quoted("ours, T = 1")
        ('low-rank_20', '“ours, T = 1”')
    """
    return name if PLAIN_NAME.fullmatch(name) else f"“{name}”"


def comparison_verdict(comparison: ScoreComparison) -> str:
    """Who is best in one score, who is tied with it, and by how much the others are worse."""
    names = {"nll": "negative log-likelihood", "brier": "Brier score", "accuracy": "accuracy"}
    name = names[comparison.score]
    best = next(rank for rank in comparison.ranking if rank.place == 1)  # by its value alone another may come first
    rest = [rank for rank in comparison.ranking if rank is not best]
    if len(comparison.best) == len(comparison.ranking):
        return f"In {name} all are tied: no difference is clear with this many examples."
    tied = [rank.name for rank in rest if rank.place == 1]
    shared = f", tied with {' and '.join(map(quoted, tied))}" if tied else ""
    behind = []
    for rank in rest:
        if rank.place > 1:
            d = next(d for d in comparison.differences if {d.first, d.second} == {best.name, rank.name})
            low, high = sorted((abs(d.low), abs(d.high)))
            span = f" ({low:.3f} to {high:.3f})" if d.is_clear and math.isfinite(d.value) else ""
            behind.append(f"{quoted(rank.name)} is behind by {abs(d.value):.3f}{span}")
    return f"Best in {name}: {quoted(best.name)} ({best.value:.3f}){shared}; {', '.join(behind)}."


def selective_verdict(scores: Scores, accuracy: float) -> str:
    """What withholding the least confident predictions brings, and how far from the best that is."""
    low, high = scores["accuracy_at_80_low"], scores["accuracy_at_80_high"]
    return (
        f"Without the least confident 20 % of predictions accuracy is {_percent(scores['accuracy_at_80'])} "
        f"({_percent(low)} to {_percent(high)}) in place of {_percent(accuracy)}; the area under the risk-coverage "
        f"curve is {scores['aurc']:.3f}, {scores['aurc_excess']:.3f} more than in the best possible order."
    )


def error_verdict(scores: Scores, num_errors: int, num_right: int) -> str:
    """Is the model less sure where it is wrong?"""
    auroc, fpr = scores["error_entropy_auroc"], scores["error_entropy_fpr95"]
    if math.isnan(auroc):
        return f"{'No' if num_errors == 0 else 'Every'} prediction is wrong: whether doubt finds errors cannot be seen."
    low, high = scores["error_entropy_auroc_low"], scores["error_entropy_auroc_high"]
    span = f" ({_percent(low)} to {_percent(high)})"
    chance = 1.96 * math.sqrt((num_errors + num_right + 1) / (12 * num_errors * num_right))  # of Mann and Whitney's U
    if not (abs(auroc - 0.5) > chance and (low > 0.5 or high < 0.5)) and 1.43 * chance > TOLD_AUROC:
        needed = _rounded_up((num_errors + num_right) * (1.43 * chance / TOLD_AUROC) ** 2)
        return (
            f"Too few examples to tell whether doubt finds errors: {num_errors:,} wrong and {num_right:,} right "
            f"predictions, AUROC {_percent(auroc)}{span}. About {needed:,} examples with this share of errors would do."
        )
    word = "That doubt finds errors cannot be seen"
    if abs(auroc - 0.5) > chance and (low > 0.5 or high < 0.5):
        word = "Doubt finds errors" if low > 0.5 else "Doubt is lower at errors"
    return (
        f"{word}: entropy is higher for the wrong one in {_percent(auroc)}{span} of pairs of a wrong and a right "
        f"prediction, where 50 % is chance; to flag 95 % of {num_errors:,} errors, {_percent(fpr)} of right "
        "predictions are flagged too."
    )


def detection_verdict(name: str, auroc: float, low: float, high: float) -> str:
    """Does entropy notice a foreign set, and how exactly is that known?"""
    share = f"{_percent(auroc)} ({_percent(low)} to {_percent(high)}) of pairs with a known input (50 % is chance)"
    if low > 0.5:
        return f"Foreign inputs “{name}” have the higher entropy in {share}."
    if high < 0.5:
        return f"The model is surer of foreign inputs “{name}” than of known ones: their entropy is higher in {share}."
    if high < UNNOTICED:
        return f"The model does not notice foreign inputs “{name}”: their entropy is higher in {share}."
    return f"Whether the model notices foreign inputs “{name}” cannot be seen: their entropy is higher in {share}."


def recalibration_verdict(description: str, scores: Scores, ece_before: float) -> str:
    """What a recalibration would change here."""
    ece, low, high = (scores[f"recalibrated_ece{suffix}"] for suffix in ("", "_null_low", "_null_high"))
    moved = f"ECE goes from {ece_before:.3f} to {ece:.3f}, where chance alone would show {low:.3f} to {high:.3f}"
    if not math.isfinite(scores["recalibrated_nll"]):
        return f"{description} Some label here gets probability zero, so its log loss is infinite; {moved}."
    change = scores.get("recalibrated_nll_change")
    if change is None:
        return f"{description} The log loss here, infinite before, is {scores['recalibrated_nll']:.3f}; {moved}."
    if "recalibrated_nll_change_low" not in scores:
        size = f"{change:+.3f} nats".replace("-", "−")
        return f"{description} Too few examples to tell whether the log loss changes ({size}); {moved}."
    first, last = scores["recalibrated_nll_change_low"], scores["recalibrated_nll_change_high"]
    if first <= 0 <= last:
        span = f"{change:+.3f} nats, {first:+.3f} to {last:+.3f}".replace("-", "−")
        return f"{description} The log loss here does not clearly change ({span}); {moved}."
    near, far = sorted((abs(first), abs(last)))
    word = "falls" if change < 0 else "rises"
    return f"{description} The log loss here {word} by {abs(change):.3f} nats ({near:.3f} to {far:.3f}); {moved}."


def conformal_verdict(scores: Scores, level: float, split: str, num_examples: int) -> str:
    """Do conformal sets hold as many labels as they should?"""
    share, low, high = (scores[f"conformal_coverage{suffix}"] for suffix in ("", "_null_low", "_null_high"))
    where = f"fitted on “{split}”, {num_examples:,} examples"
    word = ("", ": more than they should", ": fewer than they should")[position_in_band(share, low, high)]
    chance = f"sets of this kind would hold {_percent(low)} to {_percent(high)} here{word}"
    size = f"{scores['conformal_size']:.2f} classes on average"
    return f"Conformal sets for {100 * level:g} %, {where}, hold {_percent(share)} of the labels with {size}; {chance}."
