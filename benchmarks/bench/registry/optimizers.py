"""Rows of the bench: every file of ``optimizers/`` is one.

A file has a docstring that names the paper, and

- ``TITLE``: the row's name in tables.
- ``GRID``: a tuple of settings, as dicts: :data:`BUDGET` of them, the same number for every tuned row, or one. If the
  benches need different grids (batches of 1 and of 32), a dict of grids by bench.
- ``make(model, choice, seed, num_steps, inputs)``: returns a :class:`~benchmarks.bench.learners.Learner`. ``model`` is
  in evaluation mode with its trainable tensors at their start, ``choice`` one setting of the grid, ``num_steps`` the
  number of updates (for schedules), ``inputs`` the stream's first inputs, without labels.

It may have

- ``BENCHES``: its benches, of "online" and "optimizers"; both by default.
- ``ADAPTERS``: kinds of trainable tensors that it accepts (``networks.base.KINDS``); by default the problem's own.
- ``PRIORITY``: rows with smaller numbers run and stand first; 50 by default.
- ``config(choice, seed)``: the ``KalmanConfig`` of a filter; cells are run again when it changes.
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
    """An optimizer of the bench; the module's docstring explains the fields."""

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
        """Whether it has several settings."""
        return len(self.grid) > 1

    def adapter(self, offered: Sequence[str]) -> str | None:
        """The first kind of trainable tensors that it accepts among those of a problem; None if there is none."""
        if self.adapters is None:
            return offered[0]
        return next((kind for kind in self.adapters if kind in offered), None)

    def settings(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that a cell depends on: the choice, and a filter's whole configuration."""
        if self.config is None:
            return dict(choice)
        return dict(choice) | {"config": dataclasses.asdict(self.config(choice, 0))}


def found_rows(bench: str, extra: Path | None = None) -> dict[str, Row]:
    """The rows of a bench by name, in their order.

    Args:
        bench: "online" or "optimizers".
        extra: a folder with further files in ``optimizers``.

    Raises:
        ValueError: if a file lacks a name, or its grid does not have the common size.
    """
    rows = [_row(name, module, bench) for name, module in modules("optimizers", extra).items()]
    rows = [row for row in rows if bench in row.benches]
    return {row.name: row for row in sorted(rows, key=lambda row: (row.priority, row.name))}


def text_of(choice: Mapping[str, Any]) -> str:
    """A setting in the form that is part of a key.

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


def same_settings(measured: Any, today: Any) -> bool:
    """Whether a cell's settings are today's; fields newer than the cell count as their defaults."""
    import bayes_kf

    if set(measured) != set(today):
        return False
    defaults = {field.name: field.default for field in dataclasses.fields(bayes_kf.KalmanConfig)}
    for name, value in today.items():
        if name != "config":
            if measured[name] != value:
                return False
        elif any(measured[name].get(field, defaults[field]) != number for field, number in value.items()):
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
    """The checked settings of a file."""
    grid = tuple(settings)
    if len(grid) not in (1, BUDGET) or not all(isinstance(choice, dict) for choice in grid):
        raise ValueError(
            f"`GRID` must be {BUDGET} dicts, as every row's, or one, got {len(grid)} in {module.__file__}."
        )
    if len({text_of(choice) for choice in grid}) < len(grid):
        raise ValueError(f"`GRID` must hold different settings, got some twice in {module.__file__}.")
    return grid
