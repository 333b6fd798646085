"""The parts of a report on what uncertainty is good for: withholding predictions, finding errors, recalibration."""

import math
from typing import Any

from torch import Tensor

from bayes_kf.evaluation.calibration.errors import expected_calibration_error
from bayes_kf.evaluation.calibration.intervals import difference_interval
from bayes_kf.evaluation.calibration.null_distribution import calibration_test
from bayes_kf.evaluation.classification.entropy import entropy, max_probability
from bayes_kf.evaluation.classification.ood_detection import (
    detection_scores,
    error_detection,
    error_detection_intervals,
)
from bayes_kf.evaluation.classification.score_summary import LEVEL
from bayes_kf.evaluation.classification.scores import brier_scores, log_losses
from bayes_kf.evaluation.classification.selective import (
    COVERAGES,
    accuracy_at_coverage,
    aurc,
    best_risk_coverage,
    excess_aurc,
    num_retained,
    risk_coverage,
    selective_intervals,
)
from bayes_kf.evaluation.inputs import Array, as_probs, as_targets
from bayes_kf.evaluation.plots.selective import risk_coverage_plot
from bayes_kf.evaluation.recalibration.conformal_sets import ConformalSets, conformal_coverage_null, coverage_and_sizes
from bayes_kf.evaluation.recalibration.scaling import Recalibration
from bayes_kf.evaluation.report.html_page import table_text
from bayes_kf.evaluation.report.report import FigureSpec, Sections, Table
from bayes_kf.evaluation.resampling.null_test import NullSettings
from bayes_kf.evaluation.score import Interval, Score, flatten_scores
from bayes_kf.evaluation.sections.classification import bounded, of_losses
from bayes_kf.evaluation.sections.verdicts import (
    conformal_verdict,
    error_verdict,
    recalibration_verdict,
    selective_verdict,
)

TABLE_ROWS = 20


def usefulness_section(probs: Array, targets: Array) -> Sections:
    """Selective prediction by confidence, and detection of errors by entropy and by confidence, with intervals.

    Of two classes entropy and confidence make the same order, and errors are detected by entropy alone.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> import torch
        >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.7, 0.3]])
        >>> section = usefulness_section(probs, torch.tensor([0, 0, 1, 0]))
        >>> section.scores["aurc"], section.scores["accuracy_at_80"], section.scores["error_entropy_auroc"]
        (0.0625, 0.75, 1.0)
    """
    checked = as_probs(probs)
    correct = checked.argmax(dim=1) == as_targets(targets, checked)
    return _selective_section(checked, correct) + _error_section(checked, correct)


def recalibration_section(
    probs: Array,
    targets: Array,
    recalibration: Recalibration | None,
    conformal: ConformalSets | None,
    chance: NullSettings,
) -> Sections:
    """What a recalibration would change, and what conformal sets cover, both fitted on other examples.

    Args:
        probs: Class probabilities as they came, (N, C).
        targets: Class indices, (N,).
        recalibration: A map of probabilities.
        conformal: Sets, asked for with the probabilities as they came.
        chance: How calibration is binned and chance simulated.

    Raises:
        ValueError: If an argument is malformed or has other classes than the fit.
    """
    checked = as_probs(probs)
    labels, sections = as_targets(targets, checked), Sections()
    if recalibration is not None:
        sections += _recalibrated(checked, labels, recalibration, chance)
    if conformal is not None:
        sections += _covered(checked, labels, conformal)
    return sections


def _selective_section(probs: Tensor, correct: Tensor) -> Sections:
    """Risk over coverage, by confidence."""
    confidence = max_probability(probs)
    intervals = selective_intervals(confidence, correct, level=LEVEL)
    scores = {"aurc": aurc(confidence, correct), "aurc_excess": excess_aurc(confidence, correct)}
    kept = accuracy_at_coverage(confidence, correct).tolist()
    for coverage, share, interval in zip(COVERAGES, kept, intervals.accuracy, strict=True):
        name = f"accuracy_at_{round(100 * coverage)}"
        scores |= Score(share, interval).flat(name)
    sentence = selective_verdict(scores, correct.double().mean().item())
    figure = FigureSpec(
        title="Risk and coverage",
        alt=f"Share of errors against share of predictions kept. {sentence}",
        draw=lambda ax: risk_coverage_plot((confidence, correct), ax=ax),
        table=_risk_table(confidence, correct),
    )
    return Sections(scores=scores, verdict=[sentence], drawings={"risk_coverage": figure})


