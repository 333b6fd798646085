"""Between which p₀ LoKO learns: the search behind its Table 4, on what can be run here.

LoKO's setting learns a tuning stream of the bench, one example at a time, for p₀ = c (its method 1) and for
p₀ ~ Uniform(0, c) (method 2), over nine decades of c. The paper calls a run diverged whose accuracy misses a threshold
after a number of steps, and gives neither number; here a c is permitted when its accuracy on the last half of a stream
gains at least half of what the best c gains there over the frozen model. Data and weights are read from ../shared or
from $BAYES_KF_DATA and $BAYES_KF_WEIGHTS.

    python benchmarks/p0_bounds.py                            # everything; a stopped run goes on where it was
    python benchmarks/p0_bounds.py --problems usps sst2
    python benchmarks/p0_bounds.py --table                    # print what is there, draw the figure
"""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

import bayes_kf as bkf
from bayes_kf.evaluation.plots.style import BLUE, GREY, VERMILLION
from benchmarks.bench.registry.problems import TUNING_SEED, found_problems
from benchmarks.common.learners import frozen_pass, kalman_pass
from benchmarks.common.result_files import RESULTS, ResultFile, markdown_table

PROBLEMS = ("mnist_lenet", "usps", "cifar10", "cifar10_resnet", "sst2")
BOUNDS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
RULES = {"constant": "method 1, p₀ = c", "uniform": "method 2, p₀ ~ Uniform(0, c)"}
THEIRS = (
    ("MNIST, DenseNet-121", "0.0001 to 0.11", "0.0001 to 0.32"),
    ("CIFAR-10, ViT-B/16", "0.001 to 105", "0.001 to 165"),
    ("CIFAR-100, ViT-B/16", "0.001 to 0.2", "0.001 to 0.59"),
    ("ImageNet-100, ViT-L/16", "0.001 to 1.0", "0.001 to 2.0"),
)
SHARE = 0.5  # of the best gain over the frozen model

Cells = Mapping[str, dict[str, Any]]


def measure(name: str, rule: str, bound: float) -> dict[str, Any]:
    """A pass of LoKO; of the frozen model where the bound is zero."""
    problem = found_problems()[name]
    stream = problem.tuning("online").stream
    model = problem.model(problem.network.adapters[0], TUNING_SEED)
    half = len(stream.labels) // 2
    if not bound:
        found = frozen_pass(model, stream)
    else:
        config = bkf.KalmanConfig.loko(initial_variance=bound, initial_rule=rule)
        with warnings.catch_warnings(action="ignore"):
            found = kalman_pass(model, stream, config)
    right = torch.zeros(len(stream.labels), dtype=torch.float64)  # what a refused update left is not learned: wrong
    right[: len(found.correct)] = found.correct.double()
    kept = {"accuracy": right.mean().item(), "later": right[half:].mean().item(), "steps": len(right)}
    return kept if found.cause is None else kept | {"diverged_at": found.diverged_at, "cause": found.cause}


def key(name: str, rule: str, bound: float) -> str:
    """Of a cell."""
    return f"{name}/{rule}/{bound:g}" if bound else f"{name}/frozen"


def permitted(cells: Cells, name: str, rule: str) -> list[float]:
    """The bounds that were run and are permitted."""
    found = {b: cells[key(name, rule, b)] for b in BOUNDS if key(name, rule, b) in cells}
    frozen = cells[key(name, rule, 0.0)]["later"]
    best = max(
        (cells[key(name, r, b)]["later"] for r in RULES for b in BOUNDS if key(name, r, b) in cells), default=frozen
    )
    least = frozen + SHARE * (best - frozen)
    return [b for b, cell in found.items() if best > frozen and cell["later"] >= least and "cause" not in cell]


def render(cells: Cells) -> list[str]:
    """Body of the Markdown file."""
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
        frozen = cells[key(name, "", 0.0)]
        rows = [[RULES[rule], _cell(frozen), *[_cell(cells.get(key(name, rule, b))) for b in BOUNDS]] for rule in RULES]
        lines += ["", f"## {titles[name]}, {frozen['steps']} examples", ""]
        lines += ["Online accuracy, and in ( ) that on the last half. `div@k`: update k was refused.", ""]
        lines += markdown_table(head, rows)
    return lines


def draw(cells: Cells) -> Figure:
    """Accuracy on the last half against c, a panel a problem."""
    names = [name for name in PROBLEMS if f"{name}/frozen" in cells]
    titles = {name: problem.title for name, problem in found_problems().items()}
    figure = Figure(figsize=(3.2 * len(names), 3.2), layout="constrained")
    for ax, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
        for rule, colour, line in (("constant", BLUE, "-o"), ("uniform", VERMILLION, "--s")):
            found = [b for b in BOUNDS if key(name, rule, b) in cells]
            later = [cells[key(name, rule, b)]["later"] for b in found]
            ax.plot(found, later, line, color=colour, markersize=4, label=RULES[rule])
        ax.axhline(cells[f"{name}/frozen"]["later"], color=GREY, linestyle=":", label="frozen")
        ax.set(xscale="log", xlabel="c", title=titles[name].replace(" / ", "\n"), ylim=(0, 1))
        ax.title.set_fontsize(9)
    figure.axes[0].set_ylabel("accuracy on the last half")
    figure.axes[0].legend(fontsize=7, loc="upper left")
    return figure


def _range(cells: Cells, name: str, rule: str) -> str:
    found = permitted(cells, name, rule)
    return f"{min(found):g} to {max(found):g}" if found else "none"


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    text = f"{cell['accuracy']:.3f} ({cell['later']:.3f})"
    return f"div@{cell['diverged_at']}" if "cause" in cell else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--redo", action="store_true", help="measure again what is already there")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = ResultFile("p0_bounds")
    if not args.table:
        file.begin()
        places = [(name, "", 0.0) for name in args.problems] + list(itertools.product(args.problems, RULES, BOUNDS))
        for name, rule, bound in tqdm(places, unit="pass", disable=not sys.stderr.isatty()):
            if args.redo or key(name, rule, bound) not in file.cells:
                file.put(key(name, rule, bound), measure(name, rule, bound))
                tqdm.write(f"{key(name, rule, bound)}: {_cell(file.cells[key(name, rule, bound)])}", file=sys.stderr)
    print(file.write_markdown("Between which p₀ LoKO learns", render(file.cells)))
    draw(file.cells).savefig(RESULTS / "p0_bounds.png", dpi=120)


if __name__ == "__main__":
    main()
