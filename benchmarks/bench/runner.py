"""The cells of a bench: tuning first, then the chosen settings on every seed; existing cells are not run again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from benchmarks.bench.registry.optimizers import Row, same_settings
from benchmarks.bench.registry.problems import TUNING_SEED, Problem, Split
from benchmarks.bench.selection import chosen, key, tuning_key
from benchmarks.common.command import is_due
from benchmarks.common.result_files import ResultFile


class Plan(NamedTuple):
    """The rows and problems to run.

    Attributes:
        bench: the module ``online`` or ``epochs``.
        rows: in their order.
        problems: in their order.
        seeds: to run.
        adamw: the row whose steps are timed beside every row; None: no timing.
        limit: largest number of examples of any stream.
        adapter: of every row; None means the choice of rows and problems.
        redo: regular expression of the cells to run again; None: none.
    """

    bench: ModuleType
    rows: Sequence[Row]
    problems: Sequence[Problem]
    seeds: Sequence[int] = (0, 1, 2)
    adamw: Row | None = None
    limit: int | None = None
    adapter: str | None = None
    redo: str | None = None


def run(plan: Plan, file: ResultFile) -> int:
    """The number of cells that were run: the missing ones of a plan. Each is written at once."""
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
    """The kind of trainable tensors of a row on a problem; None if it does not run there."""
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
        adapter = kind(plan, row, problem)
        assert adapter is not None  # pairs are chosen by it
        self.adapter = adapter

    def run(self) -> int:
        """Run the tuning cells, then the chosen settings on every seed; the number of cells that were run."""
        plan, row, name = self.plan, self.row, self.problem.name
        done = 0
        if row.tuned:
            for choice in row.grid:
                done += self._cell(tuning_key(name, row.name, choice), choice, TUNING_SEED)
        settings = chosen(self.file.cells, name, row, plan.bench.CRITERIA)
        assert settings is not None  # all settings were tried
        for seed in plan.seeds:
            for choice in {str(choice): choice for choice in settings.values()}.values():
                done += self._cell(key(name, row.name, choice, seed), choice, seed)
        return done

    def _cell(self, name: str, choice: dict[str, Any], seed: int) -> int:
        today = self._settings(choice)
        if not is_due(self.file, name, self.plan.redo) and _current(self.file.cells[name], today):
            return 0
        split = self._split(seed)
        adamw = None if seed == TUNING_SEED else self.plan.adamw
        cell = self.plan.bench.measure(self.row, self.problem, self.adapter, choice, split, seed, adamw)
        cell |= today | {"stream": len(split.stream.labels), "heldout": len(split.heldout.labels)}
        if seed == TUNING_SEED:
            cell.pop("curve", None)
        self.file.put(name, cell)
        tqdm.write(f"{name}: {_summary(cell)}", file=sys.stderr)
        return 1

    def _settings(self, choice: dict[str, Any]) -> dict[str, Any]:
        """The settings that a cell depends on."""
        size = self.problem.sizes_of(self.plan.bench.NAME, self.plan.limit)
        return {"settings": self.row.settings(choice), "network": self.problem.network_name, "sizes": list(size)}

    def _split(self, seed: int) -> Split:
        if seed not in self._splits:
            problem, name, limit = self.problem, self.plan.bench.NAME, self.plan.limit
            self._splits[seed] = (
                problem.tuning(name, limit) if seed == TUNING_SEED else problem.split(name, seed, limit)
            )
        return self._splits[seed]


def _current(cell: dict[str, Any], today: dict[str, Any]) -> bool:
    """Whether a cell has today's settings."""
    others = all(cell.get(name) == value for name, value in today.items() if name != "settings")
    return others and same_settings(cell["settings"], today["settings"])


def _summary(cell: dict[str, Any]) -> str:
    """A measured cell in one line."""
    if "cause" in cell:
        return f"diverged at {cell['diverged_at']}: {cell['cause']}"
    if "online_accuracy" in cell:
        first = f"online {cell['online_accuracy']:.4f}, loss {cell['online_log_loss']:.4f}"
    else:
        first = f"train {cell['train_loss'][-1]:.4f}, test {cell['test_loss'][-1]:.4f}"
    scores = f"held out {cell['accuracy']:.4f}, NLL {cell['nll']:.4f}, ECE {cell['ece']:.4f}"
    return f"{first}; {scores}; {cell['milliseconds']:.1f} ms a step"
