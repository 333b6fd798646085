"""Results of ``run.py`` as Markdown and as a figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.common.result_files import markdown_table
from benchmarks.speed import tokens
from benchmarks.speed.measure import Cell
from benchmarks.speed.models import MODELS
from benchmarks.speed.peers import METHODS

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

Cells = Mapping[str, Mapping[str, Any]]

TARGETS: dict[str, dict[tuple[int, int], float]] = {  # method -> (B, m) -> AdamW steps, on 2-layer transformers
    "exact": {(1, 10): 2.2, (1, 100): 14.0, (16, 10): 5.5, (16, 100): 45.0},
    "truncated": {(1, 10): 2.2, (1, 100): 4.0, (16, 10): 5.5, (16, 100): 10.0},
    "sampled": {(1, 10): 1.6, (1, 100): 1.6, (16, 10): 1.7, (16, 100): 1.7},
}
TARGET_MODEL = "bert-tiny"  # of ratios to peers and memory
TARGET_MODELS = ("bert-64", "bert-tiny")
DESCRIPTIONS = {
    "bert-64": "a 2-layer BERT, hidden 64, 16 tokens, LoRA rank 4 on query and value",
    "bert-tiny": "a 2-layer BERT, hidden 128, 32 tokens, LoRA rank 8 on query and value",
    "vit-b16": "ViT-B/16 at 224 pixels, LoRA rank 8 on query",
    "roberta-base": "RoBERTa-base, 64 tokens, LoRA rank 4 on query and value",
}
AXES = {"m": "outputs m", "n": "trainable numbers n"}
SETTINGS = {"m": "bert-tiny, B = 16, LoRA rank 8", "n": "bert-tiny, B = 16, m = 10, LoRA rank 1 to 64"}
CURVES = {"exact": ("#1b6ca8", "o"), "sampled": ("#c8553d", "s")}  # method -> colour and marker
LEGEND = (
    "Whole steps, the filter's with a diagonal belief, on random weights with a trained last layer "
    "(`_speed_models.py` says how), the classifier trainable, evaluation mode, float32. Cost: a step's time over "
    "that of the AdamW step of the same round, median over interleaved rounds (three for steps of a second and "
    "more). Memory: peak of a warm step above what is held before it (weights, moments or belief; no gradients), "
    "each in a process of its own. laplace-torch only fits a covariance at a fixed mean and `jacrev` is a "
    "Jacobian without any conditioning, so both are less than a step. Attention is SDPA, but eager for "
    "posteriors, which is quicker with it; the other peers that map backward passes are not. ✓ and ✗: whether the"
    " target in brackets is met. Letters: why a method could not run."
)


def render(cells: Cells, picture: str) -> list[str]:
    """Body of the Markdown file, with the figure ``picture``."""
    lines = [LEGEND, ""]
    for model in MODELS:
        sizes = _sizes(cells, model)
        if sizes:
            lines += [f"## {model}: {DESCRIPTIONS[model]}", "", *_model(cells, model, sizes), ""]
    lines += _tokens(cells)
    lines += _targets(cells)
    lines += _scaling(cells, picture)
    versions = {METHODS[_last(k)].package: c["version"] for k, c in cells.items() if c.get("version")}
    if versions:
        lines += ["Peers: " + ", ".join(f"{name} {number}" for name, number in sorted(versions.items())) + "."]
    return lines


def _tokens(cells: Cells) -> list[str]:
    """The section on the tokens of a language model; empty without its cells."""
    sizes = sorted({int(key.split("/")[1][1:]) for key in cells if key.startswith("text/")})
    rows = []
    for method, (title, _) in tokens.METHODS.items():
        row = [title]
        for size in sizes:
            time, memory = (cells.get(tokens.key(size, what), {}) for what in ("time", f"memory/{method}"))
            base = cells.get(tokens.key(size, "memory/adamw"), {}).get("mib")
            own = memory.get("mib")
            row.append("–" if "ratio" not in time else number(time["ratio"][method]))
            row.append("–" if own is None else number(own) + (f" ({own / base:.2f})" if base else ""))
        rows.append(row)
    if not sizes:
        return []
    header = ["", *(text for size in sizes for text in (f"B={size} cost", f"B={size} MiB (AdamW = 1)"))]
    note = (
        f"SmolLM2-135M-Instruct (`benchmarks/speed/tokens.py`), sequences of {tokens.TOKENS} tokens of English, all"
        " learned, a vocabulary of 49,152, LoRA rank 8 on queries and values, one thread. Cost: AdamW step = 1, median"
        " over interleaved rounds. Memory: as above."
    )
    large = markdown_table(
        ["", "n", "base, GiB", "moments, GiB", "belief, GiB", "AdamW, s", "ours, s"], tokens.predicted()
    )
    arithmetic = (
        "Large models, by arithmetic and not measured: LoRA rank 8 on queries and values, a low-rank belief of rank"
        f" {tokens.BELIEF_RANK}, steps on {tokens.SEEN:,} tokens at {tokens.FLOPS / 1e12:g} TFLOP/s in bf16, one more"
        " forward pass for the check of the step. The memory of the base comes on top of that of moments or belief."
    )
    measured = ["## Tokens of a language model", "", note, "", *markdown_table(header, rows), ""]
    return [*measured, "## Tokens of large language models", "", arithmetic, "", *large, ""]


def _model(cells: Cells, model: str, sizes: Sequence[Cell]) -> list[str]:
    reasons: dict[str, str] = {}
    cost = _table(cells, sizes, lambda cell, method: _cost(cells, cell, method, reasons))
    memory = _table(cells, sizes, lambda cell, method: _memory(cells, cell, method, reasons))
    notes = [f"({letter}) {reason}" for reason, letter in reasons.items()]
    lines = ["Cost, AdamW step = 1:", "", *cost, "", "Peak extra memory, MiB:", "", *memory]
    return [*lines, "", "; ".join(notes) + "."] if notes else lines


def _table(cells: Cells, sizes: Sequence[Cell], text: Callable[[Cell, str], str]) -> list[str]:
    """A row for each measured method, a column for each size."""
    header = ["", *(f"B={cell.batch} m={cell.outputs:,}" for cell in sizes)]
    present = [m for m in METHODS if any(f"{cell.key}/memory/{m}" in cells for cell in sizes)]
    rows = [[METHODS[method].title, *(text(cell, method) for cell in sizes)] for method in present]
    if text(sizes[0], "adamw") == "1":
        rows.append(["AdamW, milliseconds", *(_fact(cells, c, lambda t: t["milliseconds"]["adamw"]) for c in sizes)])
        classes = [_fact(cells, c, lambda t: t["facts"]["truncated"]["kept_classes"]) for c in sizes]
        rows += [["classes that hold 1 − ε, mean", *classes]] if set(classes) != {"–"} else []
    return markdown_table(header, rows)


def _cost(cells: Cells, cell: Cell, method: str, reasons: dict[str, str]) -> str:
    ratio = cells.get(f"{cell.key}/time", {}).get("ratio", {}).get(method)
    if ratio is None:
        return _skipped(cells, cell, method, reasons)
    if method == "adamw":
        return "1"
    bound = TARGETS.get(method, {}).get((cell.batch, cell.outputs)) if cell.model in TARGET_MODELS else None
    return number(ratio) + ("" if bound is None else f" {_mark(ratio <= bound)} ({bound:g})")


def _memory(cells: Cells, cell: Cell, method: str, reasons: dict[str, str]) -> str:
    mib = cells.get(f"{cell.key}/memory/{method}", {}).get("mib")
    return _skipped(cells, cell, method, reasons) if mib is None else number(mib)


def _skipped(cells: Cells, cell: Cell, method: str, reasons: dict[str, str]) -> str:
    reason = cells.get(f"{cell.key}/memory/{method}", {}).get("skipped")
    if reason is None:
        return "–"
    reason = reason.rpartition(": ")[2] if reason.startswith("already") else reason
    return f"– ({reasons.setdefault(reason, chr(ord('a') + len(reasons)))})"


def _fact(cells: Cells, cell: Cell, take: Callable[[Mapping[str, Any]], float]) -> str:
    try:
        return number(take(cells[f"{cell.key}/time"]))
    except KeyError:
        return "–"


def _targets(cells: Cells) -> list[str]:
    """Statements about memory and other packages, each with its measured value."""
    big, small, huge = (Cell(TARGET_MODEL, 16, m).key for m in (100, 10, 50_000))

    def memory(key: str, method: str) -> float | None:
        return cells.get(f"{key}/memory/{method}", {}).get("mib")

    def time(key: str, method: str) -> float | None:
        return cells.get(f"{key}/time", {}).get("ratio", {}).get(method)

    peer, name = "laplace-diag", "laplace-torch diagonal, B=16 m=10"
    statements = [
        ("exact, B=16 m=100: memory over AdamW's", memory(big, "exact"), memory(big, "adamw"), 4.0, False),
        ("sampled, B=16 m=50,000: memory over AdamW's", memory(huge, "sampled"), memory(huge, "adamw"), 2.0, False),
        (f"{name}: time over exact's", time(small, peer), time(small, "exact"), 20.0, True),
        (f"{name}: memory over exact's", memory(small, peer), memory(small, "exact"), 50.0, True),
    ]
    rows = [
        [what, number(a / b), f"{'≥' if least else '≤'} {bound:g}", _mark(a / b >= bound if least else a / b <= bound)]
        for what, a, b, bound, least in statements
        if a is not None and b
    ]
    header = [f"{TARGET_MODEL}, ratio of", "measured", "target", "met"]
    return ["## Other targets", "", *markdown_table(header, rows), ""] if rows else []


def _scaling(cells: Cells, picture: str) -> list[str]:
    """The plotted numbers, and the growth of milliseconds over their upper half."""
    lines = []
    for axis, title in AXES.items():
        sizes, ratios = curves(cells, axis, "ratio")
        if not sizes:
            continue
        times = curves(cells, axis, "milliseconds")[1]
        header = [title, "AdamW, ms", *(f"{k}, {unit}" for k in CURVES for unit in ("ms", "AdamW = 1"))]
        columns = [times["adamw"], *(values[k] for k in CURVES for values in (times, ratios))]
        rows = [[f"{size:,}", *(number(column[i]) for column in columns)] for i, size in enumerate(sizes)]
        grown = [_slope(sizes, times["adamw"]), *(text for k in CURVES for text in (_slope(sizes, times[k]), ""))]
        rows.append(["exponent of growth, upper half", *grown])
        lines += [f"## Against {title}, {TARGET_MODEL}, B=16", "", *markdown_table(header, rows), ""]
    return [*lines, f"![Cost of a step against outputs and trainable numbers]({picture})", ""] if lines else []


def curves(cells: Cells, axis: str, field: str) -> tuple[list[int], dict[str, list[float]]]:
    """Sizes along an axis, and a field of each method's times there."""
    measured = [(key, cell) for key, cell in cells.items() if key.startswith(f"scaling-{axis}/")]
    points = sorted(
        ((int(key.split("/")[1]) if axis == "m" else cell["trainable"], cell[field]) for key, cell in measured),
        key=lambda point: point[0],
    )
    return [size for size, _ in points], {k: [f.get(k, math.nan) for _, f in points] for k in ("adamw", *CURVES)}


