"""Risk-coverage curves and scores under corruption. Each draws on `ax` (or a new one) and returns it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bayes_kf.evaluation.classification.corruption_shift import ShiftScores
from bayes_kf.evaluation.classification.selective import RiskCoverage, aurc, best_risk_coverage, risk_coverage
from bayes_kf.evaluation.inputs import Array
from bayes_kf.evaluation.plots.style import BLUE, COLOURS, GREY, LINES, VERMILLION, axes_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 500  # of a curve; more points look the same

Selection = tuple[Array, Array]


def risk_coverage_plot(
    selections: Mapping[str, Selection] | Selection, *, weights: Array | None = None, ax: Axes | None = None
) -> Axes:
    """Risk-coverage curve: share of errors among the most confident predictions against their share of all.

    A thin grey line under each curve shows the best possible order of the same predictions; the area between both is
    the excess AURC. A curve has at most 500 points, the last prediction included.

    Args:
        selections: One pair of confidence (N,) and correctness (zeros and ones, (N,)), or name to such a pair.
        weights: How much each prediction counts, (N,).
        ax: Where to draw.

    Raises:
        ValueError: If there is no pair or a vector is malformed.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> _ = risk_coverage_plot((torch.tensor([0.9, 0.6]), torch.tensor([0, 1])), ax=ax)
        >>> ax.get_lines()[0].get_ydata().tolist(), ax.get_lines()[1].get_ydata().tolist()
        ([1.0, 0.5], [0.0, 0.5])
    """
    named = selections if isinstance(selections, Mapping) else {"": selections}
    if not named:
        raise ValueError("`selections` must hold at least one, got none.")
    ax = axes_or_new(ax)
    for i, (name, (confidence, correct)) in enumerate(named.items()):
        area = f"AURC {aurc(confidence, correct, weights=weights):.3f}"
        label = f"{name}: {area}".replace("$", r"\$") if name else area
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i % len(LINES)]}
        _curve(ax, risk_coverage(confidence, correct, weights=weights), linewidth=1.6, label=label, **style)
    for i, (_, correct) in enumerate(named.values()):
        label_once = {"label": "best possible order"} if i == 0 else {}
        _curve(ax, best_risk_coverage(correct, weights=weights), color=GREY, linewidth=0.9, **label_once)
    ax.set(xlim=(0, 1), xlabel="coverage: share of most confident predictions", ylabel="share of errors among them")
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return ax


def shift_plot(curve: Sequence[ShiftScores], *, ax: Axes | None = None) -> Axes:
    """Calibration error with its 95 % null band (left axis) and accuracy (right axis) against the severity of a shift.

    Args:
        curve: Scores of each severity, as `shift_curve` returns them.
        ax: Where to draw; the right axis is its twin.

    Raises:
        ValueError: If there is no severity.

    Example:
        >>> import torch
        >>> from bayes_kf.evaluation.classification.corruption_shift import shift_curve
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> curve = shift_curve({0: (torch.tensor([[0.75, 0.25]]), torch.tensor([0]))})
        >>> shift_plot(curve, ax=ax).get_lines()[0].get_ydata().tolist()
        [0.25]
    """
    if not curve:
        raise ValueError("`curve` must hold at least one severity, got none.")
    severity = np.array([row.severity for row in curve])
    low, high = (np.array([getattr(row.ece, end) for row in curve]) for end in ("null_low", "null_high"))
    width = 0.5 * (np.diff(severity).min() if len(curve) > 1 else 1.0)
    band: dict[str, Any] = {"facecolor": "none", "edgecolor": VERMILLION, "hatch": "////", "linewidth": 0.8}
    ax = axes_or_new(ax)
    ax.bar(severity, high - low, width, low, label="95 % null band", **band)
    ece = [row.ece.value for row in curve]
    ax.plot(severity, ece, "o-", color=VERMILLION, markeredgecolor="black", label="ECE")
    ax.set(xlabel="severity of the shift", xticks=severity)
    ax.set_ylabel("ECE (circles, solid)", color=VERMILLION)
    ax.set_ylim(0, 1.08 * max(*ece, *high, 1e-6))
    right = ax.twinx()
    right.plot(severity, [row.accuracy for row in curve], "s--", color=BLUE, markeredgecolor="black", label="accuracy")
    right.set_ylabel("accuracy (squares, dashed)", color=BLUE)
    right.set_ylim(0, 1.02)
    handles = [handle for axes in (ax, right) for handle in axes.get_legend_handles_labels()[0]]
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8)
    ax.grid(alpha=0.3)
    return ax


def _curve(ax: Axes, curve: RiskCoverage, **style: Any) -> None:
    """One curve, thinned to `MAX_POINTS` points."""
    size = len(curve.risk)
    points = np.linspace(0, size - 1, min(size, MAX_POINTS)).round().astype(np.int64)
    ax.plot(curve.coverage[points].numpy(), curve.risk[points].numpy(), **style)
