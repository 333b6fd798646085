"""Reliability diagram and cumulative curves of entropies. Each draws on `ax` (or a new one) and returns it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from bayes_kf.evaluation.calibration.null_distribution import BinsWithBands, bins_with_bands, calibration_test
from bayes_kf.evaluation.inputs import Array, as_vector, as_weights
from bayes_kf.evaluation.plots.style import BLUE, COLOURS, GREY, LINES, SKY, VERMILLION, add_tips, axes_or_new
from bayes_kf.evaluation.resampling.binning import Binning
from bayes_kf.evaluation.score import ROUNDING, Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

MIN_BAR_WIDTH = 0.008  # an equal-mass bin of equal values has no width of its own
BAND_WIDTH = 0.035
POINT_AREA = 45.0  # square points
POINTS = {"inside": (BLUE, "o"), "outside": (VERMILLION, "D")}  # where a point lies -> colour and marker
FEW = 10  # examples; the band of a bin with fewer is paler
MAX_STEPS = 200  # of a cumulative curve


def reliability_diagram(
    probs: Array,
    targets: Array,
    *,
    num_bins: int = 15,
    binning: Binning = "equal_width",
    num_simulations: int = 1000,
    seed: int = 0,
    caption: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Accuracy against confidence in bins: points on their 95 % null bands, with the counts and the ECE.

    A point lies at the mean confidence of its bin. One of twenty bins of a calibrated model lies outside its band.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).
        num_bins: Number of bins.
        binning: "equal_width" or "equal_mass".
        num_simulations: Number of simulated data sets for the null bands, at least 39.
        seed: Seed of the simulation.
        caption: Title of the legend; by default the ECE with its null band.
        ax: Where to draw.

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> _ = reliability_diagram(torch.tensor([[0.8, 0.2], [0.3, 0.7]]), torch.tensor([0, 0]), num_bins=5, ax=ax)
        >>> [points.get_offsets()[:, 1].tolist() for points in ax.collections]
        [[0.0, 1.0]]
    """
    settings: dict[str, Any] = {"num_bins": num_bins, "binning": binning}
    settings |= {"num_simulations": num_simulations, "seed": seed}
    bins = bins_with_bands(probs, targets, **settings)
    if caption is None:
        caption = ece_text(calibration_test(probs, targets, **settings).score())
    return draw_reliability(bins, caption, axes_or_new(ax))


def draw_reliability(bins: BinsWithBands, caption: str, ax: Axes) -> Axes:
    """The reliability diagram of some bins; the caption is the title of its legend."""
    ax.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="confidence = accuracy")
    draw_bins(bins, ax)
    for where, (colour, marker) in POINTS.items():
        style: dict[str, Any] = {"markeredgecolor": "black", "markeredgewidth": 0.6}
        ax.plot([], [], marker, color=colour, label=f"accuracy, {where} its band", **style)
    ax.bar(0, 0, color=SKY, alpha=0.5, label="where 95 % of calibrated models fall")
    corner: dict[str, Any] = {"transform": ax.transAxes, "fontsize": 8, "color": GREY, "style": "italic"}
    ax.text(0.985, 0.02, "below the line: too sure", ha="right", va="bottom", **corner)
    ax.text(0.015, 0.98, "above: not sure enough", ha="left", va="top", **corner)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    ax.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.14),  # below, where it hides nothing
        ncols=2,
        fontsize=8,
        title=caption,
        title_fontsize=9,
        markerscale=0.7,
    )
    _count_strip(ax, bins.counts.numpy(), *_bar_places(*bins.edges.numpy().T))
    return ax


def draw_bins(bins: BinsWithBands, ax: Axes) -> Axes:
    """The accuracies of some bins on their null bands, by which the points have their colour and shape."""
    counts, confidence, accuracy, least, most = (column.numpy() for column in bins[1:])
    bars = ax.bar(confidence, most - least, BAND_WIDTH, least, color=SKY)
    for bar, count in zip(bars, counts, strict=True):
        bar.set_alpha(0.5 if count >= FEW else 0.2)
    tips = [
        f"confidence {said:.3f}, accuracy {right:.3f} (null band {start:.3f} to {end:.3f}), {count:,} examples"
        for said, right, start, end, count in zip(confidence, accuracy, least, most, counts, strict=True)
    ]
    outside = is_outside(bins).numpy()
    for chosen, (colour, marker) in zip((~outside, outside), POINTS.values(), strict=True):
        if chosen.any():
            style: dict[str, Any] = {"color": colour, "marker": marker, "edgecolors": "black", "linewidths": 0.6}
            points = ax.scatter(confidence[chosen], accuracy[chosen], POINT_AREA, zorder=3, clip_on=False, **style)
            add_tips(points, [text for text, is_chosen in zip(tips, chosen, strict=True) if is_chosen])
    return ax


