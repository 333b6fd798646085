"""Calibration of predicted variances: predicted standard deviation against root mean squared error, bin by bin.

Bins of equal mass by predicted variance start at the sorted variances number 0, n/b, 2n/b, …. Equal variances share a
bin, so if all variances are equal there is one bin. Every output of every example counts as a target.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayes_kf.evaluation.inputs import Array, as_float, check_positive_int
from bayes_kf.evaluation.regression.scores import check_gaussian
from bayes_kf.evaluation.resampling.binning import bin_index
from bayes_kf.evaluation.resampling.null_test import NullComparison, check_simulation, compare_to_null


class SpreadBins(NamedTuple):
    """Predicted and observed standard deviations in bins of equal mass, none of them empty; each field is (bins,)."""

    counts: Tensor  # int64
    predicted_sd: Tensor  # root of the mean predicted variance
    found_sd: Tensor  # root of the mean squared error


def sharpness(variance: Array) -> float:
    """Root mean predictive variance, in the targets' unit; of equally calibrated forecasts, lower is better.

    Args:
        variance: Predictive variances (noise included), any shape, not negative.

    Raises:
        ValueError: If a variance is not finite or negative.

    Reference: Gneiting, Balabdaoui, Raftery 2007; as a root mean square: Kuleshov, Fenner, Ermon 2018.

    Example:
        >>> sharpness(torch.tensor([1.0, 7.0]))
        2.0
    """
    checked = as_float(variance, "variance")
    if checked.min() < 0:
        raise ValueError(f"`variance` must not be negative, got {checked.min().item():.3g}.")
    return checked.mean().sqrt().item()


def spread_bins(mean: Array, variance: Array, targets: Array, num_bins: int = 10) -> SpreadBins:
    """Root mean variance and root mean squared error in bins of equal mass by predicted variance.

    Args:
        mean: Predictive means, (N,) or (N, m).
        variance: Predictive variances (noise included), of the same shape, positive.
        targets: Observed targets, of the same shape.
        num_bins: Maximum number of bins, see the description of this module.

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> variance, targets = torch.tensor([1.0, 1.0, 4.0, 4.0]), torch.tensor([1.0, -1.0, 2.0, 4.0])
        >>> bins = spread_bins(torch.zeros(4), variance, targets, num_bins=2)
        >>> bins.predicted_sd.tolist(), [round(sd, 4) for sd in bins.found_sd.tolist()]
        ([1.0, 2.0], [1.0, 3.1623])
    """
    check_positive_int(num_bins, "num_bins")
    center, predictive_var, observed = (values.flatten() for values in check_gaussian(mean, variance, targets))
    index = _bins(predictive_var, num_bins)
    counts = torch.bincount(index)
    predicted_var = torch.bincount(index, weights=predictive_var) / counts
    error_var = torch.bincount(index, weights=(observed - center).square()) / counts
    return SpreadBins(counts, predicted_var.sqrt(), error_var.sqrt())


def expected_normalized_calibration_error(mean: Array, variance: Array, targets: Array, num_bins: int = 10) -> float:
    """ENCE: mean over bins of |predicted sd − RMSE| / predicted sd, see `spread_bins`.

    The ENCE of calibrated forecasts is positive in a finite sample; `ence_test` gives its null band.

    Args:
        mean: Predictive means, (N,) or (N, m).
        variance: Predictive variances (noise included), of the same shape, positive.
        targets: Observed targets, of the same shape.
        num_bins: Maximum number of bins, see the description of this module.

    Raises:
        ValueError: If an argument is malformed.

    Reference: Levi, Gispan, Giladi, Fetaya, *Evaluating and calibrating uncertainty prediction in regression tasks*,
    2019.

    Example:
        >>> expected_normalized_calibration_error(torch.zeros(2), torch.tensor([1.0, 4.0]), torch.tensor([1.0, 3.0]))
        0.25
    """
    return _ence(spread_bins(mean, variance, targets, num_bins)).item()


def ence_test(
    mean: Array,
    variance: Array,
    targets: Array,
    num_bins: int = 10,
    *,
    num_simulations: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> NullComparison:
    """ENCE with its null band, for targets drawn from N(mean, variance), and a one-sided p-value.

    The sum of a bin's squared errors, Σ v_i z_i², is drawn from a scaled χ² distribution of the same mean and variance,
    which is exact if the variances of the bin are equal. The cost does not depend on the number of targets.

    Args:
        mean: Predictive means, (N,) or (N, m).
        variance: Predictive variances (noise included), of the same shape, positive.
        targets: Observed targets, of the same shape.
        num_bins: Maximum number of bins, see the description of this module.
        num_simulations: Number of simulated data sets, at least 2/(1 − level) − 1.
        level: Probability inside the null band.
        seed: Seed of the simulation.

    Raises:
        ValueError: If an argument is malformed.

    Reference: the scaled χ²: Satterthwaite 1946.

    Example:
        >>> test = ence_test(torch.zeros(100), torch.ones(100), torch.linspace(-4, 4, 100))
        >>> test.value > 1, test.null_high < 0.2, test.p_value < 0.01
        (True, True, True)
    """
    check_simulation(num_simulations, level)
    value = torch.tensor(expected_normalized_calibration_error(mean, variance, targets, num_bins), dtype=torch.float64)
    predictive_var = as_float(variance, "variance").flatten()
    index = _bins(predictive_var, num_bins)
    sums, square_sums = (torch.bincount(index, weights=w) for w in (predictive_var, predictive_var.square()))
    dof = sums.square() / square_sums
    squares = np.random.default_rng(seed).chisquare(dof.numpy(), (num_simulations, len(dof)))
    ratio = torch.from_numpy(squares).div(dof).sqrt()  # simulated over predicted sd, (R, bins)
    return compare_to_null(value, (1 - ratio).abs().mean(dim=1), level)


def _ence(bins: SpreadBins) -> Tensor:
    """The ENCE of the bins."""
    return (1 - bins.found_sd / bins.predicted_sd).abs().mean()


def _bins(variance: Tensor, num_bins: int) -> Tensor:
    """The bin of each variance (n,); no bin is empty."""
    starts = torch.arange(num_bins) * len(variance) // num_bins
    edges = torch.cat([variance.sort().values[starts].unique(), variance.max()[None]])
    return bin_index(variance, edges)
