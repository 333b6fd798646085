"""The cells of a bench: what is to be run, tuning first, and what is already there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from benchmarks.bench.registry.optimizers import Row, same_settings
from benchmarks.bench.registry.problems import TUNING_SEED, Problem, Split
from benchmarks.bench.selection import chosen, key, tuning_key
from benchmarks.common.result_files import ResultFile


class Plan(NamedTuple):
    """What is to be run.

    Attributes:
        bench: the module of the online or of the optimizer bench.
        rows: in their order.
        problems: in their order.
        seeds: how many.
        adamw: timed beside every row; None: not.
        limit: examples of any stream at most.
        adapter: of every row, in place of the problems' own; None: as rows and problems say.
        redo: whether cells are run again that are there.
    """

    bench: ModuleType
    rows: Sequence[Row]
    problems: Sequence[Problem]
    seeds: int = 3
    adamw: Row | None = None
    limit: int | None = None
    adapter: str | None = None
    redo: bool = False


def run(plan: Plan, file: ResultFile) -> int:
    """Run what is missing of a plan, writing each cell as it finishes; how many were run."""
    file.begin()
    pairs = [(problem, row) for problem in plan.problems for row in plan.rows if kind(plan, row, problem)]
    done = 0
    with tqdm(total=len(pairs), unit="row", disable=not sys.stderr.isatty(), position=0) as bar:
        for problem, row in pairs:
            bar.set_postfix_str(f"{problem.name}, {row.name}")
            done += _Pair(plan, file, problem, row).run()
            bar.update()
    return done


def kind(plan: Plan, row: Row, problem: Problem) -> str | None:
    """The kind of trainable tensors that a row has on a problem; None where it does not run there."""
    offered = problem.network.adapters
    if plan.bench.NAME not in row.benches:
        return None
    if plan.adapter is not None:
        offered = tuple(kind for kind in offered if kind == plan.adapter)
    return row.adapter(offered) if offered else None


class _Pair:
    """A row on a problem."""

    def __init__(self, plan: Plan, file: ResultFile, problem: Problem, row: Row) -> None:
        self.plan, self.file, self.problem, self.row = plan, file, problem, row
        self._splits: dict[int, Split] = {}
        found = kind(plan, row, problem)
        assert found is not None  # pairs are chosen by it
        self.adapter = found

    def run(self) -> int:
        """Tuning, then what it chose on every seed; the number of cells that were run."""
        plan, row, name = self.plan, self.row, self.problem.name
        done = 0
        if row.tuned:
            for choice in row.grid:
                done += self._cell(tuning_key(name, row.name, choice), choice, TUNING_SEED)
        settings = chosen(self.file.cells, name, row, plan.bench.CRITERIA)
        assert settings is not None  # all were tried
        for seed in range(plan.seeds):
            for choice in {str(choice): choice for choice in settings.values()}.values():
                done += self._cell(key(name, row.name, choice, seed), choice, seed)
        return done

    def _cell(self, name: str, choice: dict[str, Any], seed: int) -> int:
        today = self._settings(choice)
        kept = self.file.cells.get(name)
        if not self.plan.redo and kept is not None and _current(kept, today):
            return 0
        split = self._split(seed)
        adamw = None if seed == TUNING_SEED else self.plan.adamw
        found = self.plan.bench.measure(self.row, self.problem, self.adapter, choice, split, seed, adamw)
        found |= today | {"stream": len(split.stream.labels), "heldout": len(split.heldout.labels)}
        if seed == TUNING_SEED:
            found.pop("curve", None)
        self.file.put(name, found)
        tqdm.write(f"{name}: {_summary(found)}", file=sys.stderr)
        return 1

    def _settings(self, choice: dict[str, Any]) -> dict[str, Any]:
        """What a cell depends on besides the code."""
        size = self.problem.sizes_of(self.plan.bench.NAME, self.plan.limit)
        return {"settings": self.row.settings(choice), "network": self.problem.network_name, "sizes": list(size)}

    def _split(self, seed: int) -> Split:
        if seed not in self._splits:
            problem, name, limit = self.problem, self.plan.bench.NAME, self.plan.limit
            self._splits[seed] = (
                problem.tuning(name, limit) if seed == TUNING_SEED else problem.split(name, seed, limit)
            )
        return self._splits[seed]


def _current(kept: dict[str, Any], today: dict[str, Any]) -> bool:
    """Whether a cell is of today's settings."""
    others = all(kept.get(name) == value for name, value in today.items() if name != "settings")
    return others and same_settings(kept["settings"], today["settings"])


def _summary(cell: dict[str, Any]) -> str:
    """How a cell went, in a line."""
    if "cause" in cell:
        return f"diverged at {cell['diverged_at']}: {cell['cause']}"
    if "online_accuracy" in cell:
        first = f"online {cell['online_accuracy']:.4f}, loss {cell['online_log_loss']:.4f}"
    else:
        first = f"train {cell['train_loss'][-1]:.4f}, test {cell['test_loss'][-1]:.4f}"
    scores = f"held out {cell['accuracy']:.4f}, NLL {cell['nll']:.4f}, ECE {cell['ece']:.4f}"
    return f"{first}; {scores}; {cell['milliseconds']:.1f} ms a step"
