"""The results of ``lenet.py`` as Markdown: a column for each p₀, a row for each noise model and form."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common.result_files import markdown_table, mean_sd

Cells = Mapping[str, Mapping[str, Any]]

LOW = 0.15  # online accuracy below which a pass that finished counts as failed
NAMES = {"diagonal": "gain", "diagonal_information": "information", "diagonal_mixed": "mixed"}
NOISE_NAMES = {
    "ema_taylor": "EMA, eq. 12 (LoKO)",
    "ema_residual": "EMA, eq. 7",
    "exponential_family": "exponential family",
    "identity": "identity",
    "decaying": "exp(−k/50) I",
    "ours": "**ours**",
}
BASELINES = {
    "frozen": "frozen",
    "adamw": "AdamW, weight decay 1e-2",
    "adamw-decay": "AdamW, linear decay, weight decay 1e-4 (the paper's)",
    "adagrad": "AdaGrad (the paper's rate is 0.001)",
    "default": "**`KalmanConfig()`**",
}
LEGEND = (
    "Average online accuracy over the first {limit:,} examples of a seeded permutation of MNIST's training set, batch"
    " size 1, pixels in [−1, 1]; LeNet-5 with ReLU and max-pooling, 61,706 parameters, all trained from {init}."
    " Papers' rows: likelihood expanded at the prior mean, no damping, covariance as it is. **ours**:"
    " exponential-family noise, expanded at the mode, damped, p₀ as given. Several seeds: mean ± sd.",
    "`div@k`: update k was refused (cause in the JSON and below), and the state before it kept; with several seeds,"
    " (d/s) says how many of them, and k is the first. † diverged by accuracy: below {low}, with a higher log loss than"
    " the frozen network's; where after 300 examples the accuracy was below {low} and the log loss of the last 100"
    " above 2 ln 10, the pass was stopped there. ‡ below {low}, but no worse a log loss than the frozen network's: at"
    " chance, because it has hardly learned (small p₀ or rate) or has collapsed to the class frequencies (large)."
    " ms: processor milliseconds per step, median of the row.",
    "Every state that an update returned or a refused one kept, and every score, was checked: a NaN or an infinity in"
    " one would have stopped the script.",
)


def render(cells: Cells, limit: int, init: str) -> list[str]:
    """Body of the Markdown file; a cell that was not run is a dash."""
    lines = [line for text in LEGEND for line in (text.format(limit=limit, init=init, low=LOW), "")]
    for rule, title in (("constant", "p₀ constant"), ("uniform", "p₀ ~ Uniform(0, ·)")):
        lines += [f"## {title}", "", *_grid(cells, rule, init), ""]
    lines += ["## Without p₀", "", *_baselines(cells, init), ""]
    lines += ["## LoKO's setting by initialization", "", "Equation 12, gain form.", "", *_inits(cells), ""]
    return [*lines, *_notes(cells, init)]


def _grid(cells: Cells, rule: str, init: str) -> list[str]:
    """The table of one rule: a row for each noise model and form."""
    rows = [(noise, form) for noise in NOISE_NAMES for form in NAMES]
    values = _values(cells, lambda row: row.endswith(f"/{rule}"))
    return markdown_table(
        ["noise", "form", *values, "ms"],
        [[NOISE_NAMES[n], NAMES[f], *_line(cells, f"{n}/{f}/{rule}", values, init)] for n, f in rows],
    )


def _inits(cells: Cells) -> list[str]:
    """LoKO's noise model and form, for every initialization of the network."""
    inits = sorted({key.split("/")[-2] for key in cells if key.startswith("ema_taylor/diagonal/")}, reverse=True)
    values = _values(cells, lambda row: row.startswith("ema_taylor/diagonal/"))
    rows = [(rule, init) for rule in ("constant", "uniform") for init in inits]
    return markdown_table(
        ["rule", "weights", *values, "ms"],
        [[rule, init, *_line(cells, f"ema_taylor/diagonal/{rule}", values, init)] for rule, init in rows],
    )


