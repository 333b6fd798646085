"""The figure of the few-shot bench: accuracy and calibration error against shots, on test images and shifted ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from bayes_kf.evaluation.plots.style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION
from benchmarks.few_shot.learn import Row
from benchmarks.few_shot.table import SCORES, Cells, Line, lines, values

mpl.use("Agg")
import matplotlib.pyplot as plt

STYLES: dict[tuple[str, str], dict[str, Any]] = {
    ("zero-shot", ""): {"color": GREY, "linestyle": ":", "marker": "x"},
    ("clip-lora", ""): {"color": "black", "linestyle": "-", "marker": "s"},
    ("clip-lora", "post hoc"): {"color": "black", "linestyle": "--", "marker": "D"},
    ("so", ""): {"color": PURPLE, "linestyle": "-.", "marker": "^"},
    ("tip-adapter", ""): {"color": ORANGE, "linestyle": ":", "marker": "P"},
    ("features", ""): {"color": GREEN, "linestyle": "-.", "marker": "v"},
    ("kalman-features", ""): {"color": BLUE, "linestyle": "-", "marker": "o", "linewidth": 2.4},
    ("kalman-lora", ""): {"color": VERMILLION, "linestyle": "--", "marker": "o", "linewidth": 2.0},
    ("kalman-wide", ""): {"color": VERMILLION, "linestyle": "-", "marker": "D", "linewidth": 2.4},
    ("narrow-robust-pairs-lora", ""): {"color": SKY, "linestyle": (0, (1, 1)), "marker": "*"},
}
PANELS = (("accuracy ID", "OOD"), ("ECE ID", "ECE OOD"))
LABELS = {
    "accuracy ID": "accuracy, test images",
    "OOD": "accuracy, shifted images",
    "ECE ID": "calibration error, test images",
    "ECE OOD": "calibration error, shifted images",
}


def draw_figure(cells: Cells, rows: Mapping[str, Row], path: Path) -> None:
    """Draw means over tasks and seeds; bars are standard deviations over seeds."""
    shown = [line for line in lines(cells, rows) if (line.row, line.variant) in STYLES]
    shots = sorted({int(key.split("/")[2]) for key in cells})
    if not shown:
        return
    figure, axes = plt.subplots(2, 2, figsize=(9.5, 8.2), layout="constrained", sharex=True)
    for names, panels in zip(PANELS, axes, strict=True):
        for name, ax in zip(names, panels, strict=True):
            for line in shown:
                _draw(ax, cells, line, name, shots)
            ax.set_ylabel(LABELS[name])
            ax.set_xscale("log", base=2)
            ax.set_xticks(shots, [str(number) for number in shots])
            ax.grid(alpha=0.25)
    for ax in axes[1]:
        ax.set_xlabel("labelled images of each class")
        ax.set_ylim(bottom=0)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9, handlelength=4.0)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw(ax: Any, cells: Cells, line: Line, name: str, shots: list[int]) -> None:
    """One line of a panel."""
    by_shots = [list(values(cells, line, SCORES[name], None, number).values()) for number in shots]
    places = [
        (k, np.mean(each), np.std(each, ddof=1) if len(each) > 1 else 0.0)
        for k, each in zip(shots, by_shots, strict=True)
        if each
    ]
    if places:
        x, mean, sd = zip(*places, strict=True)
        ax.errorbar(
            x,
            mean,
            yerr=sd,
            label=line.title.replace("*", ""),
            markersize=5,
            capsize=2,
            **STYLES[line.row, line.variant],
        )
