"""The figures of the bench: accuracy against the share of questions answered, and log loss beside AdamW's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from bayes_kf.evaluation.plots.style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION
from benchmarks.language.measured import BASE, Cell, Panel, paired, panels
from benchmarks.language.rows import ROWS

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

LINES: dict[str, dict[str, Any]] = {  # rows of the curves
    "zero-shot-ts": {"color": GREY, "linestyle": ":"},
    "adamw": {"color": "black", "linestyle": "-"},
    "ensemble": {"color": ORANGE, "linestyle": "--"},
    "laplace": {"color": GREEN, "linestyle": "-."},
    "tfb": {"color": PURPLE, "linestyle": (0, (1, 1))},
    "default": {"color": BLUE, "linestyle": "-", "linewidth": 2.4},
    "post-hoc": {"color": VERMILLION, "linestyle": "--", "linewidth": 2.0},
}
SHORT = {
    "zero-shot": "zero-shot",
    "zero-shot-ts": "zero-shot, scaled",
    "adamw": "AdamW, scaled",
    "dropout": "MC dropout",
    "ensemble": "ensemble of three",
    "laplace": "Laplace-LoRA",
    "ivon": "IVON",
    "blob": "BLoB's recipe",
    "tfb": "TFB's recipe",
    "one-pass": "ours, one pass",
    "default": "ours, default",
    "post-hoc": "ours, post hoc",
}
OURS = {"one-pass": SKY, "default": BLUE, "post-hoc": VERMILLION}


def draw_answered(cells: Mapping[str, Cell], shares: Sequence[float], path: Path) -> None:
    """Draw the accuracy on the most confident answers, means over seeds."""
    figure, shown = _panels(cells)
    for ax, panel in shown:
        for row, style in LINES.items():
            if curves := [cell["answered"] for cell in panel.rows.get(row, {}).values() if "answered" in cell]:
                means = [statistics.mean(at) for at in zip(*curves, strict=True)]
                ax.plot([100 * share for share in shares], means, label=SHORT[row], **style)
        ax.set_xlabel("questions answered (%)")
        ax.set_ylabel("accuracy of the answers")
        ax.grid(alpha=0.25)
    columns = max(ax.get_subplotspec().colspan.stop for ax, _ in shown)
    handles = {label: h for ax, _ in shown for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=2 * columns, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_log_loss(cells: Mapping[str, Cell], path: Path) -> None:
    """Draw differences of log loss to AdamW, with two paired standard errors over questions."""
    figure, shown = _panels(cells)
    for ax, panel in shown:
        rows = [row for row in ROWS if row in panel.rows and row not in (BASE, "zero-shot")]
        for place, row in enumerate(rows):
            if (gap := paired(panel, row, BASE)) is None:
                continue
            color, marker = OURS.get(row, "black"), "D" if row in OURS else "o"
            error = 0.0 if math.isnan(gap.error) else 2 * gap.error
            ax.errorbar(gap.mean, place, xerr=error, color=color, marker=marker, capsize=3)
        ax.axvline(0.0, color=GREY, linewidth=1)
        ax.set_yticks(range(len(rows)), [SHORT[row] for row in rows], fontsize=8)
        ax.invert_yaxis()
        ax.set_xlabel("log loss less AdamW's (nats)")
        ax.grid(axis="x", alpha=0.25)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panels(cells: Mapping[str, Cell]) -> tuple[Figure, list[tuple[Axes, Panel]]]:
    """A figure with an axes for each set and reading."""
    given = panels(cells)
    columns = min(len(given), 2)
    count = math.ceil(len(given) / columns)
    figure, axes = plt.subplots(
        count, columns, figsize=(4.9 * columns, 3.3 * count), layout="constrained", squeeze=False
    )
    for ax, panel in zip(axes.flat, given, strict=False):
        ax.set_title(f"{panel.name.replace('_', ' ')}, by {panel.reading}", fontsize=10)
    for ax in axes.flat[len(given) :]:
        ax.set_axis_off()
    return figure, list(zip(axes.flat, given, strict=False))
