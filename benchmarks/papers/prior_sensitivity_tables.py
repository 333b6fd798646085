"""The three results files of ``prior_sensitivity.py`` as Markdown, and the figure of the first."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from bayes_kf.evaluation.plots.style import BLUE, GREY, VERMILLION
from benchmarks.bench.registry.problems import found_problems
from benchmarks.common.result_files import markdown_table

Cells = Mapping[str, Mapping[str, Any]]

PROBLEMS = ("mnist_lenet", "usps", "cifar10", "cifar10_resnet", "sst2")
BOUNDS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
RULES = {"constant": "method 1, p₀ = c", "uniform": "method 2, p₀ ~ Uniform(0, c)"}
THEIRS = (
    ("MNIST, DenseNet-121", "0.0001 to 0.11", "0.0001 to 0.32"),
    ("CIFAR-10, ViT-B/16", "0.001 to 105", "0.001 to 165"),
    ("CIFAR-100, ViT-B/16", "0.001 to 0.2", "0.001 to 0.59"),
    ("ImageNet-100, ViT-L/16", "0.001 to 1.0", "0.001 to 2.0"),
)
SHARE_OF_GAIN = 0.5  # of the best gain over the frozen model: a bound with less is not permitted

VARIANCES = tuple(10.0**k for k in range(-2, 6))
WIDTH_TITLES = {
    "lenet": "LeNet-5 on MNIST, from scratch, 1,000 examples",
    "digits": "LoRA on UCI's digits, 1,197 examples",
}

TUNING_DATA = ("usps", "kmnist", "notmnist")
GRID: dict[str, tuple[float, ...]] = {"initial_logit_sd": (0.3, 1.0, 3.0, 10.0), "forgetting": (1.0, 0.999)}
GRID_CELLS = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
TUNED: dict[str, dict[str, Any]] = {  # by the examples of the stream whose log loss counts
    "later half of 500": {"tune": GRID},
    "500": {"tune": GRID, "tune_burn_in": 0.0},
}
POINTS, SHARE = 0.005, 0.02  # of accuracy, and of the log loss, that the choice may lose


# LoKO's bounds


def bound_key(name: str, rule: str, bound: float) -> str:
    """The key of a problem's pass; a bound of 0 is the frozen model."""
    return f"{name}/{rule}/{bound:g}" if bound else f"{name}/frozen"


def permitted(cells: Cells, name: str, rule: str) -> list[float]:
    """The permitted bounds among those that were run."""
    run = {b: cells[bound_key(name, rule, b)] for b in BOUNDS if bound_key(name, rule, b) in cells}
    frozen = cells[bound_key(name, rule, 0.0)]["later"]
    keys = [bound_key(name, r, b) for r in RULES for b in BOUNDS]
    best = max((cells[key]["later"] for key in keys if key in cells), default=frozen)
    least = frozen + SHARE_OF_GAIN * (best - frozen)
    return [b for b, cell in run.items() if best > frozen and cell["later"] >= least and "cause" not in cell]


def render_bounds(cells: Cells) -> list[str]:
    """Body of ``p0_bounds.md``."""
    names = [name for name in PROBLEMS if f"{name}/frozen" in cells]
    titles = {name: problem.title for name, problem in found_problems().items()}
    lines = [
        "Ours: the permitted c, least and most of the grid, by the rule in the script's head; one seed each.",
        "",
        *markdown_table(["ours", *RULES.values()], [[titles[n], *[_range(cells, n, r) for r in RULES]] for n in names]),
        "",
        "Theirs (LoKO's Table 4), on networks and data sets that could not be had here:",
        "",
        *markdown_table(["theirs", *RULES.values()], THEIRS),
        "",
        "![Accuracy on the last half of the stream, by c](p0_bounds.png)",
    ]
    for name in names:
        head = ["c", "frozen", *[f"{b:g}" for b in BOUNDS]]
        frozen = cells[bound_key(name, "", 0.0)]
        rows = [
            [title, show_bound(frozen), *[show_bound(cells.get(bound_key(name, rule, b))) for b in BOUNDS]]
            for rule, title in RULES.items()
        ]
        lines += ["", f"## {titles[name]}, {frozen['steps']} examples", ""]
        lines += ["Online accuracy, and in ( ) that on the last half. `div@k`: update k was refused.", ""]
        lines += markdown_table(head, rows)
    return lines


