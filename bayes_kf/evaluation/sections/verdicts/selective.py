"""Sentences on selective prediction, error detection, recalibration and conformal sets."""

import math
from collections.abc import Mapping

from bayes_kf.evaluation.score import Score
from bayes_kf.evaluation.sections.verdicts.phrases import (
    decimal_range,
    interval_of,
    minus,
    null_band_of,
    percent,
    percent_range,
    round_up,
)

DETECTABLE_AUROC = 0.15  # above one half, for the detection of errors
USELESS_AUROC = 0.6  # a detector whose AUROC is known to be lower is of no use


def selective_verdict(scores: Mapping[str, Score], accuracy: float) -> str:
    """Accuracy without the least confident predictions, and the area under the risk-coverage curve."""
    selected = scores["accuracy_at_80"]
    return (
        f"Without the least confident 20 % of predictions, accuracy is {percent(selected.value)} "
        f"({percent_range(interval_of(selected))}) instead of {percent(accuracy)}. The area under the risk-coverage "
        f"curve is {scores['aurc'].value:.3f}, {scores['aurc_excess'].value:.3f} more than in the best possible order."
    )


def error_verdict(scores: Mapping[str, Score], num_wrong: int, num_correct: int) -> str:
    """Whether the entropy is higher for wrong predictions than for correct ones."""
    auroc = scores["error_entropy_auroc"]
    if math.isnan(auroc.value):
        return f"{'No' if num_wrong == 0 else 'Every'} prediction is wrong, so error detection is not defined."
    low, high = interval = interval_of(auroc)
    random = 1.96 * math.sqrt((num_wrong + num_correct + 1) / (12 * num_wrong * num_correct))  # sd of Mann-Whitney's U
    is_clear = abs(auroc.value - 0.5) > random and (low > 0.5 or high < 0.5)
    if not is_clear and 1.43 * random > DETECTABLE_AUROC:
        needed = round_up((num_wrong + num_correct) * (1.43 * random / DETECTABLE_AUROC) ** 2)
        return (
            f"Too few examples to tell whether uncertainty detects errors: {num_wrong:,} wrong and {num_correct:,} "
            f"correct predictions, AUROC {percent(auroc.value)} ({percent_range(interval)}). About {needed:,} examples "
            "with this share of errors would be enough."
        )
    word = "No evidence that uncertainty detects errors"
    if is_clear:
        word = "Uncertainty detects errors" if low > 0.5 else "Uncertainty is lower for errors"
    return (
        f"{word}: the wrong prediction has the higher entropy in {percent(auroc.value)} ({percent_range(interval)}) of "
        f"pairs of a wrong and a correct prediction (50 % is random). A threshold that flags 95 % of the {num_wrong:,} "
        f"errors also flags {percent(scores['error_entropy_fpr95'].value)} of the correct predictions."
    )


def detection_verdict(name: str, auroc: Score) -> str:
    """Whether the entropy of an out-of-distribution set is higher than that of the in-distribution inputs."""
    low, high = interval = interval_of(auroc)
    inputs = f"out-of-distribution inputs “{name}”"
    share = (
        f"they have the higher entropy in {percent(auroc.value)} ({percent_range(interval)}) of pairs with an "
        "in-distribution input (50 % is random)"
    )
    if low > 0.5:
        return f"The model is less certain of {inputs}: {share}."
    if high < 0.5:
        return f"The model is more certain of {inputs} than of in-distribution inputs: {share}."
    if high < USELESS_AUROC:
        return f"The model does not detect {inputs}: {share}."
    return f"It is unclear whether the model detects {inputs}: {share}."


def recalibration_verdict(description: str, scores: Mapping[str, Score], ece_before: float) -> str:
    """Effect of a recalibration on the log loss and the ECE of these examples."""
    ece, nll = scores["recalibrated_ece"], scores["recalibrated_nll"].value
    ece_change = f"ECE changes from {ece_before:.3f} to {ece.value:.3f} (null band {decimal_range(null_band_of(ece))})"
    if not math.isfinite(nll):
        return f"{description} A label here gets probability zero, so the log loss is infinite; {ece_change}."
    change = scores.get("recalibrated_nll_change")
    if change is None:
        return f"{description} The log loss here, infinite before, is {nll:.3f}; {ece_change}."
    if change.interval is None:
        size = minus(f"{change.value:+.3f} nats")
        return f"{description} Too few examples to tell whether the log loss changes ({size}); {ece_change}."
    low, high = change.interval
    if low <= 0 <= high:
        size = minus(f"{change.value:+.3f} nats, {low:+.3f} to {high:+.3f}")
        return f"{description} The log loss here does not clearly change ({size}); {ece_change}."
    near, far = sorted((abs(low), abs(high)))
    word = "falls" if change.value < 0 else "rises"
    size = f"{abs(change.value):.3f} nats ({near:.3f} to {far:.3f})"
    return f"{description} The log loss here {word} by {size}; {ece_change}."


def conformal_verdict(scores: Mapping[str, Score], level: float, split: str, num_examples: int) -> str:
    """Coverage of conformal sets beside its null band, and their mean size."""
    coverage = scores["conformal_coverage"]
    side = ("inside", "above", "below")[coverage.null_position]
    return (
        f"Conformal sets at {100 * level:g} %, fitted on “{split}” ({num_examples:,} examples), contain "
        f"{percent(coverage.value)} of the labels, {side} the null band of {percent_range(null_band_of(coverage))}. "
        f"A set has {scores['conformal_size'].value:.2f} classes on average."
    )