def is_outside(bins: BinsWithBands) -> Tensor:
    """Whether the accuracy of each bin lies outside its null band."""
    return (bins.accuracy < bins.low - ROUNDING) | (bins.accuracy > bins.high + ROUNDING)


def ece_text(ece: Score) -> str:
    """The ECE and its null band, as written in the reliability diagram."""
    low, high = ece.null_band or (math.nan, math.nan)
    return f"ECE {ece.value:.3f}, null band {low:.3f}–{high:.3f}"


def entropy_curves(
    entropy_id: Array,
    entropy_ood: Mapping[str, Array] | None = None,
    *,
    weights_id: Array | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Shares of inputs with at most each predictive entropy, in distribution and of each out-of-distribution set.

    The further a curve lies to the right of another, the less certain is the model of its inputs.

    Args:
        entropy_id: Entropy of each in-distribution input in nats, (N,).
        entropy_ood: Name to entropy of each out-of-distribution input, (M,).
        weights_id: How much each in-distribution input counts, (N,).
        ax: Where to draw.

    Raises:
        ValueError: If an entropy is not a finite, non-empty vector.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> _ = entropy_curves(torch.rand(50), {"noise": 1 + torch.rand(50)}, ax=ax)
        >>> ax.get_legend_handles_labels()[1]
        ['in distribution (50)', '“noise” (50)']
    """
    groups = {"in distribution": as_vector(entropy_id, "entropy_id").numpy()}
    groups |= {
        f"“{name}”".replace("$", r"\$"): as_vector(values, "entropy_ood").numpy()
        for name, values in (entropy_ood or {}).items()
    }
    ax = axes_or_new(ax)
    largest = max(values.max() for values in groups.values())
    for i, (name, values) in enumerate(groups.items()):
        own = weights_id if i == 0 else None
        places, shares = _steps(values, None if own is None else as_weights(own, len(values)).numpy())
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i % len(LINES)]}
        ax.step([0.0, *places, largest], [0.0, *shares, 1.0], where="post", label=f"{name} ({len(values):,})", **style)
    ax.set(xlim=(0, largest or 1.0), ylim=(0, 1), xlabel="predictive entropy (nats)", ylabel="share of inputs up to it")
    ax.grid(alpha=0.25)
    ax.legend(fontsize=8)
    return ax


def _steps(values: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Places and heights of a cumulative curve, at most `MAX_STEPS` of them."""
    order = np.argsort(values, kind="stable")
    at = np.unique(np.linspace(0, len(order) - 1, MAX_STEPS).round().astype(int))
    if weights is None:
        return values[order][at], (at + 1) / len(order)
    shares = weights[order].cumsum()
    return values[order][at], shares[at] / shares[-1]


def _bar_places(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Left edge and width of each bar: wide enough to be visible, and inside the axes."""
    width = (high - low).clip(min=MIN_BAR_WIDTH)
    return np.minimum(low, 1 - width), width


def _count_strip(ax: Axes, counts: np.ndarray, left: np.ndarray, width: np.ndarray) -> None:
    """A small histogram of the counts above the diagram; bars that are wide enough show their count."""
    from matplotlib.ticker import MaxNLocator

    strip = ax.inset_axes((0, 1.03, 1, 0.16), sharex=ax)
    strip.bar(left, counts, width, align="edge", color=GREY, edgecolor="black", linewidth=0.5)
    for start, breadth, count in zip(left, width, counts, strict=True):
        if breadth > 0.045:
            strip.text(start + breadth / 2, count, f"{count:,}", ha="center", va="bottom", fontsize=6)
    strip.set_ylim(0, 1.35 * counts.max())
    strip.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    strip.tick_params(labelbottom=False, labelsize=7)
    strip.set_ylabel("count", fontsize=8)
    strip.spines[["top", "right"]].set_visible(False)
