"""Results of the optimizer bench as Markdown: losses and gradient norms after every epoch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.bench import epochs
from benchmarks.bench.registry.optimizers import Row, text_of
from benchmarks.bench.registry.problems import Problem
from benchmarks.bench.selection import Cells
from benchmarks.bench.tables.entries import Entry, by_criterion, entries, seeds_of
from benchmarks.common.result_files import markdown_table, mean_sd

LEGEND = (
    "{epochs} epochs in batches of {batch}, mean ± sd over {seeds} seeds; a seed draws the training set, its"
    " orders and what is new in the network. All rows share data, orders and starts, and each tuned row tried"
    " {budget} settings for as many epochs on a training set of its own, disjoint from all others; best there by"
    " the mean of the training loss after each epoch (*train*), and by the log loss on further examples in the end"
    " (*final*). Losses and the norm of the training loss's gradient are those of the point (a filter's mean); NLL"
    " and ECE are those of predictions, a filter's by its posterior. A filter counts no example twice: its first"
    " epoch is the filter's pass, in later ones only its mean moves, by natural-gradient steps under the"
    " covariance that the first left. A run that diverged is marked div@epoch. Epochs to level: until the training"
    " loss is down to AdamW's in the end (how many seeds came there). Cost: time of a step over AdamW's in the"
    " same process; processor (wall)."
)


def render(cells: Cells, rows: Sequence[Row], problems: Sequence[Problem]) -> list[str]:
    """Body of the Markdown file."""
    by_problem = {
        problem.name: {row.name: entries(cells, problem, row, epochs.CRITERIA) for row in rows} for problem in problems
    }
    every = [entry for of_rows in by_problem.values() for some in of_rows.values() for entry in some]
    if not every:
        return ["No results yet."]
    number = len(next(iter(every[0].cells.values()))["train_loss"]) - 1
    budget = max(len(row.grid) for row in rows)
    text = LEGEND.format(epochs=number, batch=epochs.BATCH, seeds=seeds_of(every), budget=budget)
    lines = [text, "", "![Training loss, test loss and gradient norm by epoch]({stem}.png)", ""]
    for problem in problems:
        flat = [entry for some in by_problem[problem.name].values() for entry in some]
        if flat:
            lines += _problem(problem, flat, by_criterion(by_problem[problem.name].get("adamw", []), "train"))
    return lines


def _problem(problem: Problem, flat: Sequence[Entry], adamw: Entry | None) -> list[str]:
    cell = next(iter(flat[0].cells.values()))
    level = None if adamw is None or adamw.diverged else statistics.mean(_last(adamw, "train_loss"))
    size = f"{cell['stream']:,} training and {cell['heldout']:,} test examples, {cell['parameters']:,} parameters"
    reached = "" if level is None else f"; AdamW's training loss in the end: {level:.4f}"
    header = ["", "chosen by", "setting", "train loss", "test loss", "gradient norm", "largest norm", "test accuracy"]
    header += ["NLL", "ECE [null band]", "epochs to level", "cost (wall)", "state KiB"]
    return [
        f"## {problem.title}",
        "",
        f"{size}{reached}.",
        "",
        *markdown_table(header, [_line(entry, level) for entry in flat]),
        "",
    ]


def _line(entry: Entry, level: float | None) -> list[str]:
    some = next(iter(entry.cells.values()))
    low, high = entry.mean("ece_null_low"), entry.mean("ece_null_high")
    band = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    largest = [max(cell["gradient_norm"][1:]) for cell in entry.cells.values() if "cause" not in cell]
    diverged = f" (div@{min(entry.diverged)}, {len(entry.diverged)}/{len(entry.cells)})" if entry.diverged else ""
    return [
        entry.row.title,
        ", ".join(entry.criteria) if entry.row.tuned else "–",
        text_of(entry.choice),
        mean_sd(_last(entry, "train_loss"), 4) + diverged,
        mean_sd(_last(entry, "test_loss")),
        mean_sd(_last(entry, "gradient_norm")),
        mean_sd(largest, 2),
        entry.text("accuracy"),
        entry.text("nll"),
        f"{entry.text('ece')}{band}",
        _epochs_to(entry, level),
        f"{entry.cost('milliseconds', 'adamw_milliseconds')} ({entry.cost('wall', 'adamw_wall')})",
        f"{some['state_bytes'] / 1024:,.0f}",
    ]


def _last(entry: Entry, name: str) -> list[float]:
    """Mean ± sd after the last epoch, over the seeds that did not diverge."""
    return [cell[name][-1] for cell in entry.cells.values() if "cause" not in cell]


def _epochs_to(entry: Entry, level: float | None) -> str:
    if level is None:
        return "–"
    reached = []
    for cell in entry.cells.values():
        reached += [epoch for epoch, loss in enumerate(cell["train_loss"]) if epoch and loss <= level][:1]
    return (
        f"{statistics.mean(reached):.1f} ({len(reached)}/{len(entry.cells)})"
        if reached
        else f"– (0/{len(entry.cells)})"
    )
