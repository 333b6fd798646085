"""Spiegelhalter's test of calibration."""

import math

import scipy
from torch import Tensor

from bayes_kf.evaluation.inputs import Array, as_probs, as_targets
from bayes_kf.evaluation.resampling.null_test import CalibrationTest

VARIANCE_ROUNDING = 1e-12  # of the Brier score's variance relative to (Σ p²)², for float32 probabilities
EXCESS_ROUNDING = 1e-6  # of the excess, for float32 probabilities


def spiegelhalter_test(probs: Array, targets: Array) -> CalibrationTest:
    """Statistic and p-value of Spiegelhalter's test: does the Brier score equal its expectation under calibration?

    The statistic is the Brier score minus its expectation when labels are drawn from the probabilities, in standard
    deviations; the p-value is two-sided and asymptotic. A positive statistic means a worse score than expected, as
    over-confident models have. For two classes it is Spiegelhalter's z. For more classes it is our extension: the same
    test with the Brier score over all classes. If every probability is 0, 1 or 1/C, the Brier score has no variance;
    then the statistic is 0 with p-value 1 if the labels fit, and infinite with p-value 0 if they do not.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).

    Raises:
        ValueError: If an argument is malformed.

    Reference: Spiegelhalter, *Probabilistic prediction in patient management and clinical trials*, 1986.

    Example:
        >>> import torch
        >>> test = spiegelhalter_test(torch.tensor([[0.9, 0.1]] * 50), torch.tensor([0, 1] * 25))
        >>> test.statistic > 5, test.p_value < 1e-6
        (True, True)
    """
    checked = as_probs(probs)
    excess, variance = spiegelhalter_parts(checked, as_targets(targets, checked))
    return spiegelhalter_from(excess.sum().item(), variance.sum().item())


def spiegelhalter_parts(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each example's Brier score minus its expectation under its own probabilities, and its variance, each (N,).

    Both are exactly zero, without rounding, where every probability is 0 or equals the other ones.
    """
    normalized = probs / probs.sum(dim=1, keepdim=True)
    powers = normalized.square()
    squares = powers.sum(dim=1)
    excess = 2 * (squares - normalized.gather(1, labels[:, None])[:, 0])
    variance = 4 * ((powers * normalized).sum(dim=1) - squares.square())
    constant = variance <= VARIANCE_ROUNDING * squares.square()
    return excess.masked_fill(constant & (excess.abs() < EXCESS_ROUNDING), 0.0), variance.masked_fill(constant, 0.0)


def spiegelhalter_from(excess: float, variance: float) -> CalibrationTest:
    """The test from the sums of the excess and of the variance over all examples."""
    if variance > 0:
        z = excess / math.sqrt(variance)
        return CalibrationTest(z, 2 * float(scipy.stats.norm.sf(abs(z))))
    fits = abs(excess) < EXCESS_ROUNDING
    return CalibrationTest(0.0 if fits else math.copysign(math.inf, excess), 1.0 if fits else 0.0)
