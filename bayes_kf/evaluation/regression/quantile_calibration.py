"""Calibration of predicted quantiles: the share of targets below each, with its null band."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayes_kf.evaluation.inputs import Array, as_vector
from bayes_kf.evaluation.regression.pit import as_pit
from bayes_kf.evaluation.resampling.null_test import NullComparison, check_simulation, compare_to_null

QUANTILES = tuple(k / 20 for k in range(1, 20))


class QuantileCoverage(NamedTuple):
    """Share of targets at or below each predicted quantile; both fields are (Q,)."""

    quantiles: Tensor
    coverage: Tensor


def quantile_coverage(pit: Array, quantiles: Sequence[float] = QUANTILES) -> QuantileCoverage:
    """Share of targets at or below each predicted quantile.

    Its null band is `coverage_null(quantiles, num_targets)`.

    Args:
        pit: PIT values between 0 and 1, any shape, from `pit_gaussian` or `pit_samples`.
        quantiles: Levels of the quantiles, strictly between 0 and 1.

    Raises:
        ValueError: If a value lies outside 0 to 1.

    Example:
        >>> quantile_coverage(torch.tensor([0.2, 0.4, 0.9, 0.95]), quantiles=(0.25, 0.5, 0.75)).coverage.tolist()
        [0.25, 0.5, 0.5]
    """
    ordered, grid = as_pit(pit).sort().values, _as_quantiles(quantiles)
    return QuantileCoverage(grid, torch.searchsorted(ordered, grid, right=True).double() / len(ordered))


def quantile_calibration_error(pit: Array, quantiles: Sequence[float] = QUANTILES) -> float:
    """Mean over the quantiles of |share of targets below the quantile − its level|, between 0 and 1.

    The error of calibrated forecasts is positive in a finite sample; `quantile_calibration_test` gives its null band.

    Args:
        pit: PIT values between 0 and 1, any shape, from `pit_gaussian` or `pit_samples`.
        quantiles: Levels of the quantiles, strictly between 0 and 1.

    Raises:
        ValueError: If a value lies outside 0 to 1.

    Reference: Kuleshov, Fenner, Ermon 2018, with absolute instead of squared differences.

    Example:
        >>> round(quantile_calibration_error(torch.tensor([0.2, 0.4, 0.9, 0.95]), (0.25, 0.5, 0.75)), 4)
        0.0833
    """
    observed = quantile_coverage(pit, quantiles)
    return (observed.coverage - observed.quantiles).abs().mean().item()


def quantile_calibration_test(
    pit: Array,
    quantiles: Sequence[float] = QUANTILES,
    *,
    num_simulations: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> NullComparison:
    """The mean absolute quantile error with its null band (calibrated forecasts) and a one-sided p-value.

    Under calibrated forecasts, the counts of targets between the quantiles are multinomial; the simulation draws them.

    Args:
        pit: PIT values between 0 and 1, any shape, from `pit_gaussian` or `pit_samples`.
        quantiles: Levels of the quantiles, strictly between 0 and 1.
        num_simulations: Number of simulated data sets, at least 2/(1 − level) − 1.
        level: Probability inside the null band.
        seed: Seed of the simulation.

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> test = quantile_calibration_test(torch.linspace(0.3, 0.7, 100))
        >>> test.value > test.null_high, test.p_value < 0.01
        (True, True)
    """
    check_simulation(num_simulations, level)
    value = torch.tensor(quantile_calibration_error(pit, quantiles), dtype=torch.float64)
    grid = _as_quantiles(quantiles).sort().values
    shares = torch.diff(grid, prepend=grid.new_zeros(1), append=grid.new_ones(1)).numpy()
    num_targets = as_pit(pit).numel()
    counts = np.random.default_rng(seed).multinomial(num_targets, shares, num_simulations)[:, :-1]
    simulated = torch.from_numpy(counts).double().cumsum(dim=1) / num_targets  # (R, Q)
    return compare_to_null(value, (simulated - grid).abs().mean(dim=1), level)


def _as_quantiles(quantiles: Sequence[float]) -> Tensor:
    """Levels as a float64 vector; raises a ValueError for levels outside 0..1."""
    levels = as_vector(torch.as_tensor(quantiles, dtype=torch.float64), "quantiles")
    if levels.min() <= 0 or levels.max() >= 1:
        got = f"{levels.min():.3g}..{levels.max():.3g}"
        raise ValueError(f"`quantiles` must lie strictly between 0 and 1, got values in {got}.")
    return levels