def _error_section(probs: Tensor, correct: Tensor) -> Sections:
    """Detection of errors."""
    detectors = {"entropy": entropy(probs)}
    if probs.shape[1] > 2:
        detectors["confidence"] = 1 - max_probability(probs)
    scores: dict[str, float] = {}
    for name, values in detectors.items():
        intervals = error_detection_intervals(values, correct, level=LEVEL)
        scores |= flatten_scores(detection_scores(f"error_{name}", error_detection(values, correct), intervals))
    return Sections(scores=scores, verdict=[error_verdict(scores, int((~correct).sum()), int(correct.sum()))])


def _risk_table(confidence: Tensor, correct: Tensor) -> Table:
    """The curve and the best possible one, at even steps."""
    curve, best = risk_coverage(confidence, correct), best_risk_coverage(correct)
    steps = min(TABLE_ROWS, len(correct))
    places = num_retained([(k + 1) / steps for k in range(steps)], len(correct)) - 1
    columns = (curve.coverage, curve.risk, best.risk)
    rows = [
        table_text((f"{100 * share:.1f} %", k + 1, risk, least))
        for k, share, risk, least in zip(places.tolist(), *(column[places].tolist() for column in columns), strict=True)
    ]
    header = ("Predictions kept", "Number", "Share of errors", "Best possible order")
    return Table("Risk and coverage", header, tuple(rows))


def _recalibrated(probs: Tensor, labels: Tensor, recalibration: Recalibration, chance: NullSettings) -> Sections:
    """Scores after the recalibration, and the paired change of the log loss."""
    after = recalibration(probs)
    losses, before = log_losses(after, labels), log_losses(probs, labels)
    hits, brier = (after.argmax(dim=1) == labels).double(), brier_scores(after, labels)
    columns = {
        "recalibrated_accuracy": (hits, bounded(hits, 1.0)),
        "recalibrated_nll": (losses, of_losses(losses, after)),
        "recalibrated_brier": (brier, bounded(brier, 2.0)),
    }
    scores: dict[str, float] = {}
    for name, (values, interval) in columns.items():
        scores |= Score(values.mean().item(), interval).flat(name)
    if before.isfinite().all() and losses.isfinite().all():
        change = losses - before
        ends = difference_interval(change, after, probs, LEVEL)
        score = Score(change.mean().item(), ends if math.isfinite(ends.high) else None)
        scores |= score.flat("recalibrated_nll_change")
    settings: dict[str, Any] = {
        "num_bins": chance.num_bins,
        "num_simulations": chance.num_simulations,
        "seed": chance.seed,
    }
    scores |= calibration_test(after, labels, level=LEVEL, **settings).score().flat("recalibrated_ece")
    was = expected_calibration_error(probs, labels, chance.num_bins)
    return Sections(
        scores=scores,
        verdict=[recalibration_verdict(recalibration.describe(), scores, was)],
        sizes={f"examples of the recalibration, “{recalibration.split}”": recalibration.num_examples},
    )


def _covered(probs: Tensor, labels: Tensor, conformal: ConformalSets) -> Sections:
    """Coverage of conformal sets beside what chance alone would show, and their size."""
    covered, size = coverage_and_sizes(conformal.sets(probs), labels)
    band = Interval(*conformal_coverage_null(conformal.level, conformal.num_examples, len(labels), LEVEL))
    scores = flatten_scores(
        {
            "conformal_coverage": Score(covered.mean().item(), null_band=band),
            "conformal_size": Score(size.mean().item(), bounded(size, probs.shape[1])),
            "conformal_empty": Score((size == 0).double().mean().item()),
        }
    )
    return Sections(
        scores=scores,
        verdict=[conformal_verdict(scores, conformal.level, conformal.split, conformal.num_examples)],
        sizes={f"examples of the conformal sets ({conformal.score}), “{conformal.split}”": conformal.num_examples},
    )
