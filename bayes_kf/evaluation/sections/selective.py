"""Sections on selective prediction, error detection, recalibration and conformal sets."""

import math
from dataclasses import asdict

from torch import Tensor

from bayes_kf.evaluation.calibration.calibration_errors import expected_calibration_error
from bayes_kf.evaluation.calibration.designed_scores import designed_scores
from bayes_kf.evaluation.calibration.intervals import difference_interval
from bayes_kf.evaluation.calibration.null_distribution import calibration_test
from bayes_kf.evaluation.calibration.score_summary import LEVEL
from bayes_kf.evaluation.classification.entropy import entropy, max_probability
from bayes_kf.evaluation.classification.ood_detection import (
    detection_scores,
    error_detection,
    error_detection_intervals,
)
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
from bayes_kf.evaluation.report.contents import FigureSpec, Sections
from bayes_kf.evaluation.report.sortable_tables import Cell, Table, make_table
from bayes_kf.evaluation.resampling.null_test import NullSettings
from bayes_kf.evaluation.resampling.sample_design import SampleDesign
from bayes_kf.evaluation.score import Interval, Score
from bayes_kf.evaluation.sections.classification import mean_loss, mean_score
from bayes_kf.evaluation.sections.verdicts.selective import (
    conformal_verdict,
    error_verdict,
    recalibration_verdict,
    selective_verdict,
)

TABLE_ROWS = 20
NUM_THRESHOLDS = 100


def usefulness_section(probs: Array, targets: Array, design: SampleDesign | None = None) -> Sections:
    """Selective prediction by confidence, and error detection by entropy and by confidence, with intervals.

    For two classes entropy and confidence rank the examples alike, so errors are detected by entropy alone.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).
        design: Weights and clusters of the examples; the accuracies at a coverage then have no interval.

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> import torch
        >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.7, 0.3]])
        >>> section = usefulness_section(probs, torch.tensor([0, 0, 1, 0]))
        >>> [section.scores[name].value for name in ("aurc", "accuracy_at_80", "error_entropy_auroc")]
        [0.0625, 0.75, 1.0]
    """
    checked = as_probs(probs)
    correct = checked.argmax(dim=1) == as_targets(targets, checked)
    return _selective_section(checked, correct, design) + _error_section(checked, correct, design)


def recalibration_section(
    probs: Array,
    targets: Array,
    recalibration: Recalibration | None,
    conformal: ConformalSets | None,
    settings: NullSettings,
    design: SampleDesign | None = None,
) -> Sections:
    """Effect of a recalibration, and coverage of conformal sets; both were fitted on other examples.

    Args:
        probs: Class probabilities before recalibration, (N, C).
        targets: Class indices, (N,).
        recalibration: Recalibration of the probabilities, or None.
        conformal: Conformal sets of the probabilities before recalibration, or None.
        settings: Bins and simulation of the ECE's null band.
        design: Weights and clusters of the examples; the change of the log loss and the coverage then have no interval.

    Raises:
        ValueError: If an argument is malformed or the number of classes differs from the fit's.
    """
    checked = as_probs(probs)
    labels, sections = as_targets(targets, checked), Sections()
    if recalibration is not None:
        sections += _recalibrated(checked, labels, recalibration, settings, design)
    if conformal is not None:
        sections += _covered(checked, labels, conformal, design)
    return sections


def _selective_section(probs: Tensor, correct: Tensor, design: SampleDesign | None) -> Sections:
    """Risk and coverage by confidence."""
    confidence = max_probability(probs)
    intervals = selective_intervals(confidence, correct, level=LEVEL)
    weights = None if design is None else design.weights
    scores = {
        "aurc": Score(aurc(confidence, correct, weights=weights)),
        "aurc_excess": Score(excess_aurc(confidence, correct, weights=weights)),
    }
    accuracies = accuracy_at_coverage(confidence, correct, weights=weights).tolist()
    for coverage, accuracy, interval in zip(COVERAGES, accuracies, intervals.accuracy, strict=True):
        scores[f"accuracy_at_{round(100 * coverage)}"] = Score(accuracy, interval if design is None else None)
    sentence = selective_verdict(scores, _share(correct, weights))
    figure = FigureSpec(
        title="Risk and coverage",
        alt=f"Share of errors against coverage. {sentence}",
        draw=lambda ax: risk_coverage_plot((confidence, correct), weights=weights, ax=ax),
        table=_risk_table(confidence, correct, weights),
    )
    return Sections(
        scores=scores,
        verdict=[sentence],
        drawings={"risk_coverage": figure},
        thresholds=_thresholds(confidence, correct, weights),
    )


