"""The choice of a row's settings from their results on the tuning stream."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from benchmarks.bench.registry.optimizers import Row, text_of

Cells = Mapping[str, Mapping[str, Any]]


def tuning_key(problem: str, row: str, choice: Mapping[str, Any]) -> str:
    """The key of a tuning cell."""
    return f"{problem}/{row}/{text_of(choice)}/tuning"


def key(problem: str, row: str, choice: Mapping[str, Any], seed: int) -> str:
    """The key of a reported cell."""
    return f"{problem}/{row}/{text_of(choice)}/{seed}"


def chosen(cells: Cells, problem: str, row: Row, criteria: Mapping[str, str]) -> dict[str, dict[str, Any]] | None:
    """Criterion -> best setting on the tuning stream; None until all settings were tried.

    A diverged setting has infinite loss; if all diverged, the one with the most steps is best.
    """
    if not row.tuned:
        return dict.fromkeys(criteria, row.grid[0])
    tried = [cells.get(tuning_key(problem, row.name, choice)) for choice in row.grid]
    if any(cell is None for cell in tried):
        return None

    def loss(index: int, name: str) -> tuple[float, int]:
        cell = tried[index]
        assert cell is not None
        value = math.inf if "cause" in cell else float(cell[name])
        return value, -int(cell["steps"])

    best = {criterion: min(range(len(tried)), key=lambda i: loss(i, name)) for criterion, name in criteria.items()}
    return {criterion: row.grid[index] for criterion, index in best.items()}
