"""Selective prediction: the risk of the remaining predictions after the least confident ones are rejected.

Ties of the confidence are handled exactly: every number is its expectation over random orders of equal confidences.

With weights, coverages are shares of their sum, risks are weighted means, and areas are means over the curve by weight.
Predictions of equal confidence share their mean weight.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.evaluation.calibration.intervals import Interval, proportion_interval
from bayes_kf.evaluation.classification.ood_detection import as_correct
from bayes_kf.evaluation.inputs import Array, as_vector, as_weights, check_fraction

COVERAGES = (0.8, 0.9, 0.95)


class RiskCoverage(NamedTuple):
    """Risk of the k most confident predictions for each k; both fields are (N,), without those of weight zero."""

    coverage: Tensor  # k/N for k = 1 … N, or their share of the weights
    risk: Tensor  # mean loss of the k most confident


class SelectiveIntervals(NamedTuple):
    """Intervals of the accuracies of selective prediction. The areas under the curve have no interval."""

    accuracy: tuple[Interval, ...]  # one for each coverage


def risk_coverage(
    confidence: Array, correct: Array | None = None, *, loss: Array | None = None, weights: Array | None = None
) -> RiskCoverage:
    """The risk-coverage curve: mean loss of the k most confident predictions for k = 1 … N.

    Each of several predictions of equal confidence counts with their mean loss, the expectation over random orders.

    Args:
        confidence: Higher for predictions to retain, (N,), for example the largest probability or minus the entropy.
        correct: One (or True) for each correct prediction, else zero, (N,); the loss is one minus this.
        loss: Alternative to `correct`: a finite, non-negative loss of each prediction, (N,).
        weights: How much each prediction counts, not negative, (N,).

    Raises:
        ValueError: If a vector is malformed, lengths differ, or not exactly one of `correct` and `loss` is given.

    Reference: El-Yaniv, Wiener 2010; Geifman, El-Yaniv 2017.

    Example:
        >>> risk_coverage(torch.tensor([0.9, 0.6, 0.6]), torch.tensor([1, 1, 0])).risk
        tensor([0.0000, 0.2500, 0.3333], dtype=torch.float64)
    """
    scores = as_vector(confidence, "confidence")
    losses = _losses(correct, loss, len(scores))
    if weights is None:
        retained = torch.arange(1, len(scores) + 1, dtype=torch.float64)
        return RiskCoverage(retained / len(scores), _expected_losses(scores, losses).cumsum(0) / retained)
    numbers = as_weights(weights, len(scores))
    counts = numbers > 0
    ordered, shares = _weighted_losses(scores[counts], losses[counts], numbers[counts])
    retained = shares.cumsum(0)
    return RiskCoverage(retained / retained[-1], (shares * ordered).cumsum(0) / retained)


def aurc(
    confidence: Array, correct: Array | None = None, *, loss: Array | None = None, weights: Array | None = None
) -> float:
    """Area under the risk-coverage curve: the mean of its N risks, by weight; lower is better.

    It grows with the error rate of the model; `excess_aurc` measures the quality of the confidence alone.

    Args:
        confidence: Higher for predictions to retain, (N,).
        correct: One (or True) for each correct prediction, else zero, (N,).
        loss: Alternative to `correct`: a finite, non-negative loss of each prediction, (N,).
        weights: How much each prediction counts, not negative, (N,).

    Raises:
        ValueError: If an argument is malformed, see `risk_coverage`.

    Reference: Geifman, Uziel, El-Yaniv, *Bias-reduced uncertainty estimation for deep neural classifiers*, 2019.

    Example:
        >>> aurc(torch.tensor([0.9, 0.8]), torch.tensor([1, 0]))
        0.25
    """
    return _area(risk_coverage(confidence, correct, loss=loss, weights=weights), weights)


def aurc_influence(confidence: Tensor, correct: Tensor) -> Tensor:
    """The AURC plus the influence of each example on it, (N,): their mean is the AURC.

    An example of rank r, with the risks R_k of the k most confident, has R_r − AURC for its place as a threshold and
    Σ_{k ≥ r} (loss − R_k)/k for its part in the risks. Ties have the mean over their ranks.
    """
    losses = (~correct).double()
    _, group, counts = (-confidence).unique(return_inverse=True, return_counts=True)
    numbers = torch.arange(1, len(losses) + 1, dtype=torch.float64)
    risks = _expected_losses(confidence, losses).cumsum(0) / numbers
    groups = torch.arange(len(counts)).repeat_interleave(counts)

    def of_ties(terms: Tensor) -> Tensor:
        return (torch.bincount(groups, terms) / counts)[group]

    def from_here(terms: Tensor) -> Tensor:
        return terms.flip(0).cumsum(0).flip(0)

    return of_ties(risks) + losses * of_ties(from_here(1 / numbers)) - of_ties(from_here(risks / numbers))


def excess_aurc(
    confidence: Array, correct: Array | None = None, *, loss: Array | None = None, weights: Array | None = None
) -> float:
    """AURC minus the AURC of the best possible order of the same losses; zero for a perfect order.

    Args:
        confidence: Higher for predictions to retain, (N,).
        correct: One (or True) for each correct prediction, else zero, (N,).
        loss: Alternative to `correct`: a finite, non-negative loss of each prediction, (N,).
        weights: How much each prediction counts, not negative, (N,).

    Raises:
        ValueError: If an argument is malformed, see `risk_coverage`.

    Reference: Geifman, Uziel, El-Yaniv 2019, with the exact area of the best order instead of its approximation.

    Example:
        >>> excess_aurc(torch.tensor([0.8, 0.9]), torch.tensor([1, 0]))
        0.5
    """
    best = _area(best_risk_coverage(correct, loss=loss, weights=weights), weights)
    return max(0.0, aurc(confidence, correct, loss=loss, weights=weights) - best)  # negative only by rounding


def augrc(
    confidence: Array, correct: Array | None = None, *, loss: Array | None = None, weights: Array | None = None
) -> float:
    """Area under the generalized risk-coverage curve: the mean of (k/N) · risk of the k most confident.

    Lower is better. It is the average number of undetected errors among all predictions, and weights every error alike,
    where AURC weights the most confident ones more.

    Args:
        confidence: Higher for predictions to retain, (N,).
        correct: One (or True) for each correct prediction, else zero, (N,).
        loss: Alternative to `correct`: a finite, non-negative loss of each prediction, (N,).
        weights: How much each prediction counts, not negative, (N,).

    Raises:
        ValueError: If an argument is malformed, see `risk_coverage`.

    Reference: Traub et al., *Overcoming common flaws in the evaluation of selective classification systems*, 2024.

    Example:
        >>> augrc(torch.tensor([0.9, 0.8]), torch.tensor([1, 0]))
        0.25
    """
    curve = risk_coverage(confidence, correct, loss=loss, weights=weights)
    return _area(curve._replace(risk=curve.coverage * curve.risk), weights)


def rejection_ratio(
    confidence: Array, correct: Array | None = None, *, loss: Array | None = None, weights: Array | None = None
) -> float:
    """Prediction rejection ratio: gain of this order over a random one, as a share of the best order's gain.

    The gain is in AUGRC: 1 for the best order, 0 for a random one, negative for a worse one; NaN if all losses are
    equal.

    Args:
        confidence: Higher for predictions to retain, (N,).
        correct: One (or True) for each correct prediction, else zero, (N,).
        loss: Alternative to `correct`: a finite, non-negative loss of each prediction, (N,).
        weights: How much each prediction counts, not negative, (N,).

    Raises:
        ValueError: If an argument is malformed, see `risk_coverage`.

    Reference: Malinin, Mlodozeniec, Gales, *Ensemble distribution distillation*, 2020.

    Example:
        >>> rejection_ratio(torch.tensor([0.9, 0.6, 0.8]), torch.tensor([1, 0, 1]))
        1.0
    """
    scores = as_vector(confidence, "confidence")
    losses = _losses(correct, loss, len(scores))
    orders = (scores, torch.zeros_like(losses), -losses)
    own, random, best = (augrc(order, loss=losses, weights=weights) for order in orders)
    return (random - own) / (random - best) if random - best > 1e-15 else math.nan


def ood_risk_coverage(confidence: Array, correct: Array, ood_confidence: Array) -> RiskCoverage:
    """The risk-coverage curve where out-of-distribution inputs count as errors (SCOD).

    Args:
        confidence: Of in-distribution predictions, higher for those to retain, (N,).
        correct: Whether each of them is correct, (N,).
        ood_confidence: Of the out-of-distribution inputs, (M,).

    Raises:
        ValueError: If a vector is malformed or lengths differ.

    Reference: Xia, Bouganis, *Augmenting softmax information for selective classification with out-of-distribution
    data*, 2022.

    Example:
        >>> ood_risk_coverage(torch.tensor([0.9, 0.5]), torch.tensor([1, 1]), torch.tensor([0.7])).risk
        tensor([0.0000, 0.5000, 0.3333], dtype=torch.float64)
    """
    known, foreign = as_vector(confidence, "confidence"), as_vector(ood_confidence, "ood_confidence")
    losses = torch.cat([_losses(correct, None, len(known)), torch.ones_like(foreign)])
    return risk_coverage(torch.cat([known, foreign]), loss=losses)


def sparsification_error(uncertainty: Array, errors: Array, *, weights: Array | None = None) -> float:
    """AUSE: how far the order of uncertainties is from that of errors, for regressions; 0 if they agree.

    As predictions with the largest uncertainty are left out one by one, the mean error of the others falls; the score
    is the area between this curve and that of the best order, over the mean error of all.

    Args:
        uncertainty: For example predictive variances, (N,).
        errors: Not negative, for example absolute errors, (N,).
        weights: How much each prediction counts, not negative, (N,).

    Raises:
        ValueError: If an argument is malformed.

    Reference: Ilg et al., *Uncertainty estimates and multi-hypotheses networks for optical flow*, 2018.

    Example:
        >>> sparsification_error(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.1, 0.2, 0.3]))
        0.0
    """
    spread, losses = as_vector(uncertainty, "uncertainty"), as_vector(errors, "errors")
    numbers = torch.ones_like(losses) if weights is None else as_weights(weights, len(losses))
    mean = ((numbers * losses).sum() / numbers.sum()).item()
    return excess_aurc(-spread, loss=losses, weights=weights) / mean if mean > 0 else 0.0


def best_risk_coverage(
    correct: Array | None = None, *, loss: Array | None = None, weights: Array | None = None
) -> RiskCoverage:
    """The risk-coverage curve of the best possible order: predictions sorted by increasing loss.

    Args:
        correct: One (or True) for each correct prediction, else zero, (N,).
        loss: Alternative to `correct`: a finite, non-negative loss of each prediction, (N,).
        weights: How much each prediction counts, not negative, (N,).

    Raises:
        ValueError: If an argument is malformed, see `risk_coverage`.

    Example:
        >>> best_risk_coverage(torch.tensor([0, 1])).risk
        tensor([0.0000, 0.5000], dtype=torch.float64)
    """
    losses = _losses(correct, loss, None)
    return risk_coverage(-losses, loss=losses, weights=weights)


def accuracy_at_coverage(
    confidence: Array, correct: Array, coverages: Sequence[float] = COVERAGES, *, weights: Array | None = None
) -> Tensor:
    """Accuracy of the most confident predictions at each coverage, (K,).

    A coverage c of N predictions retains the ⌈c N⌉ most confident ones; with weights, the fewest whose share of the
    weights is at least c.

    Args:
        confidence: Higher for predictions to retain, (N,).
        correct: One (or True) for each correct prediction, else zero, (N,).
        coverages: Shares of predictions to retain, above 0 and at most 1.
        weights: How much each prediction counts, not negative, (N,).

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> accuracy_at_coverage(torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([1, 1, 0, 0]), (0.5, 1.0))
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    curve = risk_coverage(confidence, correct, weights=weights)
    return 1 - curve.risk[num_retained(coverages, len(curve.risk), None if weights is None else curve.coverage) - 1]


