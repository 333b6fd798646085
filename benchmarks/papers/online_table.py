"""The results of ``online.py`` as Markdown: a row for each learner, and each filter against the best AdamW."""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.common.result_files import markdown_table, mean_sd

Cells = Mapping[str, Mapping[str, Any]]

NAMES = {
    "frozen": "frozen",
    "loko": "LoKO (`KalmanConfig.loko()`)",
    "default": "**default (`KalmanConfig()`)**",
    "diagonal": "default, but diagonal",
    "truncated": "default, but truncated curvature (ε = 1e-3)",
    "sampled": "default, but sampled curvature (K = 1)",
}
LEGEND = (
    "One pass, batch size 1, mean ± sd over {seeds}. Online: before each example's update. Held out: after the pass,"
    " {heldout}; filters predict with `posterior.predict_loader` (linearized), the others with softmax. In [ ] beside"
    " the ECE (15 bins): what a perfectly calibrated model with these confidences would show in 95 % of samples of this"
    " size. Cost: processor seconds per step, whole pass, one thread, over those of AdamW steps timed in the same"
    " process before and after the row. * best AdamW by mean online accuracy, chosen after the fact."
)
HELDOUT = {
    "usps": "USPS's 2,007 test images",
    "digits": "600 of UCI's 1,797 digits, another split for each seed",
    "sst2": "SST-2's 872 development sentences, classifier drawn afresh",
    "kmnist": "2,000 of KMNIST's 10,000 test images, another split for each seed, classifier drawn afresh",
}


def render(cells: Cells, rows: Sequence[str], data: str) -> list[str]:
    """Body of the Markdown file."""
    seeds = sorted({key.rpartition("/")[2] for key in cells}, key=int)
    best = best_adamw(cells)
    steps = max((cell["steps"] for cell in cells.values()), default=0)
    legend = LEGEND.format(seeds=f"{len(seeds)} seeds" if len(seeds) != 1 else "1 seed", heldout=HELDOUT[data])
    header = ["", "online accuracy", "online log loss", "held-out accuracy", "NLL", "ECE [null band]", "cost"]
    lines = [f"Stream of {steps:,} examples. {legend}", ""]
    lines += markdown_table(header, [_line(cells, row, row == best) for row in rows if _seeds(cells, row)])
    if best is None:
        return lines
    compared = [row for row in rows if not row.startswith(("adamw", "frozen")) and _seeds(cells, row)]
    lines += ["", f"## Against {_name(best)}, the same streams", "", *_comparison(cells, compared, best), "", FOOT]
    return lines


FOOT = (
    "Difference of online accuracy, its standard error over seeds; examples of the streams that only one of the two got"
    " right, summed over seeds, and z = (first − second) / √(first + second). The same images come again under other"
    " seeds, so z is larger than it would be for independent examples."
)


def best_adamw(cells: Cells) -> str | None:
    """The AdamW row with the highest mean online accuracy among those with the most seeds."""
    rows = sorted({key.rpartition("/")[0] for key in cells if key.startswith("adamw")})
    if not rows:
        return None
    most = max(len(_seeds(cells, row)) for row in rows)
    complete = [row for row in rows if len(_seeds(cells, row)) == most]
    return max(complete, key=lambda row: statistics.mean(c["online_accuracy"] for c in _seeds(cells, row).values()))


def _line(cells: Cells, row: str, best: bool) -> list[str]:
    measured = list(_seeds(cells, row).values())
    refused = [cell["diverged_at"] for cell in measured if "cause" in cell]
    name = _name(row) + (" *" if best else "")
    online = [mean_sd([c[k] for c in measured if c[k] is not None]) for k in ("online_accuracy", "online_log_loss")]
    if refused:
        online[0] += f" (div@{min(refused)}, {len(refused)}/{len(measured)})"
    band = f"[{_mean(measured, 'ece_null_low'):.3f}, {_mean(measured, 'ece_null_high'):.3f}]"
    cost = f"{statistics.mean(c['milliseconds'] / c['adamw_milliseconds'] for c in measured):.2f}"
    scores = [mean_sd([c[k] for c in measured]) for k in ("accuracy", "nll", "ece")]
    return [name, *online, *scores[:2], f"{scores[2]} {band}", cost]


def _comparison(cells: Cells, rows: Sequence[str], best: str) -> list[str]:
    """Each row against the best AdamW, on the seeds that both have and on which neither diverged."""
    lines = []
    for row in rows:
        ours, theirs = _seeds(cells, row), _seeds(cells, best)
        shared = [s for s in sorted(ours) if s in theirs and "cause" not in ours[s] and "cause" not in theirs[s]]
        if not shared:
            continue
        differences = [ours[s]["online_accuracy"] - theirs[s]["online_accuracy"] for s in shared]
        pairs = [(_correct(ours[s]), _correct(theirs[s])) for s in shared]
        first = sum(int((a & ~b).sum()) for a, b in pairs)
        second = sum(int((b & ~a).sum()) for a, b in pairs)
        z = (first - second) / math.sqrt(max(1, first + second))
        error = statistics.stdev(differences) / math.sqrt(len(shared)) if len(shared) > 1 else math.nan
        spread = f" ± {error:.4f}" if len(shared) > 1 else ""
        difference = f"{statistics.mean(differences):+.4f}{spread}"
        lines.append([_name(row), difference, str(len(shared)), str(first), str(second), f"{z:+.1f}"])
    return markdown_table(["", "difference ± se", "seeds", "only this right", "only AdamW right", "z"], lines)


def _correct(cell: Mapping[str, Any]) -> np.ndarray:
    """Whether each example was predicted correctly, (T,) bool."""
    bits = np.frombuffer(base64.b64decode(cell["correct"]), dtype=np.uint8)
    return np.unpackbits(bits, count=cell["steps"]).astype(bool)


def _mean(measured: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.mean(cell[key] for cell in measured)


def _name(row: str) -> str:
    return NAMES.get(row) or f"AdamW {row.removeprefix('adamw-')}"


def _seeds(cells: Cells, row: str) -> dict[str, Mapping[str, Any]]:
    """The cells of a row, by seed."""
    return {key.rpartition("/")[2]: cell for key, cell in cells.items() if key.rpartition("/")[0] == row}
