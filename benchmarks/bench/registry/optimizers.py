"""Rows of the bench: every file of ``optimizers/`` is one.

A file holds, besides a docstring that names the paper:

- ``TITLE``: the row's name in tables.
- ``GRID``: settings as dicts, :data:`BUDGET` of them, the same number for every row that is tuned; or one. Where the
  benches need different ones (batches of 1 and of 32), a dict of them by bench.
- ``make(model, choice, seed, num_steps, inputs)``: a :class:`~bench.learners.Learner`. ``model`` is in evaluation mode
  with its trainable tensors at their start, ``choice`` one setting of the grid, ``num_steps`` how many updates there
  will be (for schedules), ``inputs`` the stream's first inputs, without labels.

and may hold

- ``BENCHES``: where it runs, of "online" and "optimizers"; both by default.
- ``ADAPTERS``: kinds of trainable tensors that it takes (``networks.KINDS``); by default the problem's own.
- ``PRIORITY``: rows with smaller numbers run and stand first; 50 by default.
- ``config(choice, seed)``: of a filter, its ``KalmanConfig``; cells are run again when it changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from benchmarks.bench.learners import Learner
from benchmarks.bench.registry.plugins import attribute, modules

BUDGET = 4
BENCHES = ("online", "optimizers")


class Row(NamedTuple):
    """An optimizer of the bench; see the module."""

    name: str
    title: str
    grid: tuple[dict[str, Any], ...]
    make: Callable[..., Learner]
    benches: tuple[str, ...]
    adapters: tuple[str, ...] | None
    priority: int
    config: Callable[[Mapping[str, Any], int], Any] | None

    @property
    def tuned(self) -> bool:
        """Whether it has a choice."""
        return len(self.grid) > 1

    def adapter(self, offered: Sequence[str]) -> str | None:
        """The kind of trainable tensors that it takes of those that a problem offers; None where it takes none."""
        if self.adapters is None:
            return offered[0]
        return next((kind for kind in self.adapters if kind in offered), None)

    def settings(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that a cell depends on: the choice, and a filter's whole configuration."""
        if self.config is None:
            return dict(choice)
        return dict(choice) | {"config": dataclasses.asdict(self.config(choice, 0))}


def found_rows(bench: str, extra: Path | None = None) -> dict[str, Row]:
    """The rows of a bench by name, in their order.

    Args:
        bench: "online" or "optimizers".
        extra: a folder whose ``optimizers`` holds further files.

    Raises:
        ValueError: a file lacks something, or its grid is not of the common size.
    """
    rows = [_row(name, module, bench) for name, module in modules("optimizers", extra).items()]
    rows = [row for row in rows if bench in row.benches]
    return {row.name: row for row in sorted(rows, key=lambda row: (row.priority, row.name))}


def text_of(choice: Mapping[str, Any]) -> str:
    """A setting as part of a key.

    Example:
        >>> text_of({"lr": 0.001, "rho": 0.1}), text_of({})
        ('lr=0.001 rho=0.1', 'default')
    """
    return (
        " ".join(
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in choice.items()
        )
        or "default"
    )


def same_settings(kept: Any, today: Any) -> bool:
    """Whether a cell's settings are today's; fields that did not exist then stand at their defaults."""
    import bayes_kf

    if set(kept) != set(today):
        return False
    defaults = {field.name: field.default for field in dataclasses.fields(bayes_kf.KalmanConfig)}
    for name, value in today.items():
        if name != "config":
            if kept[name] != value:
                return False
        elif any(kept[name].get(field, defaults[field]) != number for field, number in value.items()):
            return False
    return True


def _row(name: str, module: ModuleType, bench: str) -> Row:
    benches = tuple(getattr(module, "BENCHES", BENCHES))
    if not set(benches) <= set(BENCHES):
        raise ValueError(
            f"`BENCHES` must be among {', '.join(BENCHES)}, got {', '.join(benches)} in {module.__file__}."
        )
    grids = attribute(module, "GRID", "a tuple of settings")
    return Row(
        name,
        str(attribute(module, "TITLE", "the row's name")),
        _grid(grids.get(bench, ()) if isinstance(grids, dict) and bench in benches else grids, module),
        attribute(module, "make", "a function that makes a learner"),  # type: ignore[arg-type]
        benches,
        getattr(module, "ADAPTERS", None),
        getattr(module, "PRIORITY", 50),
        getattr(module, "config", None),
    )


def _grid(settings: Any, module: ModuleType) -> tuple[dict[str, Any], ...]:
    """Settings of a file, checked."""
    grid = tuple(settings)
    if len(grid) not in (1, BUDGET) or not all(isinstance(choice, dict) for choice in grid):
        raise ValueError(
            f"`GRID` must be {BUDGET} dicts, as every row's, or one, got {len(grid)} in {module.__file__}."
        )
    if len({text_of(choice) for choice in grid}) < len(grid):
        raise ValueError(f"`GRID` must hold different settings, got some twice in {module.__file__}.")
    return grid
