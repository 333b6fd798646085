"""What chance alone would show: calibration statistics of a perfectly calibrated model of the same confidences.

Labels are drawn from the predicted probabilities themselves, so that every simulated data set is calibrated by
construction and has this sample size; whatever calibration error it shows is chance. A reported error means something
only where it lies outside these.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bayes_kf.evaluation._inputs import Array, as_targets, check_choice, check_fraction, check_positive_int
from bayes_kf.evaluation.binning import Binning, Cells, Kind, observed_hits, simulated_hits
from bayes_kf.evaluation.calibration import checked_cells, statistic_of

Statistic = Literal["ece", "mce", "gap"]
STATISTICS = ("ece", "mce", "gap")


class CalibrationNull(NamedTuple):
    """Mean and central interval of a statistic under perfect calibration."""

    mean: float
    low: float
    high: float


class Calibrated(NamedTuple):
    """A statistic beside what chance alone would show.

    The p-value is the share of simulated data sets that are at least as bad, (1 + k)/(1 + simulations): one-sided for
    the errors, two-sided for the gap.
    """

    value: float
    null_mean: float
    null_low: float
    null_high: float
    p_value: float


def calibration_null(
    probs: Array,
    statistic: Statistic = "ece",
    *,
    num_bins: int = 15,
    binning: Binning = "equal_width",
    kind: Kind = "top_label",
    num_simulations: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> CalibrationNull:
    """Mean and central `level` interval of a statistic if the model were perfectly calibrated.

    Args:
        probs: Class probabilities, (N, C); no labels are needed.
        statistic: "ece", "mce", or "gap" (mean confidence minus accuracy, top label only).
        num_bins: Number of bins.
        binning: "equal_width" or "equal_mass".
        kind: "top_label" or "classwise".
        num_simulations: Number of simulated data sets, at least 2/(1 − level) − 1.
        level: Probability inside the interval.
        seed: Seed of the simulation.

    Raises:
        ValueError: If an argument is malformed.

    Reference: Bröcker, Smith, *Increasing the reliability of reliability diagrams*, 2007; Vaicenavicius et al. 2019.

    Example:
        >>> null = calibration_null(torch.full((100, 4), 0.25), num_bins=10)
        >>> 0 <= null.low < null.mean < null.high < 0.15
        True
    """
    checked, cells = _checked(probs, statistic, num_bins, binning, kind)
    check_simulation(num_simulations, level)
    simulated = statistic_of(statistic, cells, simulated_hits(cells, checked, num_simulations, seed))
    return _summary(simulated, level)


def calibration_test(
    probs: Array,
    targets: Array,
    statistic: Statistic = "ece",
    *,
    num_bins: int = 15,
    binning: Binning = "equal_width",
    kind: Kind = "top_label",
    num_simulations: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Calibrated:
    """A calibration statistic, its interval under perfect calibration, and a p-value.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).
        statistic: "ece", "mce", or "gap" (mean confidence minus accuracy, top label only).
        num_bins: Number of bins.
        binning: "equal_width" or "equal_mass".
        kind: "top_label" or "classwise".
        num_simulations: Number of simulated data sets, at least 2/(1 − level) − 1.
        level: Probability inside the interval.
        seed: Seed of the simulation.

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> result = calibration_test(torch.tensor([[0.9, 0.1]] * 50), torch.tensor([0, 1] * 25))
        >>> round(result.value, 3), result.value > result.null_high, result.p_value < 0.01
        (0.4, True, True)
    """
    checked, cells = _checked(probs, statistic, num_bins, binning, kind)
    check_simulation(num_simulations, level)
    simulated = simulated_hits(cells, checked, num_simulations, seed)
    return compare(statistic, cells, observed_hits(cells, checked, as_targets(targets, checked)), simulated, level)


def reliability_band(
    probs: Array,
    *,
    num_bins: int = 15,
    binning: Binning = "equal_width",
    num_simulations: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Lowest and highest accuracy that a perfectly calibrated model would show in each bin, each (bins,).

    The band holds bin by bin: of twenty bins of a calibrated model one lies outside its 95 % band on average. Bins are
    those of `reliability_bins`; empty ones have NaN.

    Args:
        probs: Class probabilities, (N, C).
        num_bins: Number of bins.
        binning: "equal_width" or "equal_mass".
        num_simulations: Number of simulated data sets, at least 2/(1 − level) − 1.
        level: Probability inside the band of each bin.
        seed: Seed of the simulation.

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> low, high = reliability_band(torch.full((100, 2), 0.5), num_bins=1)
        >>> 0.35 < low.item() < 0.45 and 0.55 < high.item() < 0.65
        True
    """
    checked, cells = checked_cells(probs, num_bins, binning, "top_label")
    check_simulation(num_simulations, level)
    hits = simulated_hits(cells, checked, num_simulations, seed)
    shares = (hits / cells.counts)[:, : len(cells.edges[0]) - 1]  # (R, bins)
    low, high = shares.quantile(_positions(level, num_simulations), dim=0)
    return low, high


def compare(name: str, cells: Cells, hits: Tensor, simulated: Tensor, level: float) -> Calibrated:
    """A statistic of hits (cells,) beside the same statistic of simulated hits (R, cells)."""
    value = statistic_of(name, cells, hits)
    null = statistic_of(name, cells, simulated)
    as_bad = null.abs() >= value.abs() - 1e-12  # equal up to the order of summation
    p_value = (1 + as_bad.sum().item()) / (1 + len(null))
    summary = _summary(null, level)
    return Calibrated(value.item(), summary.mean, summary.low, summary.high, p_value)


def _summary(simulated: Tensor, level: float) -> CalibrationNull:
    """Mean and central interval of simulated values (R,)."""
    low, high = simulated.quantile(_positions(level, len(simulated)))
    return CalibrationNull(simulated.mean().item(), low.item(), high.item())


def _checked(probs: Array, statistic: str, num_bins: int, binning: Binning, kind: Kind) -> tuple[Tensor, Cells]:
    """Checked probabilities and their cells, for a statistic that exists for this kind."""
    check_choice(statistic, "statistic", STATISTICS)
    if statistic == "gap" and kind == "classwise":
        raise ValueError('`kind` must be "top_label" for the statistic "gap", got "classwise".')
    return checked_cells(probs, num_bins, binning, kind)


def check_simulation(num_simulations: int, level: float) -> None:
    """Refuses a number of simulations or a level that gives no interval."""
    check_positive_int(num_simulations, "num_simulations")
    check_fraction(level, "level")
    needed = math.ceil(2 / (1 - level) - 1 - 1e-9)
    if num_simulations < needed:
        raise ValueError(f"`num_simulations` must be at least {needed} for level {level}, got {num_simulations}.")


def _positions(level: float, num_simulations: int) -> Tensor:
    """Where to read both quantiles: one more draw lies below the k-th of R with probability k/(R + 1)."""
    tail = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    return ((tail * (num_simulations + 1) - 1) / (num_simulations - 1)).clamp(0, 1)  # clamps rounding only, as checked
