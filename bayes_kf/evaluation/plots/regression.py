"""Figures of regressions: predictions, coverage, PIT values. Each draws on `ax` (or new axes) and returns it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bayes_kf.evaluation.inputs import Array, as_float
from bayes_kf.evaluation.plots.style import BLUE, GREY, SKY, VERMILLION, axes_or_new
from bayes_kf.evaluation.regression.pit import NUM_BINS, as_pit, pit_band, pit_counts
from bayes_kf.evaluation.regression.quantile_calibration import QuantileCoverage
from bayes_kf.evaluation.regression.scores import Coverage, coverage_null

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 400


def prediction_plot(
    mean: Array, targets: Array, low: Array, high: Array, *, level: float = 0.8, ax: Axes | None = None
) -> Axes:
    """Targets against predictions with intervals, at most `MAX_POINTS` of them, evenly over the predictions.

    Args:
        mean: Predictions, any shape.
        targets: Observed values, of that shape.
        low: Lower ends of the intervals, of that shape.
        high: Upper ends.
        level: Of the intervals, for the legend.
        ax: Where to draw.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> ax, zero = Figure().subplots(), torch.zeros(3)
        >>> _ = prediction_plot(zero, torch.tensor([0.0, 0.5, 2.0]), zero - 1, zero + 1, ax=ax)
        >>> ax.get_legend_handles_labels()[1]
        ['target = prediction', '80 % interval', 'inside (2 of 3)', 'outside (1 of 3)']
    """
    columns = [as_float(values, name).flatten() for values, name in ((mean, "mean"), (targets, "targets"))]
    columns += [as_float(values, name).flatten() for values, name in ((low, "low"), (high, "high"))]
    if len({len(column) for column in columns}) > 1:
        raise ValueError(
            f"`targets`, `low` and `high` must be of the shape of `mean`, {len(columns[0])} numbers, got others."
        )
    inside = (columns[2] <= columns[1]) & (columns[1] <= columns[3])
    number, total = int(inside.sum()), len(inside)
    places = columns[0].argsort(stable=True)
    places = places[np.unique(np.linspace(0, total - 1, min(total, MAX_POINTS)).round().astype(int))]
    given, actual, least, most = (column[places].numpy() for column in columns)
    is_inside = inside[places].numpy()
    ax = axes_or_new(ax)
    ends = [min(given.min(), actual.min()), max(given.max(), actual.max())]
    ax.plot(ends, ends, color=GREY, linestyle="--", linewidth=1, label="target = prediction")
    ax.vlines(given, least, most, color=SKY, linewidth=1, alpha=0.6, label=f"{100 * level:.0f} % interval")
    for chosen, colour, marker, count, word in (
        (is_inside, BLUE, "o", number, "inside"),
        (~is_inside, VERMILLION, "D", total - number, "outside"),
    ):
        style: dict[str, Any] = {"color": colour, "marker": marker, "edgecolors": "none", "alpha": 0.8}
        ax.scatter(given[chosen], actual[chosen], 14, label=f"{word} ({count:,} of {total:,})", zorder=3, **style)
    ax.set(xlabel="prediction", ylabel="target")
    ax.legend(loc="upper left", fontsize=8)
    return ax


def coverage_plot(coverage: Coverage, num_targets: int, *, ax: Axes | None = None) -> Axes:
    """Coverage of intervals against their level, with the 95 % null band (correct intervals).

    Args:
        coverage: Levels and coverages, as `interval_coverage` returns them.
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
    ax = axes_or_new(ax)
    ax.vlines(levels, low, high, color=VERMILLION, linewidth=7, alpha=0.5, label="95 % null band")
    ax.plot(levels, shares, "o", color=BLUE, markeredgecolor="black", label="observed")
    ax.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="coverage = level")
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="level of the interval", ylabel="share of targets inside")
    ax.legend(loc="upper left", fontsize=8)
    return ax


def pit_histogram(pit: Array, *, num_bins: int = NUM_BINS, ax: Axes | None = None) -> Axes:
    """Histogram of PIT values with the 95 % null band; the density of calibrated forecasts is 1 everywhere.

    The band holds for each bin alone: on average, one of twenty bins of calibrated forecasts lies outside it.

    Args:
        pit: PIT values between 0 and 1, any shape, from `pit_gaussian` or `pit_samples`.
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
    ax = axes_or_new(ax)
    density = counts.numpy() * num_bins / num_values
    ax.bar(edges[:-1], density, 1 / num_bins, align="edge", color=SKY, edgecolor="black", label="observed")
    style = {"facecolor": "none", "edgecolor": VERMILLION, "hatch": "////", "linewidth": 0.8}
    label = "95 % null band"
    ax.fill_between([0, 1], num_bins * low, num_bins * high, label=label, **style)  # type: ignore[arg-type]
    ax.axhline(1, color="black", linestyle="--", linewidth=1)
    top = 1.35 * max(density.max(), num_bins * high)  # room for the legend
    ax.set(
        xlim=(0, 1), ylim=(0, top), xlabel="PIT: share of the forecast below the target", ylabel="density of targets"
    )
    ax.legend(loc="upper center", fontsize=8, ncols=2)
    return ax


def quantile_coverage_plot(coverage: QuantileCoverage, num_targets: int, *, ax: Axes | None = None) -> Axes:
    """Share of targets below each predicted quantile against its level, with the 95 % null band (calibrated forecasts).

    Args:
        coverage: Levels and coverages, as `quantile_coverage` returns them.
        num_targets: Number of targets behind each share.
        ax: Where to draw.

    Raises:
        ValueError: If the number is not positive.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> coverage = QuantileCoverage(torch.tensor([0.25, 0.75]), torch.tensor([0.3, 0.6]))
        >>> _ = quantile_coverage_plot(coverage, num_targets=100, ax=ax)
        >>> ax.get_xlabel()
        'level of the quantile'
    """
    low, high = (bound.numpy() for bound in coverage_null(coverage.quantiles, num_targets))
    levels, shares = coverage.quantiles.numpy(), coverage.coverage.numpy()
    ax = axes_or_new(ax)
    ax.fill_between(levels, low, high, color=VERMILLION, alpha=0.3, linewidth=0, label="95 % null band")
    ax.plot(levels, shares, "o-", color=BLUE, markeredgecolor="black", markersize=4, linewidth=1, label="observed")
    ax.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="share = level")
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="level of the quantile", ylabel="share of targets below")
    ax.legend(loc="upper left", fontsize=8)
    return ax
