"""How much the prior variance matters: p₀ from 0.01 to 100,000, under this package's defaults.

LeNet-5 learns MNIST from scratch (1,000 examples), and the digit transformer with LoRA learns UCI's digits, one example
at a time, with ``KalmanConfig(initial_variance=p0)``: once with the bounds that it puts on a prior too wide for its
linearization, once without (``bound_prior=False``). Final accuracy is that of the last 200 examples, before each is
learned from. MNIST is read from ../shared/data or $BAYES_KF_DATA.

    python benchmarks/prior_width.py                 # everything; a stopped run goes on where it was
    python benchmarks/prior_width.py --data digits   # one stream
    python benchmarks/prior_width.py --table         # print what is there
"""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

import bayes_kf as bkf
from bayes_kf.data import uci_digits_split
from bayes_kf.models.zoo import lenet5, lora_digits_vit
from benchmarks.common.data import mnist
from benchmarks.common.learners import Stream, kalman_pass
from benchmarks.common.result_files import ResultFile, markdown_table

VARIANCES = tuple(10.0**k for k in range(-2, 6))
LAST = 200
TITLES = {"lenet": "LeNet-5 on MNIST, from scratch, 1,000 examples", "digits": "LoRA on UCI's digits, 1,197 examples"}


def problem(data: str, seed: int) -> tuple[nn.Module, Stream]:
    """A model at its start, and what it learns."""
    if data == "digits":
        return lora_digits_vit(rank=4, seed=seed), Stream(*uci_digits_split(seed=seed)[0])
    images = mnist("train")
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(seed))[:1000]
    return lenet5(seed=seed), Stream(images.images[order], images.labels[order])


def measure(data: str, variance: float, bound: bool, seed: int) -> dict[str, Any]:
    """A pass, or what there was of it."""
    model, stream = problem(data, seed)
    config = bkf.KalmanConfig(initial_variance=variance, bound_prior=bound, seed=seed)
    with warnings.catch_warnings(action="ignore"):
        found = kalman_pass(model, stream, config)
    kept: dict[str, Any] = {"steps": len(found.correct)}
    if found.cause is not None:
        return kept | {"diverged_at": found.diverged_at, "cause": found.cause}
    means = {"accuracy": found.correct, "final": found.correct[-LAST:], "log_loss": found.log_loss}
    return kept | {name: values.double().mean().item() for name, values in means.items()}


def render(cells: dict[str, dict[str, Any]]) -> list[str]:
    """Body of the Markdown file."""
    lines = ["Average online accuracy, and in ( ) that of the last 200 examples. `div@k`: update k was refused."]
    for data, title in TITLES.items():
        rows = []
        for bound, name in ((True, "as `KalmanConfig` has it"), (False, "`bound_prior=False`")):
            found = [cells.get(f"{data}/{variance:g}/{'bounded' if bound else 'given'}/0") for variance in VARIANCES]
            if any(found):
                rows.append([name, *[_cell(cell) for cell in found]])
        if rows:
            lines += ["", f"## {title}", "", *markdown_table(["p₀", *[f"{v:g}" for v in VARIANCES]], rows)]
    return lines


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    return f"div@{cell['diverged_at']}" if "cause" in cell else f"{cell['accuracy']:.3f} ({cell['final']:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--redo", action="store_true", help="measure again what is already there")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = ResultFile("prior_width")
    if not args.table:
        file.begin()
        places = list(itertools.product((True, False), args.data, VARIANCES))
        for bound, data, variance in tqdm(places, unit="pass", disable=not sys.stderr.isatty()):
            key = f"{data}/{variance:g}/{'bounded' if bound else 'given'}/0"
            if args.redo or key not in file.cells:
                file.put(key, measure(data, variance, bound, 0))
                tqdm.write(f"{key}: {_cell(file.cells[key])}", file=sys.stderr)
    print(file.write_markdown("How much the prior variance matters", render(file.cells)))


if __name__ == "__main__":
    main()