def selective_intervals(
    confidence: Array, correct: Array, coverages: Sequence[float] = COVERAGES, *, level: float = 0.95
) -> SelectiveIntervals:
    """Clopper and Pearson's intervals of `accuracy_at_coverage`.

    `aurc` and `excess_aurc` have no intervals: nominal 95 % bootstrap intervals covered the true area in 71 to 76 % of
    simulated data sets of 30 examples.

    Args:
        confidence: Higher for predictions to retain, (N,).
        correct: One (or True) for each correct prediction, else zero, (N,).
        coverages: Shares of predictions to retain, above 0 and at most 1.
        level: Probability that each interval covers the population accuracy.

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> confidence, correct = torch.linspace(1, 0, 100), torch.arange(100) < 70
        >>> low, high = selective_intervals(confidence, correct).accuracy[0]
        >>> low < accuracy_at_coverage(confidence, correct)[0].item() < high
        True
    """
    check_fraction(level, "level")
    shares = accuracy_at_coverage(confidence, correct, coverages).tolist()
    retained = num_retained(coverages, len(as_vector(confidence, "confidence"))).tolist()
    pairs = zip(shares, retained, strict=True)
    return SelectiveIntervals(tuple(proportion_interval(accuracy * k, k, level) for accuracy, k in pairs))