def _baselines(cells: Cells, init: str) -> list[str]:
    """Rows with a learning rate, and rows without a setting."""
    rates = _values(cells, lambda row: row in ("adamw", "adagrad"))
    columns = rates or [""]
    rows = []
    for row, name in BASELINES.items():
        *texts, time = _line(cells, row, columns if row.startswith("ad") else ["0"], init)
        rows.append([name, *texts, *[""] * (len(columns) - len(texts)), time])
    return markdown_table(["", *columns, "ms"], rows)


def _line(cells: Cells, row: str, values: Sequence[str], init: str) -> list[str]:
    """The cells of a row, and its median time per step."""
    by_value = [_seeds(cells, row, value, init) for value in values]
    times = [cell["milliseconds"] for seeds in by_value for cell in seeds if cell["steps"] > 0]
    return [*(_text(seeds, cells, init) for seeds in by_value), f"{statistics.median(times):.1f}" if times else "–"]


def _text(seeds: list[Mapping[str, Any]], cells: Cells, init: str) -> str:
    """One cell of the table: mean and sd over seeds, or the first divergence."""
    diverged = [cell["diverged_at"] for cell in seeds if "cause" in cell]
    if diverged:
        return f"div@{min(diverged)}" + (f" ({len(diverged)}/{len(seeds)})" if len(seeds) > 1 else "")
    mark = "" if not seeds else _mark(seeds, cells, init)
    return mean_sd([cell["accuracy"] for cell in seeds]) + mark


def _mark(seeds: Sequence[Mapping[str, Any]], cells: Cells, init: str) -> str:
    """† or ‡ for passes that end with low accuracy; else nothing."""
    if statistics.mean(cell["accuracy"] for cell in seeds) >= LOW:
        return ""
    frozen = _seeds(cells, "frozen", "0", init)
    bar = statistics.mean(cell["log_loss"] for cell in frozen) if frozen else math.log(10)
    return "†" if statistics.mean(cell["log_loss"] for cell in seeds) > bar else "‡"


def _notes(cells: Cells, init: str) -> list[str]:
    """Counts of failures, and the causes of divergences."""
    filters = {key: cell for key, cell in cells.items() if key.count("/") == 5 and f"/{init}/" in key}
    lines = ["## Failures", ""]
    for title, chosen in (
        ("papers' rows", {k: c for k, c in filters.items() if not k.startswith("ours/")}),
        ("ours", {k: c for k, c in filters.items() if k.startswith("ours/")}),
    ):
        marks = [_mark([cell], cells, init) for cell in chosen.values() if "cause" not in cell]
        refused = sum("cause" in cell for cell in chosen.values())
        lines.append(
            f"- {title}: {len(chosen)} passes, {refused} refused (div), {marks.count('†')} diverged by accuracy (†),"
            f" {marks.count('‡')} at chance (‡)."
        )
    return [*lines, *_causes(filters)]


def _causes(filters: Cells) -> list[str]:
    """Causes of refused updates, numbers left out, with their counts."""
    counts: dict[str, int] = {}
    for cell in filters.values():
        if "cause" in cell:
            words = " ".join(w for w in str(cell["cause"]).split() if not w.isdigit())
            counts[words] = counts.get(words, 0) + 1
    return [f"- refused, {count} times: {words}" for words, count in sorted(counts.items(), key=lambda item: -item[1])]


def _seeds(cells: Cells, row: str, value: str, init: str) -> list[Mapping[str, Any]]:
    """The cells of all seeds for one row, value and initialization."""
    prefix = f"{row}/{value}/{init}/"
    return [cell for key, cell in cells.items() if key.startswith(prefix)]


def _values(cells: Cells, wanted: Any) -> list[str]:
    """Values of p₀, or learning rates, of the wanted rows, ascending, as in the keys."""
    values = {key.split("/")[-3] for key in cells if wanted("/".join(key.split("/")[:-3]))}
    return sorted(values, key=float)
