"""Sentences on selective prediction, error detection, recalibration and conformal sets."""

import math
from collections.abc import Mapping
from typing import Literal

from bayes_kf.evaluation.report.contents import Card
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

Detected = Literal["yes", "partly", "no", "too few"]
WORST_FIRST: tuple[Detected, ...] = ("no", "too few", "partly", "yes")
DETECTABLE_AUROC = 0.15  # above one half, for the detection of errors
GOOD_AUROC = 0.8  # a detector below it is one in part
USELESS_AUROC = 0.6  # a detector whose AUROC is known to be lower is of no use


def selective_verdict(scores: Mapping[str, Score], accuracy: float) -> str:
    """Accuracy without the least confident predictions, and the area under the risk-coverage curve."""
    selected = scores["accuracy_at_80"]
    interval = "" if selected.interval is None else f" ({percent_range(selected.interval)})"
    return (
        f"Without the least confident 20 % of predictions, accuracy is {percent(selected.value)}{interval} instead of "
        f"{percent(accuracy)}. The area under the risk-coverage curve is {scores['aurc'].value:.3f}, "
        f"{scores['aurc_excess'].value:.3f} more than in the best possible order."
    )


def error_answer(auroc: Score, num_wrong: int, num_correct: int) -> Detected:
    """Whether uncertainty detects errors: the AUROC is clearly above one half, and at least `GOOD_AUROC`.

    "partly" from `USELESS_AUROC` on.
    """
    if math.isnan(auroc.value):
        return "too few"
    is_clear, random = _clear(auroc, num_wrong, num_correct)
    if not is_clear and 1.43 * random > DETECTABLE_AUROC:
        return "too few"
    return _graded(auroc) if is_clear else "no"


def error_card(scores: Mapping[str, Score], num_wrong: int, num_correct: int) -> Card:
    """The answer with its headline and its main number."""
    auroc = scores["error_entropy_auroc"]
    answer = error_answer(auroc, num_wrong, num_correct)
    reason = f"{num_wrong:,} wrong and {num_correct:,} right predictions."
    if not math.isnan(auroc.value):
        share = percent(auroc.value)
        known = "" if auroc.interval is None else f" ({percent_range(auroc.interval)})"
        reason = f"Of a wrong and a right answer, it is less sure of the wrong one {share} of the time{known}; "
        reason += "guessing: 50 %."
    headline = {
        "yes": "It knows its errors: it is less sure of them.",
        "partly": "It knows some of its errors.",
        "no": "It does not know its errors: it is as sure of them as of right answers.",
        "too few": f"{num_wrong:,} error{'s' if num_wrong != 1 else ''} are too few to tell whether it knows them.",
    }[answer]
    if not num_wrong:
        headline = "It makes no error here, so nothing says whether it would know one."
    return Card("errors", "Does it know its errors?", answer, reason, headline)


def error_verdict(scores: Mapping[str, Score], num_wrong: int, num_correct: int) -> str:
    """Whether the entropy is higher for wrong predictions than for correct ones."""
    auroc = scores["error_entropy_auroc"]
    if math.isnan(auroc.value):
        return f"{'No' if num_wrong == 0 else 'Every'} prediction is wrong, so error detection is not defined."
    low, _ = interval = interval_of(auroc)
    is_clear, random = _clear(auroc, num_wrong, num_correct)
    if error_answer(auroc, num_wrong, num_correct) == "too few":
        needed = round_up((num_wrong + num_correct) * (1.43 * random / DETECTABLE_AUROC) ** 2)
        return (
            f"Too few examples to tell whether uncertainty detects errors: {num_wrong:,} wrong and {num_correct:,} "
            f"correct predictions, AUROC {percent(auroc.value)} ({percent_range(interval)}). About {needed:,} examples "
            "with this share of errors would be enough."
        )
    word = "No evidence that uncertainty detects errors"
    if is_clear:
        word = "Uncertainty detects errors" if low > 0.5 else "Uncertainty is lower for errors"
    if is_clear and low > 0.5 and auroc.value < USELESS_AUROC:
        word = "Uncertainty hardly detects errors"
    return (
        f"{word}: the wrong prediction has the higher entropy in {percent(auroc.value)} ({percent_range(interval)}) of "
        f"pairs of a wrong and a correct prediction (50 % is random). A threshold that flags 95 % of the {num_wrong:,} "
        f"errors also flags {percent(scores['error_entropy_fpr95'].value)} of the correct predictions."
    )