def num_retained(coverages: Sequence[float], num_examples: int, shares_of_weights: Tensor | None = None) -> Tensor:
    """Number of retained predictions at each coverage c, (K,): ⌈c N⌉, or the fewest with this share of the weights."""
    shares = as_vector(torch.as_tensor(coverages, dtype=torch.float64), "coverages")
    if shares.min() <= 0 or shares.max() > 1:
        got = f"{shares.min():.3g}..{shares.max():.3g}"
        raise ValueError(f"`coverages` must be above 0 and at most 1, got values in {got}.")
    if shares_of_weights is not None:
        return (torch.searchsorted(shares_of_weights, shares - 1e-9) + 1).clamp(max=num_examples)
    return (shares * num_examples - 1e-9).ceil().long().clamp(min=1)


def _area(curve: RiskCoverage, weights: Array | None) -> float:
    """The mean risk of a curve, by weight if there are weights."""
    if weights is None:
        return curve.risk.mean().item()
    return (curve.coverage.diff(prepend=curve.coverage.new_zeros(1)) * curve.risk).sum().item()


def _losses(correct: Array | None, loss: Array | None, length: int | None) -> Tensor:
    """The checked losses, (N,)."""
    if (correct is None) == (loss is None):
        raise ValueError(f"`correct` or `loss` must be given, got {'neither' if loss is None else 'both'}.")
    if correct is not None:
        return 1 - as_correct(correct, length, "confidence").double()
    assert loss is not None
    losses = as_vector(loss, "loss")
    if losses.min() < 0:
        raise ValueError(f"`loss` must not be negative, got {losses.min().item():.3g}.")
    if length is not None and len(losses) != length:
        raise ValueError(f"`loss` must have shape ({length},) as `confidence` has, got ({len(losses)},).")
    return losses


def _expected_losses(confidence: Tensor, losses: Tensor) -> Tensor:
    """Losses in descending order of confidence, (N,); predictions of equal confidence share their mean loss."""
    _, group, counts = (-confidence).unique(return_inverse=True, return_counts=True)
    means = torch.bincount(group, weights=losses) / counts
    return means.repeat_interleave(counts)


def _weighted_losses(confidence: Tensor, losses: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and weights in descending order of confidence, (N,) each; those of equal confidence share their means."""
    _, group, counts = (-confidence).unique(return_inverse=True, return_counts=True)
    totals = torch.bincount(group, weights=weights)
    means = torch.bincount(group, weights=weights * losses) / totals
    return means.repeat_interleave(counts), (totals / counts).repeat_interleave(counts)