def plot(cells: Cells, path: Path) -> None:
    """Cost in AdamW steps against m and against n, two panels; no figure if neither was measured."""
    if not any(key.startswith("scaling-") for key in cells):
        return
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for panel, (axis, title) in zip(panels, AXES.items(), strict=True):
        sizes, ratios = curves(cells, axis, "ratio")
        for k, (colour, marker) in CURVES.items():
            panel.plot(sizes, ratios[k], color=colour, marker=marker, label=k)
        panel.axhline(1.0, color="0.3", linestyle="--", label="AdamW")
        panel.set(xscale="log", yscale="log", xlabel=title, title=SETTINGS[axis])
        panel.xaxis.set_minor_formatter(NullFormatter())  # they would overlap
        panel.grid(which="both", alpha=0.25)
    panels[0].set_ylabel("time of a step, AdamW step = 1")
    panels[0].legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _slope(sizes: Sequence[int], values: Sequence[float]) -> str:
    """The exponent between the middle point and the last."""
    middle = len(sizes) // 2
    if len(sizes) < 3 or not values[middle] > 0:
        return "–"
    return f"{math.log(values[-1] / values[middle]) / math.log(sizes[-1] / sizes[middle]):.2f}"


def _sizes(cells: Cells, model: str) -> list[Cell]:
    """The cells of a model that were measured, by outputs, then by batch."""
    keys = {key.rpartition("/memory/")[0] for key in cells if key.startswith(f"{model}/") and "/memory/" in key}
    return sorted((Cell.of(key) for key in keys), key=lambda cell: (cell.outputs, cell.batch))


def _last(key: str) -> str:
    return key.rpartition("/")[2]


def _mark(met: bool) -> str:
    return "✓" if met else "✗"


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
