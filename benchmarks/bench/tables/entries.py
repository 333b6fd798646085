"""Entries of tables: the cells of a row on a problem, for every setting that a criterion chose."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.bench.registry.optimizers import Row, text_of
from benchmarks.bench.registry.problems import Problem
from benchmarks.bench.selection import Cells, chosen, key
from benchmarks.common.result_files import mean_sd

Cell = Mapping[str, Any]


class Entry(NamedTuple):
    """A setting of a row on a problem.

    Attributes:
        problem: the problem's name.
        row: the row.
        choice: the setting.
        criteria: that chose it.
        cells: seed -> measured numbers.
    """

    problem: str
    row: Row
    choice: Mapping[str, Any]
    criteria: tuple[str, ...]
    cells: dict[int, Cell]

    @property
    def diverged(self) -> list[int]:
        """Steps at which a seed diverged."""
        return [cell["diverged_at"] for cell in self.cells.values() if "cause" in cell]

    def text(self, name: str, digits: int = 3) -> str:
        """Mean ± sd of a number over the seeds that have it, and the steps of divergences."""
        shown = mean_sd([cell[name] for cell in self.cells.values() if cell.get(name) is not None], digits)
        if not self.diverged:
            return shown
        return f"{shown} (div@{min(self.diverged)}, {len(self.diverged)}/{len(self.cells)})"

    def mean(self, name: str) -> float | None:
        """Mean of a number over the seeds; None if a seed lacks it."""
        values = [cell.get(name) for cell in self.cells.values()]
        return None if any(value is None for value in values) else statistics.mean(values)  # type: ignore[type-var]

    def cost(self, time: str, unit: str) -> str:
        """Mean ± sd over seeds of a step's time over that of an AdamW step timed beside it."""
        ratios = [cell[time] / cell[unit] for cell in self.cells.values() if unit in cell]
        return mean_sd(ratios, 1)


def entries(cells: Cells, problem: Problem, row: Row, criteria: Mapping[str, str]) -> list[Entry]:
    """The entries of a row on a problem: one for each chosen setting that has cells."""
    settings = chosen(cells, problem.name, row, criteria)
    if settings is None:
        return []
    chosen_entries = []
    for choice in {text_of(choice): choice for choice in settings.values()}.values():
        seeds = {
            seed: cells[name] for seed in range(100) if (name := key(problem.name, row.name, choice, seed)) in cells
        }
        by = tuple(criterion for criterion, other in settings.items() if other == choice)
        if seeds:
            chosen_entries.append(Entry(problem.name, row, choice, by, seeds))
    return chosen_entries


def by_criterion(some: Sequence[Entry], criterion: str) -> Entry | None:
    """The entry that a criterion chose."""
    return next((entry for entry in some if criterion in entry.criteria), None)


def write_csv(path: Path, cells: Cells) -> None:
    """Write every cell as a line: problem, row, setting, seed (or "tuning"), and numbers, without curves."""
    rows = [_flat(name, cell) for name, cell in sorted(cells.items())]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _flat(name: str, cell: Cell) -> dict[str, Any]:
    problem, row, setting, seed = name.split("/")
    flat = {"problem": problem, "row": row, "setting": setting, "seed": seed}
    for field, value in cell.items():
        if isinstance(value, list) and field != "sizes":
            flat |= {f"{field}_{index}": _short(number) for index, number in enumerate(value)}
        elif isinstance(value, str | int | float):
            flat[field] = _short(value)
    return flat


def _short(value: Any) -> Any:
    return float(f"{value:.7g}") if isinstance(value, float) else value


def seeds_of(some: Iterable[Entry]) -> int:
    """The largest number of seeds of an entry."""
    return max((len(entry.cells) for entry in some), default=0)
