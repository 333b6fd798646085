"""Scores of a row on a data set: classification, under shift, out of distribution, and regression."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bayes_kf.evaluation import (
    accuracy,
    aurc,
    calibration_test,
    crps_gaussian,
    entropy,
    gaussian_coverage,
    gaussian_log_loss,
    max_probability,
    negative_log_likelihood,
    ood_scores,
    rmse,
)
from bayes_kf.evaluation.calibration.calibration_errors import expected_calibration_error
from benchmarks.bench.registry.problems import QualityData
from benchmarks.common.learners import Stream
from benchmarks.quality.rows import Predict
from benchmarks.quality.split.distance import features, nearest_distance, rank_correlation
from benchmarks.quality.split.shift import SEVERITIES, shifted

COVERAGE_LEVELS = (0.5, 0.9)


class GaussianPredicted(NamedTuple):
    """Predictive means and variances (noise included) of a regression, (N,) each, float64."""

    mean: Tensor
    variance: Tensor


def classification_scores(predict: Predict, data: QualityData, frozen: nn.Module, seed: int) -> dict[str, Any]:
    """All scores of a classification.

    Args:
        predict: of the row.
        data: of the problem.
        frozen: the model at its start, for distances.
        seed: of the corruptions.

    Returns:
        Scores by name. ``nll_1`` and ``ece_1`` are those at the first severity. ``ood_auroc`` and ``error_auroc`` are
        by total entropy, ``ood_auroc_epistemic`` by epistemic entropy. ``distance_correlation`` is over the test
        inputs, ``distance_correlation_ood`` over these and the out-of-distribution inputs together. Scores of
        epistemic entropy are None for a row without it.

    Raises:
        FloatingPointError: if a probability is not finite.
    """
    heldout, outside = predict(data.heldout), predict(data.ood)
    probs, labels = heldout.probs, data.heldout.labels
    if not bool(torch.isfinite(torch.cat([probs, outside.probs])).all()):
        raise FloatingPointError("a probability is not finite")
    total, wrong = entropy(probs), probs.argmax(1) != labels
    ece = calibration_test(probs, labels, "ece")
    scores: dict[str, Any] = {
        "accuracy": accuracy(probs, labels),
        "nll": negative_log_likelihood(probs, labels),
        "ece": ece.value,
        "ece_null_low": ece.null_low,
        "ece_null_high": ece.null_high,
        "confidence": probs.max(1).values.mean().item(),
        "ood_auroc": ood_scores(total, entropy(outside.probs)).auroc,
        "error_auroc": ood_scores(total[~wrong], total[wrong]).auroc if 0 < int(wrong.sum()) < len(wrong) else None,
        "aurc": aurc(max_probability(probs), ~wrong),
        "ood_auroc_epistemic": None,
        "distance_correlation": None,
        "distance_correlation_ood": None,
        "epistemic": None,
    }
    if heldout.epistemic is not None and outside.epistemic is not None:
        train, test, ood = (features(frozen, stream) for stream in (data.stream, data.heldout, data.ood))
        near, far = nearest_distance(train, test), nearest_distance(train, ood)
        scores["ood_auroc_epistemic"] = ood_scores(heldout.epistemic, outside.epistemic).auroc
        scores["distance_correlation"] = rank_correlation(heldout.epistemic, near)
        both = torch.cat([heldout.epistemic, outside.epistemic])
        scores["distance_correlation_ood"] = rank_correlation(both, torch.cat([near, far]))
        scores["epistemic"] = heldout.epistemic.mean().item()
    return scores | shift_scores(predict, data.heldout, seed)


def shift_scores(predict: Predict, heldout: Stream, seed: int) -> dict[str, float]:
    """NLL, ECE and accuracy under shift at each severity."""
    scores = {}
    for severity in SEVERITIES:
        corrupted = shifted(heldout, severity, seed)
        probs = predict(corrupted).probs
        scores[f"accuracy_{severity}"] = accuracy(probs, corrupted.labels)
        scores[f"nll_{severity}"] = negative_log_likelihood(probs, corrupted.labels)
        scores[f"ece_{severity}"] = expected_calibration_error(probs, corrupted.labels)
    return scores


def variant_scores(variants: Mapping[str, Predict], heldout: Stream) -> dict[str, float]:
    """NLL and ECE of other predictions of a row, as ``nll_NAME`` and ``ece_NAME``."""
    scores = {}
    for name, predict in variants.items():
        probs = predict(heldout).probs
        scores[f"nll_{name}"] = negative_log_likelihood(probs, heldout.labels)
        scores[f"ece_{name}"] = expected_calibration_error(probs, heldout.labels)
    return scores


def regression_scores(predicted: GaussianPredicted, targets: Tensor) -> dict[str, float]:
    """NLL, RMSE, CRPS and the coverage of central intervals, in units of the training targets' sd.

    Args:
        predicted: means and variances, (N,).
        targets: (N, 1).

    Raises:
        FloatingPointError: if a mean or variance is not finite.
    """
    mean, variance, observed = *predicted, targets[:, 0].double()
    if not bool(torch.isfinite(torch.cat([mean, variance])).all()):
        raise FloatingPointError("a mean or variance is not finite")
    shares = gaussian_coverage(mean, variance, observed, COVERAGE_LEVELS).coverage.tolist()
    return {
        "nll": gaussian_log_loss(mean, variance, observed),
        "rmse": rmse(mean, observed),
        "crps": crps_gaussian(mean, variance, observed),
        **{f"coverage_{round(100 * level)}": share for level, share in zip(COVERAGE_LEVELS, shares, strict=True)},
    }
