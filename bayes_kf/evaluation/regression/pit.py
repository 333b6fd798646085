"""The probability integral transform (PIT) of targets, and tests of its uniformity.

The PIT value of a target is its predictive distribution function at the target. Calibrated forecasts give uniform
values on [0, 1]. Too many values near both ends mean that forecasts are too narrow, too many in the middle that they
are too wide, too many at one end that they are biased. The share of values up to q is the share of targets below their
predicted q-quantile.

Tests and bands assume independent values. If the errors of an example's outputs are correlated, the tests reject too
often.
"""

from typing import Literal

import numpy as np
import scipy
import torch
from torch import Tensor

from bayes_kf.evaluation.inputs import Array, as_float, check_choice, check_positive_int
from bayes_kf.evaluation.regression.scores import check_gaussian, coverage_null, sample_blocks
from bayes_kf.evaluation.resampling.null_test import CalibrationTest

NUM_BINS = 20
MIN_PER_BIN = 5  # values expected per bin, for the χ² approximation

PITMethod = Literal["ks", "chi2"]
PIT_METHODS = ("ks", "chi2")


def pit_gaussian(mean: Array, variance: Array, targets: Array) -> Tensor:
    """Φ((target − mean)/sd) of each target, in their shape.

    Args:
        mean: Predictive means, (N,) or (N, m).
        variance: Predictive variances (noise included), of the same shape, positive.
        targets: Observed targets, of the same shape.

    Raises:
        ValueError: If a shape differs, a value is not finite, or a variance is not positive.

    Reference: Dawid 1984.

    Example:
        >>> pit_gaussian(torch.zeros(2), torch.ones(2), torch.tensor([0.0, 1.0]))
        tensor([0.5000, 0.8413], dtype=torch.float64)
    """
    center, predictive_var, observed = check_gaussian(mean, variance, targets)
    return torch.special.ndtr((observed - center) / predictive_var.sqrt())


def pit_samples(samples: Array, targets: Array, seed: int = 0) -> Tensor:
    """(rank + u)/(S + 1) of each target among its S draws, u uniform, in the targets' shape.

    The rank is the number of draws below the target; if draws equal the target (counts), each rank among them is
    equally likely. So the values are exactly uniform for any S, continuous or discrete, if targets and draws have the
    same distribution.

    Args:
        samples: Draws of the *target* (noise included), (S, N) or (S, N, m).
        targets: Observed targets, (N,) or (N, m).
        seed: Seed of u and of the ranks among equal draws.

    Raises:
        ValueError: If a shape differs, a value is not finite, or there is no draw.

    Reference: randomized for counts: Czado, Gneiting, Held 2009; ranks: Hamill 2001.

    Example:
        >>> pit = pit_samples(torch.tensor([[0.0], [2.0]]), torch.tensor([1.0]))
        >>> 1 / 3 <= pit.item() < 2 / 3
        True
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for draws, observed in sample_blocks(samples, targets, min_draws=1):
        below, ranks = (draws < observed).sum(dim=0), (draws == observed).sum(dim=0) + 1
        uniform = torch.rand(observed.shape, generator=generator, dtype=torch.float64)
        parts.append((below + ranks * uniform) / (len(draws) + 1))
    return torch.cat(parts).reshape(torch.as_tensor(targets).shape)


def pit_test(pit: Array, method: PITMethod = "ks", num_bins: int = NUM_BINS) -> CalibrationTest:
    """Statistic and p-value of a test that the PIT values are uniform.

    Args:
        pit: PIT values between 0 and 1, any shape.
        method: "ks" is the Kolmogorov-Smirnov test (the largest distance between the empirical distribution function
            and the diagonal); it needs no bins and is exact for any number of values. "chi2" is Pearson's test on the
            counts of equal bins; it responds to every deviation of the histogram, but needs 5 values per bin.
        num_bins: Number of bins of "chi2".

    Raises:
        ValueError: If a value lies outside 0 to 1, the method is unknown, or bins would hold fewer than 5 values.

    Example:
        >>> test = pit_test(torch.linspace(0.005, 0.995, 100))
        >>> round(test.statistic, 3), test.p_value > 0.99
        (0.005, True)
    """
    values = as_pit(pit)
    check_choice(method, "method", PIT_METHODS)
    if method == "ks":
        ks = scipy.stats.kstest(values.numpy(), "uniform")
        return CalibrationTest(float(ks.statistic), float(ks.pvalue))
    check_positive_int(num_bins, "num_bins")
    if num_bins < 2 or len(values) < MIN_PER_BIN * num_bins:
        most = len(values) // MIN_PER_BIN
        raise ValueError(
            f"`num_bins` must be 2 to {most}, so that 5 of {len(values)} values fall in each, got {num_bins}."
        )
    chi2 = scipy.stats.chisquare(pit_counts(values, num_bins).numpy())
    return CalibrationTest(float(chi2.statistic), float(chi2.pvalue))


def ks_null(num_values: int, level: float = 0.95) -> tuple[float, float]:
    """Null band: central interval of the Kolmogorov-Smirnov statistic of independent uniform values.

    Args:
        num_values: Number of PIT values.
        level: Probability inside the null band.

    Raises:
        ValueError: If the number is not positive.

    Example:
        >>> low, high = ks_null(100)
        >>> round(low, 3), round(high, 3)
        (0.047, 0.146)
    """
    check_positive_int(num_values, "num_values")
    low, high = (float(scipy.stats.kstwo.ppf(share, num_values)) for share in ((1 - level) / 2, (1 + level) / 2))
    return low, high


def pit_counts(pit: Array, num_bins: int = NUM_BINS) -> Tensor:
    """Number of PIT values in each of `num_bins` equal bins, (num_bins,) int64; 1 belongs to the last bin.

    Args:
        pit: PIT values between 0 and 1, any shape.
        num_bins: Number of bins.

    Raises:
        ValueError: If a value lies outside 0 to 1 or the number is not positive.

    Example:
        >>> pit_counts(torch.tensor([0.0, 0.4, 1.0]), num_bins=2).tolist()
        [2, 1]
    """
    check_positive_int(num_bins, "num_bins")
    return torch.from_numpy(np.histogram(as_pit(pit).numpy(), bins=num_bins, range=(0, 1))[0])


def pit_band(num_values: int, num_bins: int) -> tuple[float, float]:
    """Ends of the 95 % null band: share of PIT values in one bin, for calibrated forecasts."""
    low, high = coverage_null(np.array([1 / num_bins]), num_values)
    return low.item(), high.item()


def as_pit(pit: Array) -> Tensor:
    """PIT values as a float64 vector; raises a ValueError for values outside 0..1."""
    values = as_float(pit, "pit").flatten()
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"`pit` must lie in 0..1, got values in {values.min():.3g}..{values.max():.3g}.")
    return values
