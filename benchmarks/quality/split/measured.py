"""Measured cells by data set, row and seed; paired differences and costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.quality.split import regression_rows, rows
from benchmarks.quality.split.shift import SEVERITIES

Cell = Mapping[str, Any]
BASES = {"strong": "the strong row", "strong-ensemble": "the ensemble"}  # rows that others are compared with


def row_names(cells: Mapping[str, Cell], names: Sequence[str]) -> list[str]:
    """The rows that have cells, in the order of the rows; older defaults before the present one."""
    order = [*dict.fromkeys([*rows.ROWS, *regression_rows.ROWS])]
    present = {key.split("/")[1] for key in cells if any(is_of(key, name) for name in names)}

    def place(row: str) -> tuple[int, bool, str]:
        base = "default" if row.startswith("default") else row
        return (order.index(base) if base in order else len(order), row == base, row)

    return sorted(present, key=place)


def row_title(row: str, title: str) -> str:
    """The row's name in tables of classifications or regressions."""
    if row.startswith("default-"):
        return f"ours, default of {row.removeprefix('default-')}"
    table = rows.ROWS if title == "classification" else regression_rows.ROWS
    return table[row][0] if row in table else row


def is_of(key: str, name: str) -> bool:
    """Whether a cell is of this data set."""
    return key.startswith(f"{name}/")


def seeds_of(cells: Mapping[str, Cell], name: str, row: str) -> dict[str, Cell]:
    """Measured cells of a row by seed."""
    found = {key.rpartition("/")[2]: cell for key, cell in cells.items() if key.startswith(f"{name}/{row}/")}
    return {seed: with_shift(cell) for seed, cell in found.items() if "skipped" not in cell}


def with_shift(cell: Cell) -> Cell:
    """The cell with means over the severities."""
    if "nll_1" not in cell:
        return cell
    means = {f"shift_{s}": statistics.mean(cell[f"{s}_{severity}"] for severity in SEVERITIES) for s in ("nll", "ece")}
    return {**cell, **means}


def measured_cells(cells: Mapping[str, Cell], name: str, row: str) -> list[Cell]:
    """Measured cells of a row."""
    return list(seeds_of(cells, name, row).values())


def paired_gaps(
    cells: Mapping[str, Cell], name: str, row: str, base: str, score: str, of_base: str | None = None
) -> list[float]:
    """Differences of a row's score to that of another row, for the seeds that both have.

    Args:
        cells: of the results.
        name: of the data set.
        row: whose score it is.
        base: the other row.
        score: of the row.
        of_base: the score of the other row; None for the same.
    """
    own, other = seeds_of(cells, name, row), seeds_of(cells, name, base)
    pairs = [(own[seed].get(score), other[seed][of_base or score]) for seed in own if seed in other]
    return [value - base_value for value, base_value in pairs if value is not None]


def verdict(gaps: Sequence[float]) -> str:
    """What paired differences over seeds say, lower values being better: beyond two standard errors, or within."""
    if len(gaps) < 2:
        return "one seed"
    gap, error = statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))
    return "better" if gap < -2 * error else "within noise" if gap <= 2 * error else "worse"


def cost(measured: Sequence[Cell], unit: str) -> tuple[float, float]:
    """Learning in units of "epoch_seconds" or "single_seconds": all, and without runs that predict nothing."""
    full = statistics.mean(cell["seconds"] / cell[unit] for cell in measured)
    rest = statistics.mean((cell["seconds"] - cell.get("search_seconds", 0.0)) / cell[unit] for cell in measured)
    return full, rest


def mean_of(measured: Sequence[Cell], score: str) -> float | None:
    """The mean score of the cells that have it."""
    return average([cell.get(score) for cell in measured])


def average(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are there; None if none is."""
    numbers = [value for value in values if value is not None]
    return statistics.mean(numbers) if numbers else None
