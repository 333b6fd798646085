"""LoKO's Figure 6 as a table: LeNet-5 learns MNIST from scratch, 1,000 examples, one at a time.

Rows: five noise models, three diagonal forms and both rules for the initial variance, over a grid of p₀, as in the
papers; the same forms as this package runs them; its default; AdamW and AdaGrad over their learning rates. Each cell is
the average online accuracy. MNIST is read from ../shared/data or $BAYES_KF_DATA.

    python -m benchmarks.papers.lenet                            # everything; a stopped run continues
    python -m benchmarks.papers.lenet --only ours                # the package's own rows, again if its settings changed
    python -m benchmarks.papers.lenet --only papers --seeds 3    # mean and sd over three seeds
    python -m benchmarks.papers.lenet --table                    # the table from existing results
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from bayes_kf import KalmanConfig
from bayes_kf.inference.config import NOISES, RULES
from bayes_kf.models.zoo import LeNetInit, lenet5
from benchmarks.common.command import Command, run_cells
from benchmarks.common.data import mnist
from benchmarks.common.learners import MakeOptimizer, Pass, Stream, frozen_pass, gradient_pass, kalman_pass
from benchmarks.common.result_files import ResultFile
from benchmarks.papers.lenet_table import LOW, render

FORMS = ("diagonal", "diagonal_information", "diagonal_mixed")
VARIANCES = tuple(10.0**k for k in range(-6, 4))
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
INITS: tuple[LeNetInit, ...] = get_args(LeNetInit)
PATIENCE = 300  # steps after which a pass with low accuracy is stopped
GROUPS = ("baselines", "papers", "inits", "ours")
PAPERS: dict[str, Any] = {"expansion": "mean", "damping": False, "bound_prior": False, "temperature": 1.0}
OURS: dict[str, Any] = PAPERS | {"noise": "exponential_family", "expansion": "mode", "damping": True}


class Cell(NamedTuple):
    """One pass.

    Attributes:
        row: "noise/form/rule", where noise is one of the papers' models or "ours"; or "default"; or a baseline's name.
        value: p₀ or the learning rate; 0 if the row has neither.
        init: rule for the network's initial weights.
        seed: of the examples and their order, of the initial weights, and of a uniform prior.
    """

    row: str
    value: float
    init: LeNetInit
    seed: int

    @property
    def key(self) -> str:
        """Key in the results file."""
        return f"{self.row}/{self.value:g}/{self.init}/{self.seed}"

    @property
    def config(self) -> KalmanConfig | None:
        """The filter's settings; None for a baseline."""
        if self.row == "default":
            return KalmanConfig(seed=self.seed)
        if "/" not in self.row:
            return None
        noise, form, rule = self.row.split("/")
        prior: dict[str, Any] = {"initial_variance": self.value, "initial_rule": rule, "seed": self.seed}
        setting = OURS if noise == "ours" else PAPERS | {"noise": noise}
        return KalmanConfig(covariance=form, **prior, **setting)


def cells(group: str, init: LeNetInit, seed: int) -> Iterator[Cell]:
    """The cells of a group."""
    if group == "baselines":
        yield from (Cell("frozen", 0, init, seed), Cell("adamw-decay", 1e-4, init, seed))
        yield from (Cell(row, rate, init, seed) for row in ("adamw", "adagrad") for rate in RATES)
    elif group == "papers":
        for noise, form, rule, value in itertools.product(NOISES, FORMS, RULES, VARIANCES):
            yield Cell(f"{noise}/{form}/{rule}", value, init, seed)
    elif group == "inits":
        for other, rule, value in itertools.product(INITS, RULES, VARIANCES):
            yield Cell(f"ema_taylor/diagonal/{rule}", value, other, seed)
    else:
        yield Cell("default", 0, init, seed)
        for form, rule, value in itertools.product(FORMS, RULES, VARIANCES):
            yield Cell(f"ours/{form}/{rule}", value, init, seed)


