"""Learning curves of both benches: means over seeds; every row has its colour, line and marker."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from bayes_kf.evaluation.plots.style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION
from benchmarks.bench import epochs, online
from benchmarks.bench.registry.optimizers import Row
from benchmarks.bench.registry.problems import Problem
from benchmarks.bench.selection import Cells
from benchmarks.bench.tables.entries import Entry, by_criterion, entries

mpl.use("Agg")
import matplotlib.pyplot as plt

STYLES: dict[str, dict[str, Any]] = {
    "frozen": {"color": "0.7", "linestyle": "-", "linewidth": 1.0, "marker": "."},
    "default": {"color": BLUE, "linestyle": "-", "linewidth": 2.4, "marker": "o"},
    "loko_lora": {"color": VERMILLION, "linestyle": "--", "linewidth": 1.8, "marker": "s"},
    "loko_conv": {"color": VERMILLION, "linestyle": "--", "linewidth": 1.8, "marker": "s"},
    "loko_dora": {"color": VERMILLION, "linestyle": ":", "linewidth": 1.8, "marker": "s"},
    "adamw": {"color": "black", "linestyle": "-", "linewidth": 1.3, "marker": "x"},
    "adagrad": {"color": "black", "linestyle": "-.", "linewidth": 1.3, "marker": "+"},
    "sgd": {"color": GREY, "linestyle": ":", "linewidth": 1.3, "marker": "v"},
    "r_kalman": {"color": BLUE, "linestyle": "--", "linewidth": 1.5, "marker": "D"},
    "kfac": {"color": GREEN, "linestyle": "-", "linewidth": 1.3, "marker": "^"},
    "ring": {"color": GREEN, "linestyle": "--", "linewidth": 1.3, "marker": "<"},
    "reng": {"color": GREEN, "linestyle": ":", "linewidth": 1.6, "marker": ">"},
    "sophia": {"color": ORANGE, "linestyle": "-", "linewidth": 1.3, "marker": "P"},
    "sparse": {"color": PURPLE, "linestyle": "-.", "linewidth": 1.3, "marker": "*"},
}
COLUMNS = 4  # of problems side by side
OTHERS: dict[str, Any] = {"color": SKY, "linestyle": "-", "linewidth": 1.0, "marker": "."}


def draw_online(cells: Cells, rows: Sequence[Row], problems: Sequence[Problem], path: Path) -> None:
    """Draw average online accuracy (top) and moving average of the loss (bottom), a column for each problem."""
    by_problem = _found(cells, rows, problems, online.CRITERIA, "online")
    shown = [problem for problem in problems if by_problem[problem.name]]
    if not shown:
        return
    columns = min(COLUMNS, len(shown))
    bands = math.ceil(len(shown) / columns)
    size = (3.4 * columns + 0.4, 5.2 * bands + 0.8)
    figure, axes = plt.subplots(2 * bands, columns, figsize=size, layout="constrained", squeeze=False)
    for place in range(columns * bands):
        band, column = divmod(place, columns)
        pair = axes[2 * band : 2 * band + 2, column]
        if place < len(shown):
            _pair(pair, shown[place], by_problem[shown[place].name], column == 0)
        else:
            pair[0].set_visible(False)
            pair[1].set_visible(False)
    _finish(figure, axes, path)


def draw_epochs(cells: Cells, rows: Sequence[Row], problems: Sequence[Problem], path: Path) -> None:
    """Draw training loss, test loss and gradient norm by epoch, a column for each problem."""
    by_problem = _found(cells, rows, problems, epochs.CRITERIA, "train")
    shown = [problem for problem in problems if by_problem[problem.name]]
    if not shown:
        return
    names = {"train_loss": "training loss (nats)", "test_loss": "test loss (nats)", "gradient_norm": "gradient norm"}
    figure, axes = plt.subplots(3, len(shown), figsize=(4.6 * len(shown), 9.0), layout="constrained", squeeze=False)
    for column, problem in enumerate(shown):
        for entry in by_problem[problem.name]:
            for ax, name in zip(axes[:, column], names, strict=True):
                curves = [cell[name] for cell in entry.cells.values() if "cause" not in cell]
                if curves:
                    mean = np.mean(np.array(curves), axis=0)
                    ax.plot(range(len(mean)), mean, label=_plain(entry.row.title), markersize=5, **style_of(entry.row))
        for ax in axes[:, column]:
            ax.set_yscale("log")
        axes[0, column].set_title(problem.title, fontsize=9)
        axes[2, column].set_xlabel("epochs")
    for ax, label in zip(axes[:, 0], names.values(), strict=True):
        ax.set_ylabel(label)
    _finish(figure, axes, path)


def _pair(pair: np.ndarray, problem: Problem, shown: Sequence[Entry], first: bool) -> None:
    """Draw accuracy (top) and loss (bottom) of a problem."""
    for entry in shown:
        style = {key: value for key, value in style_of(entry.row).items() if key != "marker"}
        for ax, name in zip(pair, ("accuracy", "loss"), strict=True):
            ax.plot(*_mean_curve(entry, name), label=_plain(entry.row.title), **style)
    pair[0].set_title(problem.title.replace(", new head", "").replace(", all parameters", ""), fontsize=9)
    pair[1].set_xlabel("examples seen")
    _robust_top(pair[1])
    if first:
        pair[0].set_ylabel("average online accuracy")
        pair[1].set_ylabel("loss, moving average (nats)")


def style_of(row: Row) -> dict[str, Any]:
    """A row's colour, line and marker; rows of other folders share one style."""
    return STYLES.get(row.name, OTHERS)


def _found(
    cells: Cells, rows: Sequence[Row], problems: Sequence[Problem], criteria: Mapping[str, str], criterion: str
) -> dict[str, list[Entry]]:
    by_problem: dict[str, list[Entry]] = {}
    for problem in problems:
        chosen = [by_criterion(entries(cells, problem, row, criteria), criterion) for row in rows]
        by_problem[problem.name] = [entry for entry in chosen if entry is not None]
    return by_problem


def _mean_curve(entry: Entry, name: str) -> tuple[list[int], np.ndarray]:
    """Mean over the seeds, up to the first divergence."""
    curves = [cell["curve"] for cell in entry.cells.values()]
    common = min(len(curve["steps"]) for curve in curves)
    return curves[0]["steps"][:common], np.mean([curve[name][:common] for curve in curves], axis=0)


def _robust_top(ax: Any) -> None:
    """Limit the axis so that one diverging row does not stretch it."""
    ends = sorted(float(np.max(line.get_ydata())) for line in ax.get_lines() if len(line.get_ydata()))
    if ends:
        ax.set_ylim(0, 1.1 * ends[(len(ends) - 1) * 3 // 4])


def _finish(figure: Any, axes: np.ndarray, path: Path) -> None:
    labels: dict[str, Any] = {}
    for ax in axes.flat:
        ax.grid(alpha=0.25)
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    columns = max(1, int(figure.get_figwidth() / 1.9))
    placed: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "fontsize": 9, "handlelength": 3.5}
    figure.legend(labels.values(), labels.keys(), **placed)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plain(title: str) -> str:
    return title.replace("*", "").replace("`", "").replace(", not tuned", "")
