"""Measured cells by set of questions and reading, and paired differences of log loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.language.rows import ROWS

Cell = Mapping[str, Any]
BASE = "adamw"  # the row that others are compared with


class Panel(NamedTuple):
    """The cells of a set of questions under a reading.

    Attributes:
        name: of the set; it ends in -all if all linear layers are adapted.
        reading: letters or texts.
        rows: row -> seed -> measured cell, in the order of ``ROWS``.
        missing: row, seed and reason of cells without a result.
    """

    name: str
    reading: str
    rows: dict[str, dict[str, Cell]]
    missing: list[str]

    @property
    def others(self) -> list[str]:
        """The sets outside of this one whose questions were asked."""
        scores = {score for row in self.rows.values() for cell in row.values() for score in cell}
        ends = ("_epistemic",)
        return sorted(s.removeprefix("ood_") for s in scores if s.startswith("ood_") and not s.endswith(ends))


class Gap(NamedTuple):
    """The mean of paired differences with its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.error:.3f}".replace("-", "−")


def panels(cells: Mapping[str, Cell]) -> list[Panel]:
    """A panel for each set and reading."""
    made: dict[tuple[str, str], Panel] = {}
    order = list(ROWS)
    for key in sorted(cells, key=lambda key: (order.index(key.split("/")[2]), key)):
        name, reading, row, seed = key.split("/")
        panel = made.setdefault((name, reading), Panel(name, reading, {}, []))
        if "skipped" in cells[key]:
            panel.missing.append(f"{row} {seed}: {cells[key]['skipped']}")
        else:
            panel.rows.setdefault(row, {})[seed] = cells[key]
    return [made[place] for place in sorted(made)]


def paired(panel: Panel, row: str, base: str) -> Gap | None:
    """The log loss of a row less that of another, over the test questions, each averaged over the common seeds."""
    own, other = panel.rows.get(row, {}), panel.rows.get(base, {})
    seeds = [seed for seed in own if seed in other and "losses" in own[seed] and "losses" in other[seed]]
    if not seeds:
        return None
    by_seed = [[a - b for a, b in zip(own[s]["losses"], other[s]["losses"], strict=True)] for s in seeds]
    return mean_gap([statistics.mean(differences) for differences in zip(*by_seed, strict=True)])


def mean_gap(differences: Sequence[float]) -> Gap:
    """The mean of some differences; the error is NaN for one."""
    count = len(differences)
    error = statistics.stdev(differences) / math.sqrt(count) if count > 1 else math.nan
    return Gap(statistics.mean(differences), error)
