"""The time of a step by part, in AdamW steps, and its lower bound: the forward and backward passes that it makes.

An exact step needs a forward pass and m − 1 backward passes of the batch, a sampled one a forward pass and two backward
passes. torch runs those; the rest is this package's. Each part of a step is timed where it is called, without the parts
inside it, and the table has medians over rounds that alternate with AdamW steps. Timing by parts slows a small step by
a few percent, so whole steps are also timed without it. Models and cells are those of ``run.py``.

    python -m benchmarks.speed.profile_step                                   # the cells with targets
    python -m benchmarks.speed.profile_step --models bert-64 --methods exact --batches 16 --outputs 100
    python -m benchmarks.speed.profile_step --table                           # the table from existing results
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bayes_kf import KalmanFilter
from bayes_kf.inference.filtering import measurement_update
from bayes_kf.inference.linearization.jacobian import Jacobian
from bayes_kf.inference.linearization.row_buffer import RowBuffer
from bayes_kf.inference.linearization.tape import Tape
from bayes_kf.models.adapter import AdapterModel
from benchmarks.common.command import Command, run_cells
from benchmarks.common.result_files import ResultFile, markdown_table
from benchmarks.speed.measure import Cell, Weights, first_step, load, start
from benchmarks.speed.models import MODELS
from benchmarks.speed.table import TARGETS, number

CPU = torch.device("cpu")
CURVATURES = ("exact", "truncated", "sampled")
MAX_ROUNDS = 100
FORWARD, BACKWARD, REST = "forward passes", "backward passes", "the rest"
PARTS: dict[str, list[tuple[Any, str]]] = {  # part of a step -> its functions
    FORWARD: [(AdapterModel, "run")],
    BACKWARD: [(Tape, "cotangents")],
    "rows": [(RowBuffer, "add")],
    "J P Jᵀ": [(Jacobian, "gram")],
    "mode": [(measurement_update, "expand_at_mode")],
    "temperature": [(measurement_update, "score_temperatures")],
    "conditioning": [(measurement_update, "_condition")],
    REST: [(KalmanFilter, "update")],
}
FLOOR = (FORWARD, BACKWARD)


class Clock:
    """Seconds and calls by part; the time of a part does not include parts inside it."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.calls = dict.fromkeys(PARTS, 0)
        self._inside: list[float] = []

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.perf_counter() - begun
                self.seconds[part] += taken - self._inside.pop()
                self.calls[part] += 1
                if self._inside:
                    self._inside[-1] += taken

        return call


@contextmanager
def clocked() -> Iterator[Clock]:
    """A context in which every part of a step is timed."""
    clock, originals = (
        Clock(),
        [(part, owner, name, getattr(owner, name)) for part in PARTS for owner, name in PARTS[part]],
    )
    try:
        for part, owner, name, function in originals:
            setattr(owner, name, clock.timed(part, function))
        yield clock
    finally:
        for _, owner, name, function in originals:
            setattr(owner, name, function)


def profile(cell: Cell, method: str, weights: Path, seconds: float) -> dict[str, Any]:
    """Parts of a step in AdamW steps, each the median over rounds of one AdamW step, one plain step, one timed step."""
    model = load(cell, weights, CPU)
    adamw, filtered = (start(cell, name, model, CPU) for name in ("adamw", method))
    for name, running in (("adamw", adamw), (method, filtered)):
        first_step(name, running)
        running.step()
    plain, parts, calls = [], [], {}
    end = time.perf_counter() + seconds
    while len(plain) < 3 or (time.perf_counter() < end and len(plain) < MAX_ROUNDS):
        unit, whole = span(adamw.step), span(filtered.step)
        with clocked() as clock:
            filtered.step()
        plain.append(whole / unit)
        parts.append({part: taken / unit for part, taken in clock.seconds.items()})
        calls = clock.calls
    medians = {part: statistics.median(one[part] for one in parts) for part in PARTS}
    return {"rounds": len(plain), "whole": statistics.median(plain), "parts": medians, "calls": calls}


def span(step: Callable[[], None]) -> float:
    """Seconds of a step that follows an untimed one, so that it starts with its own caches."""
    step()
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def render(cells: dict[str, dict[str, Any]]) -> list[str]:
    """A table for each model."""
    header = ["", "whole", "target", "floor", *(f"{part}" for part in PARTS), "passes forward, backward"]
    lines = [LEGEND, ""]
    for model in MODELS:
        rows = [_row(key, cell) for key, cell in sorted(cells.items(), key=_order) if key.startswith(f"{model}/")]
        if rows:
            lines += [f"## {model}", "", *markdown_table(header, rows), ""]
    return lines


def _order(item: tuple[str, Any]) -> tuple[int, int, int]:
    cell, method = _parse(item[0])
    return CURVATURES.index(method), cell.outputs, cell.batch


def _parse(key: str) -> tuple[Cell, str]:
    name, _, method = key.rpartition("/")
    return Cell.of(name), method


def _row(key: str, measured: dict[str, Any]) -> list[str]:
    cell, method = _parse(key)
    parts, calls = measured["parts"], measured["calls"]
    bound = TARGETS[method].get((cell.batch, cell.outputs))
    return [
        f"{method}, B={cell.batch} m={cell.outputs}",
        number(measured["whole"]),
        "–" if bound is None else f"{bound:g}",
        number(sum(parts[part] for part in FLOOR)),
        *(number(parts[part]) for part in PARTS),
        f"{calls[FORWARD]}, {calls[BACKWARD]}",
    ]


LEGEND = (
    "AdamW step = 1. Whole: a step without clocks. Floor: its forward and backward passes, run by torch. A pass carries"
    " one direction of every row of a batch, in which small batches are repeated, so that few passes may carry many"
    " directions. Rows: per-example gradients from cotangents, and their place. The rest: checks, whitening, seeds of"
    " the passes, records."
)


def main() -> None:
    """The command line."""
    command = Command(__doc__, threads=2).names("--models", MODELS, ("bert-64", "bert-tiny"), "models")
    command.names("--methods", CURVATURES, text="curvatures").numbers("--batches", (1, 16), "batch sizes")
    command.numbers("--outputs", (10, 100), "numbers of outputs")
    command.option("--seconds", type=float, default=5.0, help="for the rounds of a cell, at least three (%(default)s)")
    args = command.redo().table().parse()
    file = ResultFile("profile")
    if not args.table:
        cells = [Cell(model, size, m) for model in args.models for m in args.outputs for size in args.batches]
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
            weights = Weights(Path(folder), CPU)

            def measured(cell: Cell, method: str) -> dict[str, Any]:
                return profile(cell, method, weights.file(cell), args.seconds)

            work = {
                f"{cell.key}/{method}": partial(measured, cell, method) for cell in cells for method in args.methods
            }
            run_cells(file, work, args.redo)
    print(file.write_markdown("Where the time of a step goes", render(file.cells)))


if __name__ == "__main__":
    main()
