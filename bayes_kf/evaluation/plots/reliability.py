"""Reliability diagram and histogram of entropies. Each draws on `ax` (or a new one) and returns it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bayes_kf.evaluation.calibration.calibration_errors import ReliabilityBins, reliability_bins
from bayes_kf.evaluation.calibration.null_distribution import calibration_test, reliability_band
from bayes_kf.evaluation.inputs import Array, as_vector, check_positive_int
from bayes_kf.evaluation.plots.style import COLOURS, GREY, HATCHES, LINES, SKY, VERMILLION, axes_or_new
from bayes_kf.evaluation.resampling.binning import Binning
from bayes_kf.evaluation.score import Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIN_BAR_WIDTH = 0.008  # an equal-mass bin of equal values has no width of its own


def reliability_diagram(
    probs: Array,
    targets: Array,
    *,
    num_bins: int = 15,
    binning: Binning = "equal_width",
    num_simulations: int = 1000,
    seed: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Accuracy against confidence in bins, with the 95 % null band of each bin, the counts, and the ECE.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).
        num_bins: Number of bins.
        binning: "equal_width" or "equal_mass".
        num_simulations: Number of simulated data sets for the null bands, at least 39.
        seed: Seed of the simulation.
        ax: Where to draw.

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> _ = reliability_diagram(torch.tensor([[0.8, 0.2], [0.3, 0.7]]), torch.tensor([0, 0]), num_bins=5, ax=ax)
        >>> [float(bar.get_height()) for bar in ax.containers[0]]
        [0.0, 1.0]
    """
    bins = reliability_bins(probs, targets, num_bins, binning)
    settings: dict[str, Any] = {"num_bins": num_bins, "binning": binning}
    settings |= {"num_simulations": num_simulations, "seed": seed}
    low, high = reliability_band(probs, **settings)
    ece = calibration_test(probs, targets, **settings)
    ax = axes_or_new(ax)
    used = bins.counts > 0
    left, width = _bar_places(bins.edges[:-1][used], bins.edges[1:][used])
    ax.bar(left, bins.accuracy[used].numpy(), width, align="edge", color=SKY, edgecolor="black", label="accuracy")
    band: dict[str, Any] = {
        "facecolor": "none",
        "edgecolor": VERMILLION,
        "hatch": "////",
        "label": "95 % null band (perfect calibration)",
    }
    ax.bar(left, (high - low)[used].numpy(), width, low[used].numpy(), align="edge", linewidth=0.8, **band)
    ax.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="confidence = accuracy")
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    ax.legend(loc="upper left", fontsize=8, title=ece_text(ece.score()), title_fontsize=9, alignment="left")
    _count_strip(ax, bins, left, width)
    return ax


def ece_text(ece: Score) -> str:
    """The ECE and its null band, as written in the reliability diagram."""
    low, high = ece.null_band or (math.nan, math.nan)
    return f"ECE {ece.value:.3f}, null band {low:.3f}–{high:.3f}"


def entropy_histogram(
    entropy_id: Array, entropy_ood: Mapping[str, Array] | None = None, *, num_bins: int = 30, ax: Axes | None = None
) -> Axes:
    """Densities of predictive entropy of in-distribution inputs and of each out-of-distribution set, on common bins.

    Args:
        entropy_id: Entropy of each in-distribution input in nats, (N,).
        entropy_ood: Name to entropy of each out-of-distribution input, (M,).
        num_bins: Number of bins.
        ax: Where to draw.

    Raises:
        ValueError: If an entropy is not a finite, non-empty vector.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> _ = entropy_histogram(torch.rand(50), {"noise": 1 + torch.rand(50)}, num_bins=4, ax=ax)
        >>> ax.get_legend_handles_labels()[1]
        ['in distribution (50)', '“noise” (50)']
    """
    check_positive_int(num_bins, "num_bins")
    groups = {"in distribution": as_vector(entropy_id, "entropy_id").numpy()}
    groups |= {
        f"“{name}”".replace("$", r"\$"): as_vector(values, "entropy_ood").numpy()
        for name, values in (entropy_ood or {}).items()
    }
    top = max(float(values.max()) for values in groups.values())
    edges = np.linspace(0, max(top, 1e-6), num_bins + 1)
    ax = axes_or_new(ax)
    for i, (name, values) in enumerate(groups.items()):
        colour, line = COLOURS[i % len(COLOURS)], LINES[i % len(LINES)]
        density, _ = np.histogram(values, edges, density=True)
        label, hatch = f"{name} ({len(values):,})", HATCHES[i % len(HATCHES)]
        face = "none" if hatch else (colour, 0.2)  # in SVG a translucent face also makes its hatch translucent
        fill: dict[str, Any] = {"fill": True, "facecolor": face, "edgecolor": colour, "hatch": hatch}
        ax.stairs(density, edges, linestyle=line, linewidth=1.6, label=label, **fill)
    ax.set(xlim=(0, edges[-1]), xlabel="predictive entropy (nats)", ylabel="density")
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=8)
    return ax


def _bar_places(low: torch.Tensor, high: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Left edge and width of each bar: wide enough to be visible, and inside the axes."""
    width = (high - low).clamp(min=MIN_BAR_WIDTH)
    return torch.minimum(low, 1 - width).numpy(), width.numpy()


def _count_strip(ax: Axes, bins: ReliabilityBins, left: np.ndarray, width: np.ndarray) -> None:
    """A small histogram of the counts above the diagram; bars that are wide enough show their count."""
    from matplotlib.ticker import MaxNLocator

    strip = ax.inset_axes((0, 1.03, 1, 0.16), sharex=ax)
    counts = bins.counts[bins.counts > 0].numpy()
    strip.bar(left, counts, width, align="edge", color=GREY, edgecolor="black", linewidth=0.5)
    for start, breadth, count in zip(left, width, counts, strict=True):
        if breadth > 0.045:
            strip.text(start + breadth / 2, count, f"{count:,}", ha="center", va="bottom", fontsize=6)
    strip.set_ylim(0, 1.35 * counts.max())
    strip.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    strip.tick_params(labelbottom=False, labelsize=7)
    strip.set_ylabel("count", fontsize=8)
    strip.spines[["top", "right"]].set_visible(False)