def draw_bounds(cells: Cells) -> Figure:
    """Accuracy on the last half against c, a panel for each problem."""
    names = [name for name in PROBLEMS if f"{name}/frozen" in cells]
    titles = {name: problem.title for name, problem in found_problems().items()}
    figure = Figure(figsize=(3.2 * len(names), 3.2), layout="constrained")
    for ax, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
        for rule, colour, line in (("constant", BLUE, "-o"), ("uniform", VERMILLION, "--s")):
            run = [b for b in BOUNDS if bound_key(name, rule, b) in cells]
            later = [cells[bound_key(name, rule, b)]["later"] for b in run]
            ax.plot(run, later, line, color=colour, markersize=4, label=RULES[rule])
        ax.axhline(cells[f"{name}/frozen"]["later"], color=GREY, linestyle=":", label="frozen")
        ax.set(xscale="log", xlabel="c", title=titles[name].replace(" / ", "\n"), ylim=(0, 1))
        ax.title.set_fontsize(9)
    figure.axes[0].set_ylabel("accuracy on the last half")
    figure.axes[0].legend(fontsize=7, loc="upper left")
    return figure


def _range(cells: Cells, name: str, rule: str) -> str:
    bounds = permitted(cells, name, rule)
    return f"{min(bounds):g} to {max(bounds):g}" if bounds else "none"


def show_bound(cell: Mapping[str, Any] | None) -> str:
    """Accuracy of a pass, or the step at which it diverged."""
    if cell is None:
        return ""
    text = f"{cell['accuracy']:.3f} ({cell['later']:.3f})"
    return f"div@{cell['diverged_at']}" if "cause" in cell else text


# The width of the prior


def width_key(data: str, variance: float, bounded: bool) -> str:
    """The key of a pass; its seed is 0."""
    return f"{data}/{variance:g}/{'bounded' if bounded else 'given'}/0"


def render_width(cells: Cells) -> list[str]:
    """Body of ``prior_width.md``."""
    lines = ["Average online accuracy, and in ( ) that of the last 200 examples. `div@k`: update k was refused."]
    for data, title in WIDTH_TITLES.items():
        rows = []
        for bounded, name in ((True, "as `KalmanConfig` has it"), (False, "`bound_prior=False`")):
            run = [cells.get(width_key(data, variance, bounded)) for variance in VARIANCES]
            if any(run):
                rows.append([name, *[show_width(cell) for cell in run]])
        if rows:
            lines += ["", f"## {title}", "", *markdown_table(["p₀", *[f"{v:g}" for v in VARIANCES]], rows)]
    return lines


def show_width(cell: Mapping[str, Any] | None) -> str:
    """Accuracy of a pass, or the step at which it diverged."""
    if cell is None:
        return ""
    return f"div@{cell['diverged_at']}" if "cause" in cell else f"{cell['accuracy']:.3f} ({cell['final']:.3f})"


# Choosing by evidence


def render_tuning(cells: Cells) -> list[str]:
    """Body of ``tuning.md``."""
    lines = [
        "Held-out accuracy and log loss. Best: the cell of the grid with the least held-out log loss, found after the "
        f"fact. Within: no more than {100 * POINTS:g} points of accuracy and {100 * SHARE:g} % of log loss behind it.",
    ]
    header = ["data", "seed", "best cell", "accuracy", "NLL", "chosen by", "chosen", "accuracy", "NLL", "within"]
    rows, within = [], []
    for data, seed in itertools.product(TUNING_DATA, range(3)):
        grid = [cells.get(f"{data}/{grid_name(cell)}/{seed}") for cell in GRID_CELLS]
        if not all(grid):
            continue
        best = min((cell for cell in grid if cell), key=lambda cell: cell["nll"])
        for name in TUNED:
            tuned = cells.get(f"{data}/tune {name}/{seed}")
            if tuned is None:
                continue
            near = tuned["accuracy"] >= best["accuracy"] - POINTS and tuned["nll"] <= best["nll"] * (1 + SHARE)
            within.append((name, near))
            scores = [[grid_name(c["chosen"]), f"{c['accuracy']:.3f}", f"{c['nll']:.3f}"] for c in (best, tuned)]
            rows.append([data, str(seed), *scores[0], name, *scores[1], "yes" if near else "no"])
    lines += ["", *markdown_table(header, rows), ""]
    for name in TUNED:
        near_best = [near for other, near in within if other == name]
        lines.append(f"- {name}: within in {sum(near_best)} of {len(near_best)}.")
    return lines


def show_tuning(cell: Mapping[str, Any]) -> str:
    """Accuracy of a pass and the settings that it chose."""
    return f"{cell['accuracy']:.3f} {cell['chosen']}"


def grid_name(options: Mapping[str, Any]) -> str:
    """The name of a cell of the grid."""
    return f"sd {options['initial_logit_sd']:g}, forgetting {options['forgetting']:g}"
