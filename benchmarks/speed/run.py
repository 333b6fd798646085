"""Cost of a whole step, in AdamW steps on the same model and batch, and its memory, beside other packages.

Cells: B in 1, 16, 64 and m in 2, 10, 100, 1000 on two 2-layer BERTs (LoRA on query and value), ViT-B/16 (rank 8 on
query) and RoBERTa-base (rank 4 on query and value), made from configurations, with a trained classifier (``models.py``
says how it is trained). A step linearizes and conditions. Each round of a cell runs every method once; the table has
the medians of the rounds' ratios to AdamW. Memory is the peak of one warm step above the memory before it, in a process
of its own (Linux). A method whose step takes longer than `--cap` or more memory than `--memory-limit` is left out with
the reason, also in larger cells of the same model. Other packages need `pip install bayes-kf[bench]`.

    python -m benchmarks.speed.run                                      # everything; a stopped run continues
    python -m benchmarks.speed.run --models bert-tiny --batches 1 16 --outputs 10 --seconds 5
    python -m benchmarks.speed.run --models bert-tiny --redo 'B16/m100/(time|memory/exact)$'
    python -m benchmarks.speed.run --scaling                            # cost against m and n: results/speed.png
    python -m benchmarks.speed.run --device cuda                        # into files of its own
    python -m benchmarks.speed.run --table                              # the table from existing results
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from benchmarks.common.command import Command, is_due
from benchmarks.common.result_files import ResultFile
from benchmarks.speed.measure import Cell, Weights, memory_in_process, time_cell
from benchmarks.speed.models import MODELS
from benchmarks.speed.peers import METHODS, installed
from benchmarks.speed.table import plot, render

BATCHES = (1, 16, 64)
OUTPUTS = (2, 10, 100, 1000)
VOCABULARY = Cell("bert-tiny", 16, 50_000)  # outputs of a language model, for the methods that can
VOCABULARY_METHODS = ("adamw", "sampled")
SCALING_METHODS = ("adamw", "exact", "sampled")
SCALING_OUTPUTS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
SCALING_RANKS = (1, 2, 4, 8, 16, 32, 64)

print_err = functools.partial(tqdm.write, file=sys.stderr)


def parse() -> argparse.Namespace:
    """The options; AdamW is always measured, other methods only if their package is installed."""
    command = Command(__doc__, threads=2).names("--models", MODELS).names("--methods", METHODS)
    command.numbers("--batches", BATCHES, "batch sizes").numbers("--outputs", OUTPUTS, "numbers of outputs")
    command.option("--seconds", type=float, default=20.0, help="for the rounds after the first three (%(default)s)")
    command.option("--cap", type=float, default=60.0, help="seconds that a step may take (%(default)s)")
    command.option("--memory-limit", type=float, default=12.0, help="GiB that a method may allocate (%(default)s)")
    command.option("--device", default="cpu").option("--scaling", action="store_true", help="only cost against m and n")
    args = command.redo().table().parse()
    args.methods = [m for m in METHODS if m in {"adamw", *args.methods} and installed(m) is not None]
    return args


def main() -> None:
    """The command line."""
    args = parse()
    device = torch.device(args.device)
    parts = ["speed", device.type * (device.type != "cpu"), f"threads{args.threads}" * (args.threads != 2)]
    file = ResultFile("-".join(part for part in parts if part))
    if not args.table:
        file.begin()
        with tempfile.TemporaryDirectory() as folder:
            weights = Weights(Path(folder), device)
            run_scaling(file, weights, args) if args.scaling else run_cells(file, weights, args)
    picture = file.path.with_suffix(".png")
    plot(file.cells, picture)
    print(file.write_markdown("Cost of a step", render(file.cells, picture.name)))


def run_cells(file: ResultFile, weights: Weights, args: argparse.Namespace) -> None:
    """Memory of every method, then the times of those that could run, cell by cell."""
    cells = [Cell(model, size, m) for model in args.models for m in args.outputs for size in args.batches]
    wanted = [(cell, args.methods) for cell in cells]
    if VOCABULARY.model in args.models and tuple(args.outputs) == OUTPUTS:
        wanted.append((VOCABULARY, [m for m in VOCABULARY_METHODS if m in args.methods]))
    for cell, methods in tqdm(wanted, unit="cell", disable=not sys.stderr.isatty()):
        for method in methods:
            run_memory(cell, method, file, weights, args)
        able = [m for m in methods if "skipped" not in file.cells[key_of(cell, m)]]
        if "adamw" in able:
            run_time(cell.key, cell, able, file, weights, args)


def run_memory(cell: Cell, method: str, file: ResultFile, weights: Weights, args: argparse.Namespace) -> None:
    """Put a method's memory, or the reason that it has none, into the file."""
    key = key_of(cell, method)
    if not is_due(file, key, args.redo):
        return
    smaller = smaller_failure(cell, method, file)
    if smaller is not None:
        reason = file.cells[key_of(smaller, method)]["skipped"]
        result: dict[str, Any] = {"skipped": f"already at {smaller.key}: {reason}"}
    else:
        result = memory_in_process(cell, method, weights.file(cell), vars(args))
    file.put(key, result | {"version": installed(method)})
    print_err(f"{key}: " + (result.get("skipped") or f"{result['mib']:.1f} MiB, {1e3 * result['seconds']:.0f} ms"))


def key_of(cell: Cell, method: str) -> str:
    """The key of a method's memory."""
    return f"{cell.key}/memory/{method}"


def smaller_failure(cell: Cell, method: str, file: ResultFile) -> Cell | None:
    """A cell no larger than this one in which the method ran out of time or memory."""
    for size, outputs in itertools.product(BATCHES, OUTPUTS):
        other = cell._replace(batch=size, outputs=outputs)
        not_larger = other != cell and size <= cell.batch and outputs <= cell.outputs
        if not_larger and file.cells.get(key_of(other, method), {}).get("larger_too"):
            return other
    return None


def run_time(
    key: str, cell: Cell, methods: list[str], file: ResultFile, weights: Weights, args: argparse.Namespace
) -> None:
    """Put the times of a cell into the file, unless all these methods have theirs."""
    key = f"{key}/time"
    missing = set(methods) - set(file.cells.get(key, {}).get("ratio", {}))
    if not missing and not is_due(file, key, args.redo):
        return
    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore"):  # of the peers
        times = time_cell(cell, methods, weights.file(cell), weights.device, args.seconds)
    if weights.device.type == "cuda":
        times["device"] = torch.cuda.get_device_name(weights.device)
    file.put(key, times)
    ratios = "  ".join(f"{method} {ratio:.2f}" for method, ratio in times["ratio"].items())
    print_err(f"{key}: {times['rounds']} rounds, AdamW {times['milliseconds']['adamw']:.1f} ms; {ratios}")


def run_scaling(file: ResultFile, weights: Weights, args: argparse.Namespace) -> None:
    """Times of AdamW, exact and sampled against the number of outputs, and against LoRA's rank."""
    cells = {f"scaling-m/{m}": Cell("bert-tiny", 16, m) for m in SCALING_OUTPUTS}
    cells |= {f"scaling-n/{rank}": Cell("bert-tiny", 16, 10, rank) for rank in SCALING_RANKS}
    for key, cell in tqdm(cells.items(), unit="cell", disable=not sys.stderr.isatty()):
        run_time(key, cell, [m for m in SCALING_METHODS if m in args.methods], file, weights, args)


if __name__ == "__main__":
    main()
