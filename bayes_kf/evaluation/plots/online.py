"""Figures of a stream. Each draws on `ax` (or a new one) and returns it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from bayes_kf.evaluation.inputs import Array
from bayes_kf.evaluation.online.innovations import innovation_health
from bayes_kf.evaluation.online.prequential import moving_average, running_accuracy
from bayes_kf.evaluation.plots.style import BLUE, SKY, VERMILLION, axes_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def online_curves(history: Mapping[str, Array], *, window: int = 100, ax: Axes | None = None) -> Axes:
    """Running accuracy (left axis) and moving mean of the log loss (right axis) over a stream.

    Args:
        history: "log_loss", "correct" (classification only), or both: one value for each example, computed before its
            update.
        window: Number of examples in the moving mean, at most the length of the stream.
        ax: Where to draw; the right axis is its twin.

    Raises:
        ValueError: If both series are missing, or one is malformed.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> _ = online_curves({"correct": torch.ones(5), "log_loss": torch.zeros(5)}, window=2, ax=ax)
        >>> ax.get_lines()[0].get_ydata().tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0]
    """
    if not {"correct", "log_loss"} & set(history):
        raise ValueError(f"`history` must hold correct or log_loss, got {sorted(history)}.")
    ax = axes_or_new(ax)
    if "correct" in history:
        accuracy = running_accuracy(history["correct"])
        alone = "." if len(accuracy) == 1 else None
        ax.plot(np.arange(1, len(accuracy) + 1), accuracy.numpy(), color=BLUE, marker=alone, label="running accuracy")
        ax.set(ylim=(0, 1.02))
        ax.set_ylabel("running accuracy (solid)", color=BLUE)
    if "log_loss" in history:
        right = ax.twinx() if "correct" in history else ax
        loss = moving_average(history["log_loss"], window)
        steps = np.arange(window, window + len(loss))
        alone = "." if len(loss) == 1 else None  # a line of one point is invisible
        label = f"log loss, mean of {window}"
        right.plot(steps, loss.numpy(), color=VERMILLION, linestyle="--", marker=alone, label=label)
        right.set_ylabel(f"log loss, mean of {window} (dashed, nats)", color=VERMILLION)
        if loss.min() >= 0:  # log losses of densities may be negative
            right.set_ylim(bottom=0)
    ax.set_xlabel("examples seen")
    ax.grid(alpha=0.3)
    return ax


def innovation_plot(
    nis: Array, dof: Array | int, *, window: int = 100, level: float = 0.95, ax: Axes | None = None
) -> Axes:
    """Windowed innovation ratio over the stream, with the null band of a consistent filter.

    Args:
        nis: Normalized innovation squared of each update, (T,).
        dof: Degrees of freedom of each update, (T,), or one number for all.
        window: Number of updates in a window, at most T.
        level: Probability that a consistent filter is inside the band, at each step.
        ax: Where to draw.

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> _ = innovation_plot(torch.ones(20), dof=1, window=5, ax=ax)
        >>> ax.get_lines()[0].get_ydata().tolist() == [1.0] * 16
        True
    """
    health = innovation_health(nis, dof, window, level)
    steps = health.step.numpy()
    ax = axes_or_new(ax)
    label = f"{100 * level:g} % null band (consistent filter)"
    if len(steps) == 1:  # a line and a band of one point are invisible
        ax.plot(steps, health.ratio.numpy(), "o", color=BLUE, label=f"mean of {window} updates")
        ax.vlines(steps, health.low.numpy(), health.high.numpy(), color=SKY, linewidth=6, alpha=0.6, label=label)
    else:
        ax.plot(steps, health.ratio.numpy(), color=BLUE, label=f"mean of {window} updates")
        ax.fill_between(steps, health.low.numpy(), health.high.numpy(), color=SKY, alpha=0.35, label=label)
    ax.axhline(1, color="black", linestyle="--", linewidth=1)
    ax.set(xlabel="updates", ylabel="innovation² / degrees of freedom")
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=8)
    return ax
