"""Which setting of its grid a row runs with, from what the settings did on the tuning stream."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from benchmarks.bench.registry.optimizers import Row, text_of

Cells = Mapping[str, Mapping[str, Any]]


def tuning_key(problem: str, row: str, choice: Mapping[str, Any]) -> str:
    """Of a cell of tuning."""
    return f"{problem}/{row}/{text_of(choice)}/tuning"


def key(problem: str, row: str, choice: Mapping[str, Any], seed: int) -> str:
    """Of a cell that is reported."""
    return f"{problem}/{row}/{text_of(choice)}/{seed}"


def chosen(cells: Cells, problem: str, row: Row, criteria: Mapping[str, str]) -> dict[str, dict[str, Any]] | None:
    """Criterion -> the setting that is best by it on the tuning stream; None until all settings were tried.

    A setting that diverged counts as infinitely bad; where all did, the one that went furthest.
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
