"""Figures of predicted real values: intervals, PIT, quantiles. Each draws on `ax` (or a new one) and returns it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bayes_kf.evaluation.inputs import Array
from bayes_kf.evaluation.plots.reliability import BLUE, SKY, VERMILLION, _axes
from bayes_kf.evaluation.regression.pit import NUM_BINS, as_pit, pit_counts
from bayes_kf.evaluation.regression.quantile_calibration import QuantileCoverage
from bayes_kf.evaluation.regression.scores import Coverage, coverage_null

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def coverage_plot(coverage: Coverage, num_targets: int, *, ax: Axes | None = None) -> Axes:
    """Share of targets inside their intervals against the level they should have, with the 95 % band of chance.

    Args:
        coverage: Levels and shares, as `interval_coverage` gives them.
        num_targets: Number of targets behind each share.
        ax: Where to draw.

    Raises:
        ValueError: If the number is not positive.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> _ = coverage_plot(Coverage(torch.tensor([0.5]), torch.tensor([0.4])), num_targets=100, ax=ax)
        >>> ax.get_xlabel()
        'level of the interval'
    """
    low, high = (bound.numpy() for bound in coverage_null(coverage.levels, num_targets))
    levels, shares = coverage.levels.numpy(), coverage.coverage.numpy()
    ax = _axes(ax)
    ax.vlines(levels, low, high, color=VERMILLION, linewidth=7, alpha=0.5, label="right intervals: 95 % of chance")
    ax.plot(levels, shares, "o", color=BLUE, markeredgecolor="black", label="observed")
    ax.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="coverage = level")
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="level of the interval", ylabel="share of targets inside")
    ax.legend(loc="upper left", fontsize=8)
    return ax


def pit_histogram(pit: Array, *, num_bins: int = NUM_BINS, ax: Axes | None = None) -> Axes:
    """Histogram of PIT values as densities, where right forecasts have one everywhere, with the 95 % band of chance.

    The band holds bin by bin: of twenty bins of right forecasts one lies outside on average.

    Args:
        pit: PIT values between 0 and 1, any shape: of `pit_gaussian` or `pit_samples`.
        num_bins: Number of bins.
        ax: Where to draw.

    Raises:
        ValueError: If a value lies outside 0 to 1 or the number is not positive.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> _ = pit_histogram(torch.tensor([0.1, 0.2, 0.3, 0.9]), num_bins=2, ax=ax)
        >>> [float(bar.get_height()) for bar in ax.containers[0]]
        [1.5, 0.5]
    """
    counts, num_values = pit_counts(pit, num_bins), as_pit(pit).numel()
    low, high = pit_band(num_values, num_bins)
    edges = np.linspace(0, 1, num_bins + 1)
    ax = _axes(ax)
    density = counts.numpy() * num_bins / num_values
    ax.bar(edges[:-1], density, 1 / num_bins, align="edge", color=SKY, edgecolor="black", label="observed")
    style = {"facecolor": "none", "edgecolor": VERMILLION, "hatch": "////", "linewidth": 0.8}
    label = "right forecasts: 95 % of chance"
    ax.fill_between([0, 1], num_bins * low, num_bins * high, label=label, **style)  # type: ignore[arg-type]
    ax.axhline(1, color="black", linestyle="--", linewidth=1)
    top = 1.35 * max(density.max(), num_bins * high)  # room for the legend
    ax.set(
        xlim=(0, 1), ylim=(0, top), xlabel="PIT: share of the forecast below the target", ylabel="density of targets"
    )
    ax.legend(loc="upper center", fontsize=8, ncols=2)
    return ax


def quantile_coverage_plot(coverage: QuantileCoverage, num_targets: int, *, ax: Axes | None = None) -> Axes:
    """Share of targets below each predicted quantile against the quantile's level, with the 95 % band of chance.

    Args:
        coverage: Levels and shares, as `quantile_coverage` gives them.
        num_targets: Number of targets behind each share.
        ax: Where to draw.

    Raises:
        ValueError: If the number is not positive.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> found = QuantileCoverage(torch.tensor([0.25, 0.75]), torch.tensor([0.3, 0.6]))
        >>> _ = quantile_coverage_plot(found, num_targets=100, ax=ax)
        >>> ax.get_xlabel()
        'level of the quantile'
    """
    low, high = (bound.numpy() for bound in coverage_null(coverage.quantiles, num_targets))
    levels, shares = coverage.quantiles.numpy(), coverage.coverage.numpy()
    ax = _axes(ax)
    ax.fill_between(
        levels, low, high, color=VERMILLION, alpha=0.3, linewidth=0, label="right forecasts: 95 % of chance"
    )
    ax.plot(levels, shares, "o-", color=BLUE, markeredgecolor="black", markersize=4, linewidth=1, label="observed")
    ax.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="share = level")
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="level of the quantile", ylabel="share of targets below")
    ax.legend(loc="upper left", fontsize=8)
    return ax


def pit_band(num_values: int, num_bins: int) -> tuple[float, float]:
    """Lowest and highest share of the values that a bin of right forecasts would hold, 95 % of chance."""
    low, high = coverage_null(np.array([1 / num_bins]), num_values)
    return low.item(), high.item()
