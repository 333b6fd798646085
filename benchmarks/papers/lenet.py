"""LoKO's Figure 6 as a table: LeNet-5 learns MNIST from scratch, 1,000 examples, one at a time.

Both rules for the initial variance, a grid of p₀, five noise models and three diagonal forms as the papers have them,
then the same forms as this package runs them, its default, and AdamW and AdaGrad over their learning rates. Each cell
is the average online accuracy. Real MNIST is read from ../shared/data or $BAYES_KF_DATA.

    python benchmarks/lenet.py                            # everything; a stopped run goes on where it was
    python benchmarks/lenet.py --only ours                # the package's own rows alone, again if its settings changed
    python benchmarks/lenet.py --only papers --seeds 3    # mean and sd over three seeds
    python benchmarks/lenet.py --table                    # print what is there
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from bayes_kf import KalmanConfig
from bayes_kf.inference.config import NOISES, RULES
from bayes_kf.models.zoo import LeNetInit, lenet5
from benchmarks.common.data import mnist
from benchmarks.common.learners import MakeOptimizer, Pass, Stream, frozen_pass, gradient_pass, kalman_pass
from benchmarks.common.result_files import ResultFile
from benchmarks.papers.lenet_table import LOW, render

FORMS = ("diagonal", "diagonal_information", "diagonal_mixed")
VARIANCES = tuple(10.0**k for k in range(-6, 4))
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
INITS: tuple[LeNetInit, ...] = get_args(LeNetInit)
PATIENCE = 300  # steps after which a pass that has diverged by accuracy is stopped
GROUPS = ("baselines", "papers", "inits", "ours")
PAPERS: dict[str, Any] = {"expansion": "mean", "damping": False, "bound_prior": False, "temperature": 1.0}
OURS: dict[str, Any] = PAPERS | {"noise": "exponential_family", "expansion": "mode", "damping": True}


class Cell(NamedTuple):
    """One pass.

    Attributes:
        row: "noise/form/rule", noise one of the papers' or "ours"; or "default", or the name of a baseline.
        value: p₀ or learning rate; 0 where there is none.
        init: rule for the network's first weights.
        seed: of the examples and their order, of those weights, and of a uniform prior.
    """

    row: str
    value: float
    init: LeNetInit
    seed: int

    @property
    def key(self) -> str:
        """Name in the result file."""
        return f"{self.row}/{self.value:g}/{self.init}/{self.seed}"

    @property
    def config(self) -> KalmanConfig | None:
        """Settings of a filter; None for a baseline."""
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
    """The baseline of a cell; "adamw-decay" is LoKO's setting, as is "adagrad" at 1e-3."""
    if cell.row == "adagrad":
        return lambda parameters: torch.optim.Adagrad(parameters, lr=cell.value)
    if cell.row == "adamw-decay":
        return lambda parameters: torch.optim.AdamW(parameters, lr=cell.value, weight_decay=1e-4)
    return lambda parameters: torch.optim.AdamW(parameters, lr=cell.value)


def measure(cell: Cell, stream: Stream) -> dict[str, Any]:
    """Run a cell; what the result file keeps of it."""
    model, config = lenet5(cell.seed, init=cell.init), cell.config
    if config is not None:
        found = kalman_pass(model, stream, config, give_up)
    elif cell.row == "frozen":
        found = frozen_pass(model, stream)
    else:
        found = gradient_pass(model, stream, optimizer(cell), decay=cell.row.endswith("decay"))
    kept = summary(found)
    return kept | {"config": dataclasses.asdict(config)} if config and is_ours(cell) else kept


def give_up(correct: Tensor, log_loss: Tensor) -> bool:
    """Whether a pass is hopeless: LoKO's own test (accuracy low after a set number of steps), and losing."""
    late = len(correct) == PATIENCE
    return late and float(correct.double().mean()) < LOW and float(log_loss[-100:].mean()) > 2 * math.log(10)


def is_ours(cell: Cell) -> bool:
    """Whether a cell moves with the package's defaults; the papers' recursion does not."""
    return cell.row.startswith(("ours/", "default"))


def summary(found: Pass) -> dict[str, Any]:
    """Numbers of a pass; accuracy and log loss are those up to a divergence, None if that was the first update."""
    seen = len(found.correct)
    kept: dict[str, Any] = {
        "accuracy": round(found.correct.double().mean().item(), 6) if seen else None,
        "log_loss": round(found.log_loss.double().mean().item(), 6) if seen else None,
        "last_100_accuracy": round(found.correct[-100:].double().mean().item(), 6) if seen else None,
        "milliseconds": round(1e3 * found.seconds, 3),
        "steps": seen,
    }
    return kept if found.cause is None else kept | {"diverged_at": found.diverged_at, "cause": found.cause}


def sample_stream(seed: int, limit: int) -> Stream:
    """The first examples of a seeded permutation of MNIST's training set."""
    images, labels = mnist("train")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:limit]
    return Stream(images[order], labels[order])


def stale(cell: Cell, kept: dict[str, Any] | None, redo: str | None) -> bool:
    """Whether a cell has to be run: it is missing, asked for, or of other settings than today's."""
    if kept is None or (redo is not None and re.search(redo, cell.key)):
        return True
    config = cell.config
    return is_ours(cell) and config is not None and kept.get("config") != dataclasses.asdict(config)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="groups of rows to run")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds")
    parser.add_argument("--init", choices=INITS, default=INITS[0], help="of the network, but for the group inits")
    parser.add_argument("--limit", type=int, default=1000, help="examples in the stream")
    parser.add_argument("--redo", metavar="REGEX", help="run cells again whose key matches")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    file = ResultFile("lenet" if args.limit == 1000 else f"lenet-limit{args.limit}")
    if not args.table:
        todo = [
            cell
            for group, seed in itertools.product(args.only, range(args.seeds))
            for cell in cells(group, args.init, seed)
            if stale(cell, file.cells.get(cell.key), args.redo)
        ]
        run(todo, file, args.limit)
    print(file.write_markdown("LeNet-5 on MNIST from scratch", render(file.cells, args.limit, args.init)))


def run(todo: list[Cell], file: ResultFile, limit: int) -> None:
    """Measure cells, writing each as it finishes."""
    file.begin()
    streams: dict[int, Stream] = {}
    bar = tqdm(list(dict.fromkeys(todo)), unit="cell", disable=not sys.stderr.isatty())
    for done, cell in enumerate(bar):
        if cell.seed not in streams:
            streams[cell.seed] = sample_stream(cell.seed, limit)
        kept = measure(cell, streams[cell.seed])
        file.put(cell.key, kept)
        tail = f"diverged at {kept['diverged_at']}: {kept['cause']}" if "cause" in kept else f"{kept['accuracy']:.3f}"
        timing = f"{kept['milliseconds']:7.2f} ms/step {kept['milliseconds'] * kept['steps'] / 1e3:6.1f} s"
        tqdm.write(f"{done + 1:4d}/{bar.total} {cell.key:55s} {timing}  {tail}", file=sys.stderr)


if __name__ == "__main__":
    main()
