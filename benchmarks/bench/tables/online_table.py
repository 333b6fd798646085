"""Results of the online bench as Markdown: LoKO's Tables 1 to 3, its claim, and every data set in detail."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from benchmarks.bench import online
from benchmarks.bench.registry.optimizers import Row, text_of
from benchmarks.bench.registry.problems import Problem
from benchmarks.bench.scores import WINDOW
from benchmarks.bench.selection import Cells
from benchmarks.bench.tables.entries import Entry, by_criterion, entries, seeds_of
from benchmarks.common.result_files import markdown_table

LOKO, BASELINES, OURS = ("loko_lora", "loko_conv"), ("adamw", "adagrad"), "default"
LEGEND = (
    "One pass over each stream, batch size 1, mean ± sd over {seeds} seeds; a seed draws the stream, its order"
    " and what is new in the network. All rows of a column share streams and starts, and each tuned row tried"
    " {budget} settings on one tuning stream that no seed's stream and no held-out example is part of; best there"
    " by its *online* log loss, and by the *final* log loss on further examples. Accuracy online: of each example"
    " before it is learned from, averaged over the stream (LoKO's measure). A run that diverged is marked"
    " div@step; what was left of its stream counts as wrong."
)
DETAILS = (
    "Held out: after the pass; filters predict with their posterior, the others by softmax. In [ ] beside the ECE"
    " (15 bins): what a calibrated model with these confidences would show in 95 % of samples of this size. Steps:"
    " until the moving average of the loss over {window} examples is down to that of AdamW in the last quarter of"
    " its stream, mean over the seeds that came there (how many). Cost: time of a step over that of AdamW steps"
    " timed in the same process before and after; processor (wall). State: what is kept besides the model."
)
VERDICT = (
    "Each of the three stands here with whichever of its two choices does better on the streams themselves, which"
    " favours them; our default is not tuned. LoKO is the best of the three on {loko} of {total}; our default is at"
    " least equal to the best of the three on {ours} of {total}. The standard error is that of the seeds' paired"
    " differences."
)


def render(cells: Cells, rows: Sequence[Row], problems: Sequence[Problem]) -> list[str]:
    """Body of the Markdown file."""
    by_problem = {
        problem.name: {row.name: entries(cells, problem, row, online.CRITERIA) for row in rows} for problem in problems
    }
    problems = [problem for problem in problems if any(by_problem[problem.name].values())]
    every = [entry for of_rows in by_problem.values() for some in of_rows.values() for entry in some]
    budget = max((len(row.grid) for row in rows), default=0)
    lines = [LEGEND.format(seeds=seeds_of(every), budget=budget), "", DETAILS.format(window=WINDOW), ""]
    if not problems:
        return [*lines, "No results yet."]
    main = [problem for problem in problems if not problem.extra]
    lines += ["## Average online accuracy", "", *_matrix(by_problem, rows, problems), ""]
    lines += ["## LoKO's claim, and this package's default", "", *_claim(by_problem, main), ""]
    others = [problem for problem in problems if problem.extra]
    if others:
        lines += ["The same on further networks:", "", *_claim(by_problem, others), ""]
    lines += ["![Average online accuracy and loss against steps]({stem}.png)", ""]
    for problem in problems:
        lines += _details(by_problem[problem.name], problem)
    return lines


def level(adamw: Entry | None) -> float | None:
    """AdamW's mean loss over the last quarter of its stream and over seeds; None without a complete run."""
    if adamw is None or adamw.diverged:
        return None
    curves = [cell["curve"]["loss"] for cell in adamw.cells.values()]
    return statistics.mean(statistics.mean(curve[-max(1, len(curve) // 4) :]) for curve in curves)


def steps_to(entry: Entry, loss: float | None) -> str:
    """Steps until the moving average reaches a loss: mean over the seeds that reach it, and their number."""
    if loss is None:
        return "–"
    reached = []
    for cell in entry.cells.values():
        curve = cell["curve"]
        reached += [s for s, value in zip(curve["steps"], curve["loss"], strict=True) if s >= WINDOW and value <= loss][
            :1
        ]
    return (
        f"{statistics.mean(reached):.0f} ({len(reached)}/{len(entry.cells)})"
        if reached
        else f"– (0/{len(entry.cells)})"
    )


def _matrix(
    by_problem: dict[str, dict[str, list[Entry]]], rows: Sequence[Row], problems: Sequence[Problem]
) -> list[str]:
    """Rows by problems, in percent; the best of a column is bold."""
    chosen = {p.name: {r.name: by_criterion(by_problem[p.name][r.name], "online") for r in rows} for p in problems}
    best = {
        p.name: max((e.mean("online_accuracy") or 0.0 for e in chosen[p.name].values() if e is not None), default=0.0)
        for p in problems
    }
    lines = []
    for row in rows:
        texts = [_percent(chosen[p.name][row.name], best[p.name]) for p in problems]
        if set(texts) != {"–"}:
            lines.append([row.title, *texts])
    return markdown_table(["%", *(problem.title for problem in problems)], lines)


def _percent(entry: Entry | None, best: float) -> str:
    if entry is None:
        return "–"
    values = [100 * cell["online_accuracy"] for cell in entry.cells.values()]
    text = f"{statistics.mean(values):.1f}"
    text = f"**{text}**" if statistics.mean(values) / 100 >= best else text
    text += f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return text + (f" (div {len(entry.diverged)}/{len(values)})" if entry.diverged else "")


def _claim(by_problem: dict[str, dict[str, list[Entry]]], problems: Sequence[Problem]) -> list[str]:
    """The best of LoKO, AdamW and AdaGrad on each problem, beside this package's default."""
    lines, at_least, loko_best, complete = [], 0, 0, 0
    for problem in problems:
        of = by_problem[problem.name]
        three = [entry for name in (*LOKO, *BASELINES) for entry in of.get(name, [])]
        if len({entry.row.name for entry in three}) < 3 or not of.get(OURS):
            continue
        best, ours = max(three, key=_accuracy), of[OURS][0]
        mean, error = _difference(ours, best)
        complete, at_least = complete + 1, at_least + (mean >= 0)
        loko_best += best.row.name in LOKO
        groups = (LOKO, *((name,) for name in BASELINES))
        each = [max((entry for entry in three if entry.row.name in names), key=_accuracy) for names in groups]
        spread = "" if math.isnan(error) else f" ± {error:.1f}"
        texts = [f"{100 * _accuracy(entry):.1f}" for entry in (*each, ours)]
        lines.append([problem.title, *texts, f"{best.row.title} ({text_of(best.choice)})", f"{mean:+.1f}{spread}"])
    if not lines:
        return ["Not all of the rows are there."]
    header = ["%", "LoKO", "AdamW", "AdaGrad", "our default", "best of the three", "ours − best ± se"]
    verdict = VERDICT.format(loko=loko_best, ours=at_least, total=complete)
    return [*markdown_table(header, lines), "", verdict]


def _accuracy(entry: Entry) -> float:
    return entry.mean("online_accuracy") or 0.0


def _difference(first: Entry, second: Entry) -> tuple[float, float]:
    """Mean difference of online accuracy in points over the seeds that both have, and its standard error."""
    seeds = sorted(set(first.cells) & set(second.cells))
    gaps = [100 * (first.cells[s]["online_accuracy"] - second.cells[s]["online_accuracy"]) for s in seeds]
    return statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan


def _details(by_row: dict[str, list[Entry]], problem: Problem) -> list[str]:
    """All numbers of a problem, a line for each chosen setting."""
    flat = [entry for some in by_row.values() for entry in some]
    cell = next(iter(flat[0].cells.values()))
    loss = level(by_criterion(by_row.get("adamw", []), "online"))
    size = f"Stream of {cell['stream']:,}, tuning stream of {cell['sizes'][1]:,}, {cell['heldout']:,} held out."
    reached = "" if loss is None else f" AdamW's loss in its last quarter: {loss:.3f} nats."
    header = ["", "chosen by", "setting", "online accuracy", "online loss", "held-out accuracy", "NLL"]
    header += ["ECE [null band]"]
    header += ["steps", "cost (wall)", "state KiB", "adapter"]
    return [
        f"## {problem.title}",
        "",
        f"{size}{reached}",
        "",
        *markdown_table(header, [_line(entry, loss) for entry in flat]),
        "",
    ]


def _line(entry: Entry, loss: float | None) -> list[str]:
    some = next(iter(entry.cells.values()))
    low, high = entry.mean("ece_null_low"), entry.mean("ece_null_high")
    band = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    cost = f"{entry.cost('milliseconds', 'adamw_milliseconds')} ({entry.cost('wall', 'adamw_wall')})"
    return [
        entry.row.title,
        ", ".join(entry.criteria) if entry.row.tuned else "–",
        text_of(entry.choice),
        entry.text("online_accuracy"),
        entry.text("online_log_loss"),
        entry.text("accuracy"),
        entry.text("nll"),
        f"{entry.text('ece')}{band}",
        steps_to(entry, loss),
        cost,
        f"{some['state_bytes'] / 1024:,.0f}",
        f"{some['adapter']}, {some['parameters']:,}",
    ]