def _error_section(probs: Tensor, correct: Tensor, design: SampleDesign | None) -> Sections:
    """Detection of errors."""
    weights = None if design is None else design.weights
    detectors = {"entropy": entropy(probs)}
    if probs.shape[1] > 2:
        detectors["confidence"] = 1 - max_probability(probs)
    scores: dict[str, Score] = {}
    for name, values in detectors.items():
        intervals = error_detection_intervals(values, correct, level=LEVEL, design=design)
        scores |= detection_scores(f"error_{name}", error_detection(values, correct, weights=weights), intervals)
    return Sections(scores=scores, verdict=[error_verdict(scores, int((~correct).sum()), int(correct.sum()))])


def _risk_table(confidence: Tensor, correct: Tensor, weights: Tensor | None) -> Table:
    """The risk-coverage curve and the best possible one, at even steps."""
    curve, best = risk_coverage(confidence, correct, weights=weights), best_risk_coverage(correct, weights=weights)
    steps = min(TABLE_ROWS, len(curve.risk))
    shares = [(k + 1) / steps for k in range(steps)]
    places, best_places = (
        num_retained(shares, len(of.risk), None if weights is None else of.coverage) - 1 for of in (curve, best)
    )
    columns = (curve.coverage[places], curve.risk[places], best.risk[best_places])
    rows = [
        (Cell(f"{100 * share:.1f} %", share), k + 1, risk, least)
        for k, share, risk, least in zip(places.tolist(), *(column.tolist() for column in columns), strict=True)
    ]
    header = ("Coverage", "Number", "Share of errors", "Best possible order")
    return make_table("Risk and coverage", header, rows)


def _thresholds(confidence: Tensor, correct: Tensor, weights: Tensor | None) -> list[tuple[float, float, float]]:
    """Thresholds of the confidence, with the share of inputs at or above each and the share of errors among them."""
    steps = []
    for place in range(NUM_THRESHOLDS):
        threshold = place / NUM_THRESHOLDS
        answered = confidence >= threshold
        if _share(answered, weights) == 0.0:
            break
        wrong = 1.0 - _share(correct[answered], None if weights is None else weights[answered])
        steps.append((threshold, round(_share(answered, weights), 4), round(wrong, 4)))
    return steps


def _share(which: Tensor, weights: Tensor | None) -> float:
    """The share of examples (N,) that are true, by weight."""
    if weights is None:
        return which.double().mean().item()
    return ((weights * which).sum() / weights.sum()).item()


def _recalibrated(
    probs: Tensor, labels: Tensor, recalibration: Recalibration, settings: NullSettings, design: SampleDesign | None
) -> Sections:
    """Scores after the recalibration, and the paired change of the log loss."""
    after = recalibration(probs)
    losses, before = log_losses(after, labels), log_losses(probs, labels)
    hits = (after.argmax(dim=1) == labels).double()
    scores = {
        "recalibrated_accuracy": mean_score(hits, 1.0, design),
        "recalibrated_nll": mean_loss(losses, after, design),
        "recalibrated_brier": mean_score(brier_scores(after, labels), 2.0, design),
    }
    if before.isfinite().all() and losses.isfinite().all():
        change = losses - before
        interval = difference_interval(change, after, probs, LEVEL)
        known = interval if math.isfinite(interval.high) and design is None else None
        scores["recalibrated_nll_change"] = Score(
            change.mean().item() if design is None else design.mean(change), known
        )
    if design is None:
        scores["recalibrated_ece"] = calibration_test(after, labels, level=LEVEL, **asdict(settings)).score()
        ece_before = expected_calibration_error(probs, labels, settings.num_bins)
    else:
        scores["recalibrated_ece"] = designed_scores(after, labels, 1, settings, design)["ece"]
        ece_before = designed_scores(probs, labels, 1, settings, design)["ece"].value
    return Sections(
        scores=scores,
        verdict=[recalibration_verdict(recalibration.describe(), scores, ece_before)],
        sizes={f"examples of the recalibration, “{recalibration.split}”": recalibration.num_examples},
    )


def _covered(probs: Tensor, labels: Tensor, conformal: ConformalSets, design: SampleDesign | None) -> Sections:
    """Coverage of conformal sets beside its null band, and their size."""
    covered, size = coverage_and_sizes(conformal.sets(probs), labels)
    number = len(labels) if design is None else design.independent[0]
    null_band = conformal_coverage_null(conformal.level, conformal.num_examples, number, LEVEL)
    coverage = covered.mean().item() if design is None else design.mean(covered)
    scores = {
        "conformal_coverage": Score(coverage, null_band=Interval(*null_band)),
        "conformal_size": mean_score(size, probs.shape[1], design),
        "conformal_empty": Score((size == 0).double().mean().item()),
    }
    return Sections(
        scores=scores,
        tested=["conformal_coverage"],
        verdict=[conformal_verdict(scores, conformal.level, conformal.split, conformal.num_examples)],
        sizes={f"examples of the conformal sets ({conformal.score}), “{conformal.split}”": conformal.num_examples},
    )