def optimizer(cell: Cell) -> MakeOptimizer:
    """The optimizer of a baseline. "adamw-decay", and "adagrad" at 1e-3, are LoKO's settings."""
    if cell.row == "adagrad":
        return lambda parameters: torch.optim.Adagrad(parameters, lr=cell.value)
    if cell.row == "adamw-decay":
        return lambda parameters: torch.optim.AdamW(parameters, lr=cell.value, weight_decay=1e-4)
    return lambda parameters: torch.optim.AdamW(parameters, lr=cell.value)


def measure(cell: Cell, limit: int) -> dict[str, Any]:
    """The numbers of one pass that the results file keeps."""
    model, config = lenet5(cell.seed, init=cell.init), cell.config
    stream = sample_stream(cell.seed, limit)
    if config is not None:
        result = kalman_pass(model, stream, config, give_up)
    elif cell.row == "frozen":
        result = frozen_pass(model, stream)
    else:
        result = gradient_pass(model, stream, optimizer(cell), decay=cell.row.endswith("decay"))
    numbers = summary(result)
    return numbers | {"config": dataclasses.asdict(config)} if config and is_ours(cell) else numbers


def give_up(correct: Tensor, log_loss: Tensor) -> bool:
    """Whether accuracy is low after PATIENCE steps (LoKO's test), and the log loss far above chance."""
    late = len(correct) == PATIENCE
    return late and float(correct.double().mean()) < LOW and float(log_loss[-100:].mean()) > 2 * math.log(10)


def is_ours(cell: Cell) -> bool:
    """Whether a cell depends on the package's defaults. The papers' recursion does not."""
    return cell.row.startswith(("ours/", "default"))


def summary(result: Pass) -> dict[str, Any]:
    """Numbers of a pass, up to a divergence; accuracy and log loss are None if the first update was refused."""
    seen = len(result.correct)
    numbers: dict[str, Any] = {
        "accuracy": round(result.correct.double().mean().item(), 6) if seen else None,
        "log_loss": round(result.log_loss.double().mean().item(), 6) if seen else None,
        "last_100_accuracy": round(result.correct[-100:].double().mean().item(), 6) if seen else None,
        "milliseconds": round(1e3 * result.seconds, 3),
        "steps": seen,
    }
    return numbers if result.cause is None else numbers | {"diverged_at": result.diverged_at, "cause": result.cause}


@cache
def sample_stream(seed: int, limit: int) -> Stream:
    """The first ``limit`` examples of a seeded permutation of MNIST's training set."""
    images, labels = mnist("train")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:limit]
    return Stream(images[order], labels[order])


def is_stale(cell: Cell, measured: dict[str, Any]) -> bool:
    """Whether a measured cell has other settings than the package's defaults today."""
    config = cell.config
    return is_ours(cell) and config is not None and measured.get("config") != dataclasses.asdict(config)


def show(measured: dict[str, Any]) -> str:
    """A measured cell in one line."""
    score = f"diverged at {measured['diverged_at']}: {measured['cause']}" if "cause" in measured else ""
    return f"{measured['milliseconds']:.2f} ms/step  {score or format(measured['accuracy'], '.3f')}"


def main() -> None:
    """The command line."""
    command = Command(__doc__).names("--only", GROUPS, text="groups of rows to run").seeds(1)
    command.option("--init", choices=INITS, default=INITS[0], help="of the network, except in the group inits")
    args = command.limit("examples in the stream", 1000).redo().table().parse()
    file = ResultFile("lenet" if args.limit == 1000 else f"lenet-limit{args.limit}")
    if not args.table:
        chosen = [cell for group in args.only for seed in args.seeds for cell in cells(group, args.init, seed)]
        by_key = {cell.key: cell for cell in chosen}
        work: dict[str, Callable[[], dict[str, Any]]] = {c.key: partial(measure, c, args.limit) for c in chosen}
        run_cells(file, work, args.redo, show, lambda key, measured: is_stale(by_key[key], measured))
    print(file.write_markdown("LeNet-5 on MNIST from scratch", render(file.cells, args.limit, args.init)))


if __name__ == "__main__":
    main()
