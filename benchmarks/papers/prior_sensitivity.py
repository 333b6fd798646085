"""How results depend on the width of the prior: three tables, one results file each.

``p0_bounds``: the search behind LoKO's Table 4, on networks that run here. LoKO's setting learns a tuning stream of
the bench, one example at a time, for p₀ = c (its method 1) and for p₀ ~ Uniform(0, c) (method 2), over nine decades of
c. The paper calls a run diverged if its accuracy misses a threshold after a number of steps, and gives neither number.
Here a c is permitted if its accuracy on the last half of a stream gains at least half of the best c's gain over the
frozen model.

``prior_width``: p₀ from 0.01 to 100,000 under this package's defaults. LeNet-5 learns MNIST from scratch (1,000
examples), and the digit transformer with LoRA learns UCI's digits, one example at a time, with
``KalmanConfig(initial_variance=p0)``: once with the bounds on a prior too wide for its linearization, once without
(``bound_prior=False``). Final accuracy is that of the last 200 examples, each predicted before its update.

``tuning``: does evidence from a stream choose as well as a held-out set? Three problems of ``quality/run.py``, one pass
each, four examples at a time. Every cell of a grid (scale of the prior, forgetting) learns the stream and predicts the
held-out part, whose log loss picks the best cell after the fact. ``KalmanConfig(tune=...)`` uses no held-out data: its
candidates learn the first examples side by side, and the one with the least log loss on the later half of those
examples, or on all of them, continues.

Data and weights are read from ../shared, or from $BAYES_KF_DATA and $BAYES_KF_WEIGHTS.

    python -m benchmarks.papers.prior_sensitivity                       # everything; a stopped run continues
    python -m benchmarks.papers.prior_sensitivity --tables p0_bounds --data usps sst2
    python -m benchmarks.papers.prior_sensitivity --table               # tables and figure from existing results
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

import bayes_kf as bkf
from bayes_kf.data import uci_digits_split
from bayes_kf.evaluation import accuracy, expected_calibration_error, negative_log_likelihood
from bayes_kf.models.zoo import lenet5, lora_digits_vit
from benchmarks.bench.registry.problems import TUNING_SEED, found_problems, found_quality_problems
from benchmarks.common.command import Cell, Command, run_cells
from benchmarks.common.data import mnist
from benchmarks.common.learners import Pass, Stream, frozen_pass, kalman_pass
from benchmarks.common.result_files import ResultFile
from benchmarks.papers import prior_sensitivity_tables as tables

LAST = 200  # examples of the final accuracy
BATCH, PREDICTION_BATCH = 4, 64


class Table(NamedTuple):
    """One of the three tables.

    Attributes:
        title: of the Markdown file.
        data: names of its data sets.
        cells: from data sets and seeds to key -> function that measures.
        show: a cell in one line.
        render: cells as Markdown.
    """

    title: str
    data: tuple[str, ...]
    cells: Callable[[list[str], list[int]], dict[str, Callable[[], Cell]]]
    show: Callable[[Any], str]
    render: Callable[[Any], list[str]]


def measure_bound(name: str, rule: str, bound: float) -> Cell:
    """A pass of LoKO, or of the frozen model if the bound is 0."""
    problem = found_problems()[name]
    stream = problem.tuning("online").stream
    model = problem.model(problem.network.adapters[0], TUNING_SEED)
    if bound:
        config = bkf.KalmanConfig.loko(initial_variance=bound, initial_rule=rule)
        with warnings.catch_warnings(action="ignore"):
            result = kalman_pass(model, stream, config)
    else:
        result = frozen_pass(model, stream)
    right = torch.zeros(len(stream.labels), dtype=torch.float64)  # examples after a refused update count as wrong
    right[: len(result.correct)] = result.correct.double()
    half = len(right) // 2
    cell = {"accuracy": right.mean().item(), "later": right[half:].mean().item(), "steps": len(right)}
    return cell | _divergence(result)


def bound_cells(data: list[str], seeds: list[int]) -> dict[str, Callable[[], Cell]]:
    """The frozen models first, then every rule and bound."""
    places = [(name, "", 0.0) for name in data]
    places += [(name, rule, bound) for name in data for rule in tables.RULES for bound in tables.BOUNDS]
    return {tables.bound_key(*place): partial(measure_bound, *place) for place in places}


def measure_width(data: str, variance: float, bounded: bool) -> Cell:
    """A pass under this package's defaults, up to a divergence."""
    model, stream = _width_problem(data, seed=0)
    config = bkf.KalmanConfig(initial_variance=variance, bound_prior=bounded, seed=0)
    with warnings.catch_warnings(action="ignore"):
        result = kalman_pass(model, stream, config)
    cell: Cell = {"steps": len(result.correct)} | _divergence(result)
    if result.cause is not None:
        return cell
    means = {"accuracy": result.correct, "final": result.correct[-LAST:], "log_loss": result.log_loss}
    return cell | {name: values.double().mean().item() for name, values in means.items()}


