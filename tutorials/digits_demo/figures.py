"""The figures of the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bayes_kf.evaluation import moving_average
from bayes_kf.evaluation.plots.style import BLUE, GREEN, GREY, VERMILLION
from tutorials.digits_demo.methods import Row

DPI = 130
WINDOW = 150  # images in a moving average
STYLES = ((GREY, ":"), (VERMILLION, "--"), (GREEN, "-."), (BLUE, "-"))  # in the order of the rows


def save_reliability(rows: list[Row], path: Path) -> None:
    """Reliability diagrams side by side, with one common legend."""
    figure = Figure(figsize=(4.7 * len(rows), 5.2), layout="constrained")
    shown: dict[str, Any] = {}  # of some rows no point lies outside its band
    for ax, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        row.report.sections.drawings["reliability"].draw(ax)
        shown |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        legend = ax.get_legend()
        ax.set_xlabel(f"confidence\n\n{row.name}\n{legend.get_title().get_text()}")
        legend.remove()
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=2, fontsize=9)
    figure.savefig(path, dpi=DPI)


def save_online_curves(rows: list[Row], path: Path) -> None:
    """Moving average of the accuracy before each update, one curve per row."""
    figure = Figure(figsize=(7.4, 4.6), layout="constrained")
    ax = figure.subplots()
    for row, (colour, line) in zip(rows, STYLES, strict=True):
        correct = row.history["correct"]
        window = min(WINDOW, max(1, len(correct) // 2))
        mean = moving_average(correct, window).numpy()
        label = f"{row.name}: {row.report.scores['online_accuracy']:.3f}"
        ax.plot(np.arange(window, window + len(mean)), mean, color=colour, linestyle=line, linewidth=1.8, label=label)
    ax.set(xlabel="images seen", ylabel=f"accuracy, mean of the last {window} images")
    ax.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, title="and over the whole stream")
    figure.savefig(path, dpi=DPI)
