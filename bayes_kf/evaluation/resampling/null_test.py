"""A statistic and its null distribution: its values in data sets simulated under the null hypothesis."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy
import torch
from torch import Tensor

from bayes_kf.evaluation.inputs import check_fraction, check_positive_int
from bayes_kf.evaluation.score import Interval, Score

SUM_ROUNDING = 1e-12  # statistics this close are equal: they differ by the order of summation only


@dataclass(frozen=True)
class NullSettings:
    """How calibration is binned, and how its null distribution is simulated.

    Attributes:
        num_bins: Number of bins of classification errors; regression has bins of its own.
        num_simulations: Number of simulated data sets.
        seed: Seed of the simulation.
    """

    num_bins: int = 15
    num_simulations: int = 1000
    seed: int = 0


class CalibrationNull(NamedTuple):
    """Mean and central interval of a statistic under perfect calibration."""

    mean: float
    low: float
    high: float


class CalibrationTest(NamedTuple):
    """A test statistic and its p-value under perfect calibration."""

    statistic: float
    p_value: float


class NullComparison(NamedTuple):
    """A statistic with its null band and its p-value.

    `null_mean`, `null_low` and `null_high` are the mean and the central interval of the simulated values. With k of R
    simulated values at least as far from zero as the statistic, the p-value is (1 + k)/(1 + R): one-sided for
    calibration errors, which are never negative, and two-sided for the confidence gap.
    """

    value: float
    null_mean: float
    null_low: float
    null_high: float
    p_value: float

    def score(self, interval: Interval | None = None) -> Score:
        """The same numbers as a `Score`, with the statistic's confidence interval where one is known."""
        return Score(self.value, interval, Interval(self.null_low, self.null_high), self.null_mean, self.p_value)


def compare_to_null(value: Tensor, null: Tensor, level: float, *, compared: Tensor | None = None) -> NullComparison:
    """A statistic with its null band and p-value, from simulated values.

    Args:
        value: The statistic, a scalar.
        null: Simulated values, (R,).
        level: Probability inside the null band.
        compared: The statistic as the simulation computes it, for the p-value, if that differs from `value` (coarser
            cells of confidence).
    """
    compared = value if compared is None else compared
    at_least = null.abs() >= compared.abs() - SUM_ROUNDING
    p_value = (1 + at_least.sum().item()) / (1 + len(null))
    summary = summarize_null(null, level)
    return NullComparison(value.item(), summary.mean, summary.low, summary.high, p_value)


def compare_to_few(value: Tensor, null: Tensor, level: float) -> NullComparison:
    """A statistic that is a sum of many absolute values, with its null band and p-value from few simulated values.

    The square root of such a sum is nearly normal. So the square root of a new value lies in the t-interval of R − 1
    degrees of freedom around the mean of the R simulated ones, and 40 of them give a band as exact as 200 quantiles do.

    Args:
        value: The statistic, a scalar, not negative.
        null: Simulated values, (R,), of at least two.
        level: Probability inside the null band.
    """
    roots, freedom = null.clamp(min=0).sqrt(), len(null) - 1
    mean, spread = roots.mean().item(), roots.std().item() * math.sqrt(1 + 1 / len(null))
    if spread <= SUM_ROUNDING:  # no label can be another one
        return compare_to_null(value, null, level)
    half = float(scipy.stats.t.ppf((1 + level) / 2, freedom)) * spread
    p_value = float(scipy.stats.t.sf((math.sqrt(max(value.item(), 0.0)) - mean) / spread, freedom))
    low, high = max(mean - half, 0.0) ** 2, (mean + half) ** 2
    return NullComparison(value.item(), null.mean().item(), low, high, p_value)


def summarize_null(simulated: Tensor, level: float) -> CalibrationNull:
    """Mean and central interval of simulated values (R,).

    If more values than the lower tail holds equal the smallest one (debiased errors are often zero), the interval
    starts at the smallest value and the upper tail takes the whole remaining probability.
    """
    low, high = null_quantiles(simulated, ((1 - level) / 2, (1 + level) / 2))
    if (simulated == simulated.min()).double().mean() > (1 - level) / 2:
        low, high = simulated.min(), null_quantiles(simulated, (level,))[0]
    return CalibrationNull(simulated.mean().item(), low.item(), high.item())


def null_quantiles(simulated: Tensor, shares: Sequence[float]) -> Tensor:
    """Quantiles of R simulated values, (R, ...) → (len(shares), ...).

    By Weibull's definition a new value is below the k-th smallest of R with probability k/(R + 1).
    """
    return torch.from_numpy(np.quantile(simulated.numpy(), shares, axis=0, method="weibull"))


def check_simulation(num_simulations: int, level: float, name: str = "num_simulations") -> None:
    """Raises a ValueError if the level, or the number of simulations for it, gives no interval."""
    check_positive_int(num_simulations, name)
    check_fraction(level, "level")
    needed = math.ceil(2 / (1 - level) - 1 - 1e-9)
    if num_simulations < needed:
        raise ValueError(f"`{name}` must be at least {needed} for level {level}, got {num_simulations}.")