def width_cells(data: list[str], seeds: list[int]) -> dict[str, Callable[[], Cell]]:
    """With the bounds on the prior first, then without."""
    places = [(name, variance, bounded) for bounded in (True, False) for name in data for variance in tables.VARIANCES]
    return {tables.width_key(*place): partial(measure_width, *place) for place in places}


def _width_problem(data: str, seed: int) -> tuple[nn.Module, Stream]:
    """A model at its start, and its stream."""
    if data == "digits":
        return lora_digits_vit(rank=4, seed=seed), Stream(*uci_digits_split(seed=seed)[0])
    images = mnist("train")
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(seed))[:1000]
    return lenet5(seed=seed), Stream(images.images[order], images.labels[order])


def measure_tuning(data: str, options: Mapping[str, Any], seed: int) -> Cell:
    """Held-out scores after one pass, and the settings that it used."""
    problem = found_quality_problems()[data]
    given = problem.load(seed)
    start = time.process_time()
    with warnings.catch_warnings(action="ignore"):
        config = bkf.KalmanConfig(seed=seed, **options)
        posterior = bkf.fit(problem.model(seed, 0.0), given.stream.batches(BATCH), config, progress=False)
    seconds = time.process_time() - start
    probs, labels = posterior.predict_loader(given.heldout.batches(PREDICTION_BATCH)).probs, given.heldout.labels
    assert probs is not None  # a classifier
    return {
        "accuracy": accuracy(probs, labels),
        "nll": negative_log_likelihood(probs, labels),
        "ece": expected_calibration_error(probs, labels),
        "chosen": {name: getattr(posterior.config, name) for name in tables.GRID},
        "seconds": seconds,
    }


def tuning_cells(data: list[str], seeds: list[int]) -> dict[str, Callable[[], Cell]]:
    """Every cell of the grid, and every way to choose one."""
    settings = {tables.grid_name(cell): cell for cell in tables.GRID_CELLS}
    settings |= {f"tune {name}": options for name, options in tables.TUNED.items()}
    return {
        f"{name}/{setting}/{seed}": partial(measure_tuning, name, options, seed)
        for seed in seeds
        for name in data
        for setting, options in settings.items()
    }


def _divergence(result: Pass) -> Cell:
    return {} if result.cause is None else {"diverged_at": result.diverged_at, "cause": result.cause}


TABLES = {
    "p0_bounds": Table(
        "Between which p₀ LoKO learns", tables.PROBLEMS, bound_cells, tables.show_bound, tables.render_bounds
    ),
    "prior_width": Table(
        "How much the prior variance matters",
        tuple(tables.WIDTH_TITLES),
        width_cells,
        tables.show_width,
        tables.render_width,
    ),
    "tuning": Table(
        "Choosing by evidence, and by held-out data",
        tables.TUNING_DATA,
        tuning_cells,
        tables.show_tuning,
        tables.render_tuning,
    ),
}


def run_table(name: str, args: argparse.Namespace) -> None:
    """Run the missing cells of a table and write it."""
    table, file = TABLES[name], ResultFile(name)
    if not args.table:
        data = [data for data in args.data if data in table.data]
        run_cells(file, table.cells(data, args.seeds), args.redo, table.show)
    print(file.write_markdown(table.title, table.render(file.cells)))
    if name == "p0_bounds" and file.cells:
        tables.draw_bounds(file.cells).savefig(file.path.with_suffix(".png"), dpi=120)


def main() -> None:
    """The command line."""
    data = dict.fromkeys(data for table in TABLES.values() for data in table.data)
    command = (
        Command(__doc__).names("--tables", TABLES).names("--data", data, text="data sets of the tables that have them")
    )
    args = command.seeds(3).redo().table().parse()
    for name in args.tables:
        run_table(name, args)


if __name__ == "__main__":
    main()
