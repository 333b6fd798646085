"""What to do about a classifier: calls that would help, with what they bring on these examples, held out in turn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.evaluation.calibration.calibration_errors import smooth_calibration_error
from bayes_kf.evaluation.calibration.score_summary import PRIMARY
from bayes_kf.evaluation.classification.entropy import max_probability
from bayes_kf.evaluation.classification.scores import log_losses
from bayes_kf.evaluation.recalibration.abstention import AbstentionRule
from bayes_kf.evaluation.recalibration.scaling import TemperatureScaling
from bayes_kf.evaluation.report.contents import Advice, Card, Sections
from bayes_kf.evaluation.resampling.sample_design import SampleDesign
from bayes_kf.evaluation.score import Score
from bayes_kf.evaluation.sections.distrust import MOST, class_hits, hard_classes
from bayes_kf.evaluation.sections.verdicts.calibration import needed_targets
from bayes_kf.evaluation.sections.verdicts.phrases import percent, quoted

RISKS = (0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
LEVEL = 0.9  # of the promise of an abstention rule


class Calls(NamedTuple):
    """How to say it in code.

    Attributes:
        calibrate: a call that calibrates a classifier.
        intervals: one that calibrates a regression.
        ood: one that tests inputs of another kind.
    """

    calibrate: str = "bayes_kf.evaluation.TemperatureScaling.fit(held_out_probs, held_out_targets)(new_probs)"
    intervals: str = "bayes_kf.evaluation.ConformalIntervals.fit(held_out_mean, held_out_targets, held_out_sd)"
    ood: str = 'bayes_kf.evaluation.evaluate_predictions(probs, targets, ood={"name": other_probs})'


CALIBRATE = "posterior = posterior.calibrate(held_out)"
POSTERIOR = Calls(CALIBRATE, CALIBRATE, 'bayes_kf.evaluate(posterior, loader, ood={"name": other_inputs})')


def advice_section(
    probs: Tensor,
    labels: Tensor,
    names: Sequence[str],
    scores: dict[str, Score],
    cards: Sequence[Card],
    calls: Calls,
    design: SampleDesign | None = None,
) -> Sections:
    """Advice that follows from the cards.

    Args:
        probs: Class probabilities, (N, C), float64.
        labels: Class indices, (N,).
        names: C names of classes.
        scores: Of the report.
        cards: The three of a classifier, and the one of a class that is seldom recognized, if there is one.
        calls: The code to name.
        design: Weights and clusters of the examples. With them no rule of abstention is promised.
    """
    probabilities, errors, unseen, *missed = cards
    advice = [Advice("Do not rely on it for that class", card.reason.rstrip(".")) for card in missed]
    if probabilities.answer == "no":
        band = scores[PRIMARY].null_band
        assert band is not None
        advice.append(_calibrate(probs, labels, band.high, calls, design))
    if probabilities.answer == "too few":
        number, unit = (len(labels), "examples") if design is None else design.independent
        needed = needed_targets(scores, number)
        advice.append(
            Advice(f"Evaluate more {unit}", f"about {needed:,} would show a calibration error of 0.1, if there is one")
        )
    if errors.answer == "no":
        advice.append(
            Advice("Do not sort answers by its confidence", "its errors are not among those that it is unsure of")
        )
    threshold = _usual_threshold(probs)
    if design is None and errors.answer in ("yes", "partly") and (rule := _abstention(probs, labels)) is not None:
        advice.append(_abstain(rule, probs, labels))
        threshold = math.ceil(100 * rule.threshold)
    advice += _collect(probs, labels, names, design)
    if unseen.answer == "no":
        advice.append(
            Advice("Keep such other inputs away from it, or train with some", "its confidence does not tell them apart")
        )
    if unseen.answer == "not tested":
        gain = "nothing here says what it does with inputs of another kind"
        advice.append(Advice("Show it inputs that it was not made for", gain, calls.ood))
    return Sections(advice=advice, threshold=threshold)


def _calibrate(probs: Tensor, labels: Tensor, null_high: float, calls: Calls, design: SampleDesign | None) -> Advice:
    """Temperature scaling, fitted on each half of the examples (of the clusters) and applied to the other one."""
    units = len(labels) if design is None else design.num_clusters
    rank = torch.randperm(units, generator=torch.Generator().manual_seed(0)).argsort()
    if design is not None:
        rank = rank[design.clusters]
    halves = (rank < units // 2).nonzero()[:, 0], (rank >= units // 2).nonzero()[:, 0]
    after = probs.clone()
    for fitted, other in (halves, halves[::-1]):
        after[other] = TemperatureScaling.fit(probs[fitted], labels[fitted])(probs[other])
    change = log_losses(after, labels) - log_losses(probs, labels)
    mean, error = change.mean().item(), change.std().item() / math.sqrt(len(change))
    if design is not None:
        mean, error = design.mean(change), design.equivalent(change).error
    errors = [smooth_calibration_error(values, labels) for values in (probs, after)]
    losses = [log_losses(values, labels).mean().item() for values in (probs, after)]
    numbers = f"the calibration error from {errors[0]:.3f} to {errors[1]:.3f} and the log loss from {losses[0]:.3f} to"
    halves_text = "fitted on each half of these examples and tested on the other, a temperature"
    if not mean < -2 * error:
        gain = f"{halves_text} changes {numbers} {losses[1]:.3f}, which may be chance"
        return Advice("Calibration would bring little", gain)
    gain = f"{halves_text} lowers {numbers} {losses[1]:.3f}"
    if errors[1] <= null_high:
        return Advice("Calibrate on held-out examples", gain, calls.calibrate)
    gain += f". Chance alone explains up to {null_high:.3f}, so a temperature is not enough"
    return Advice("Calibrate on held-out examples, which helps in part", gain, calls.calibrate)


def _usual_threshold(probs: Tensor) -> int:
    """The threshold, in percent, with which about 80 % of the inputs are answered."""
    return int(100 * max_probability(probs).sort().values[len(probs) // 5].item())


def _abstention(probs: Tensor, labels: Tensor) -> AbstentionRule | None:
    """The rule with the largest risk that is at most half of the error rate, if it can promise anything."""
    confidence, correct = max_probability(probs), probs.argmax(dim=1) == labels
    error_rate = 1.0 - correct.double().mean().item()
    for risk in (risk for risk in RISKS if risk <= error_rate / 2):
        rule = AbstentionRule.fit(confidence, correct, risk=risk, level=LEVEL)
        if math.isfinite(rule.threshold):
            return rule
    return None


def _abstain(rule: AbstentionRule, probs: Tensor, labels: Tensor) -> Advice:
    """The rule in words."""
    error_rate = (probs.argmax(dim=1) != labels).double().mean().item()
    answered = percent(rule.answered)
    return Advice(
        f"Answer only {answered} of inputs, those with a confidence of at least {percent(rule.threshold)}",
        f"of these answers at most {percent(rule.risk)} are wrong (with {100 * LEVEL:.0f} % certainty) instead of "
        f"{percent(error_rate)}",
        f"bayes_kf.evaluation.AbstentionRule.fit(confidence, correct, risk={rule.risk:g})",
    )


def _collect(probs: Tensor, labels: Tensor, names: Sequence[str], design: SampleDesign | None) -> list[Advice]:
    """More examples of the classes with the fewest hits."""
    hard = hard_classes(probs, labels, design)[:MOST]
    counts, hits = class_hits(probs, labels)
    wrong = counts - hits
    if not hard:
        return []
    shown = ", ".join(quoted(names[place]) for place in hard)
    share = percent(wrong[hard].sum() / wrong.sum())
    size = percent(counts[hard].sum() / counts.sum())
    return [Advice(f"Collect more examples of {shown}", f"{share} of the errors come from {size} of the examples")]