def _clear(auroc: Score, num_wrong: int, num_correct: int) -> tuple[bool, float]:
    """Whether an AUROC differs clearly from one half, and how far from it chance alone brings it."""
    low, high = interval_of(auroc)
    random = 1.96 * math.sqrt((num_wrong + num_correct + 1) / (12 * num_wrong * num_correct))  # sd of Mann-Whitney's U
    return abs(auroc.value - 0.5) > random and (low > 0.5 or high < 0.5), random


def detection_answer(auroc: Score) -> Detected:
    """Whether the entropy of out-of-distribution inputs is higher, graded as for errors."""
    low, high = interval_of(auroc)
    if low <= 0.5 and high >= USELESS_AUROC:
        return "too few"
    return _graded(auroc) if low > 0.5 else "no"


def _graded(auroc: Score) -> Literal["yes", "partly", "no"]:
    """How good a detector is whose AUROC is clearly above one half."""
    return "yes" if auroc.value >= GOOD_AUROC else "partly" if auroc.value >= USELESS_AUROC else "no"


def detection_card(detected: Mapping[str, Score]) -> Card:
    """Whether all out-of-distribution sets are detected.

    Args:
        detected: Name of each set to its AUROC.
    """
    question = "Does it notice what it has not seen?"
    if not detected:
        return Card("unseen", question, "not tested", "No inputs of another kind were given.", "")
    answers = {name: detection_answer(auroc) for name, auroc in detected.items()}
    shares = [f"of “{name}” {percent(auroc.value)} of the time" for name, auroc in list(detected.items())[:3]]
    more = f" (and {len(detected) - 3} more)" if len(detected) > 3 else ""
    reason = (
        f"Beside a usual input, it is less sure {', '.join(shares)}{more}; guessing: 50 %. Nothing else was tested."
    )
    answer = min(answers.values(), key=WORST_FIRST.index)
    named = _listed([f"“{name}”" for name, own in answers.items() if own == answer])
    headline = {
        "no": f"It does not notice {named}.",
        "too few": f"Too few inputs to tell whether it notices {named}.",
        "partly": f"It notices {named} in part.",
        "yes": f"It notices {named}.",
    }[answer]
    return Card("unseen", question, answer, reason, headline)


def _listed(names: list[str]) -> str:
    """Names in a sentence, at most three of them."""
    shown = names[:3] if len(names) <= 3 else [*names[:2], f"{len(names) - 2} other kinds of inputs"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def detection_verdict(name: str, auroc: Score) -> str:
    """Whether the entropy of an out-of-distribution set is higher than that of the in-distribution inputs."""
    low, high = interval = interval_of(auroc)
    inputs = f"out-of-distribution inputs “{name}”"
    share = (
        f"they have the higher entropy in {percent(auroc.value)} ({percent_range(interval)}) of pairs with an "
        "in-distribution input (50 % is random)"
    )
    if high < 0.5:
        return f"The model is more certain of {inputs} than of in-distribution inputs: {share}."
    return {
        "yes": f"The model is less certain of {inputs}: {share}.",
        "partly": f"The model is less certain of {inputs}, not by much: {share}.",
        "no": f"The model {'hardly detects' if low > 0.5 else 'does not detect'} {inputs}: {share}.",
        "too few": f"It is unclear whether the model detects {inputs}: {share}.",
    }[detection_answer(auroc)]


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
