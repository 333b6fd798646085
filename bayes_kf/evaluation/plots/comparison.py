"""Figures that compare models. Each draws on `ax` (or a new one) and returns it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bayes_kf.evaluation.inputs import Array
from bayes_kf.evaluation.online.prequential import moving_average, running_accuracy
from bayes_kf.evaluation.plots.style import COLOURS, GREY, LINES, VERMILLION, add_tips, axes_or_new
from bayes_kf.evaluation.score_comparison import Difference, ScoreComparison, is_higher_better
from bayes_kf.validation import check_one_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERIES = {"correct": "running accuracy", "log_loss": "log loss, mean of {window} (nats)"}


def forest_plot(differences: Sequence[Difference], *, label: str = "difference", ax: Axes | None = None) -> Axes:
    """Forest plot: differences with their intervals, one row for each pair; a filled point differs clearly from zero.

    Args:
        differences: Differences as `compare_predictions` returns them; one that is not finite is written as text.
        label: Label of the horizontal axis.
        ax: Where to draw.

    Raises:
        ValueError: If there are no differences.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> _ = forest_plot([Difference("a", "b", 0.1, -0.1, 0.3)], ax=ax)
        >>> [text.get_text() for text in ax.get_yticklabels()]
        ['a − b']
    """
    if not differences:
        raise ValueError("`differences` must hold at least one, got none.")
    ax = axes_or_new(ax)
    for place, difference in enumerate(differences):
        if not np.isfinite([difference.value, difference.low, difference.high]).all():
            ax.text(0.5, place, f"{difference.value:+}", transform=ax.get_yaxis_transform(), ha="center", va="center")
            continue
        colour = COLOURS[0] if difference.is_clear else "white"
        ax.plot([difference.low, difference.high], [place, place], color="black", linewidth=1.4, zorder=2)
        ax.plot(difference.value, place, "o", color=colour, markeredgecolor="black", markersize=7, zorder=3)
    ax.axvline(0, color=VERMILLION, linestyle="--", linewidth=1)
    names = [f"{d.first} − {d.second}".replace("$", r"\$") for d in differences]
    ax.set_yticks(range(len(differences)), names)
    ax.set_ylim(len(differences) - 0.5, -0.5)
    ax.set_xlabel(label)
    ax.grid(axis="x", alpha=0.3)
    return ax


def comparison_plot(comparison: ScoreComparison, *, ax: Axes | None = None) -> Axes:
    """Models in the order of a score: differences to the best one with their intervals, and where it is better.

    A filled point differs clearly from the best model.

    Args:
        comparison: Of one score, as `compare_predictions` returns it.
        ax: Where to draw.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from bayes_kf.evaluation import compare_predictions
        >>> probs = {"sure": np.array([[0.9, 0.1]] * 80), "even": np.full((80, 2), 0.5)}
        >>> ax = comparison_plot(compare_predictions(probs, np.zeros(80, dtype=int))["nll"], ax=Figure().subplots())
        >>> [text.get_text() for text in ax.get_yticklabels()]
        ['sure: 0.105', 'even: 0.693']
    """
    ax = axes_or_new(ax)
    leader = comparison.leader
    names = [leader, *(rank.name for rank in comparison.ranking if rank.name != leader)]
    ax.plot(0.0, 0, "s", color=COLOURS[2], markeredgecolor="black", markersize=8, zorder=3)
    for place, name in enumerate(names[1:], start=1):
        gap = comparison.behind(name)
        if not np.isfinite([gap.value, gap.low, gap.high]).all():
            ax.text(0.5, place, f"{gap.value:+}", transform=ax.get_yaxis_transform(), ha="center", va="center")
            continue
        ax.plot([gap.low, gap.high], [place, place], color="black", linewidth=1.4, zorder=2)
        face = COLOURS[0] if gap.is_clear else "white"
        (point,) = ax.plot(gap.value, place, "o", color=face, markeredgecolor="black", markersize=7, zorder=3)
        add_tips(point, [f"{name} − {leader}: {gap.value:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})"])
    ax.axvline(0, color=GREY, linestyle="--", linewidth=1)
    labels = [f"{name}: {comparison.values[name]:.3f}".replace("$", r"\$") for name in names]
    ax.set_yticks(range(len(names)), labels)
    ax.set_ylim(len(names) - 0.5, -0.5)
    arrow = "better →" if is_higher_better(comparison.score) else "← better"
    ax.set_xlabel(f"difference to {leader}".replace("$", r"\$") + f"    {arrow}    (filled: clear)")
    ax.grid(axis="x", alpha=0.3)
    return ax


def online_comparison(
    histories: Mapping[str, Mapping[str, Array]], series: str = "correct", *, window: int = 100, ax: Axes | None = None
) -> Axes:
    """Running accuracy, or moving mean of the log loss, of several runs over the same stream.

    Args:
        histories: Name of a run to its series, which must hold `series`.
        series: "correct" (running accuracy acc(k), as in the figures of LoKO) or "log_loss".
        window: Number of examples in the moving mean of the log loss, at most the length of the shortest run.
        ax: Where to draw.

    Raises:
        ValueError: If there is no run, a run lacks the series, or a series is malformed.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> _ = online_comparison({"a": {"correct": torch.tensor([1, 0])}}, ax=ax)
        >>> ax.get_lines()[0].get_ydata().tolist()
        [1.0, 0.5]
    """
    if not histories:
        raise ValueError("`histories` must hold at least one run, got none.")
    check_one_of("series", series, SERIES)
    ax = axes_or_new(ax)
    for i, (name, history) in enumerate(histories.items()):
        if series not in history:
            raise ValueError(f"`histories` must hold {series} for every run, got {sorted(history)} for {name!r}.")
        is_accuracy = series == "correct"
        values = running_accuracy(history[series]) if is_accuracy else moving_average(history[series], window)
        first = 1 if is_accuracy else window
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i % len(LINES)]}
        ax.plot(np.arange(first, first + len(values)), values.numpy(), label=name.replace("$", r"\$"), **style)
    ax.set(xlabel="examples seen", ylabel=SERIES[series].format(window=window))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return ax
