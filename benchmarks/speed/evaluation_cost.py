"""Cost of scores: a million predictions of 100 classes, all scores without samples, streaming, on two threads.

Predictions are made batch by batch from logits of a calibrated and of a sharpened model, and are never all in memory.
``StreamingScores`` gives every score with its band and interval. On the same batches, torchmetrics' accuracy and
calibration error (top label, 15 bins) are measured, the two of its scores that stream. Each runs in a process of its
own, whose peak memory includes the interpreter and libraries.

    python -m benchmarks.speed.evaluation_cost                      # a million by 100; on an otherwise idle machine
    python -m benchmarks.speed.evaluation_cost --classes 1000       # more classes
    python -m benchmarks.speed.evaluation_cost --examples 100000    # fewer
    python -m benchmarks.speed.evaluation_cost --table              # the table from existing results
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from bayes_kf import evaluation as ev
from benchmarks.common.command import Command, run_cells
from benchmarks.common.result_files import ResultFile, markdown_table

BATCH = 10_000
WHO = {
    "nothing": "predictions made, nothing scored",
    "ours": "StreamingScores: every score, band and interval",
    "torchmetrics": "torchmetrics: accuracy and ECE",
}


def batches(examples: int, classes: int, sharpness: float = 1.2) -> Iterator[tuple[Tensor, Tensor]]:
    """Float32 probabilities of a slightly overconfident model, and labels."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, examples, BATCH):
        logits = 3 * torch.randn(min(BATCH, examples - start), classes, generator=generator)
        labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
        yield (sharpness * logits).softmax(dim=1), labels


def score(who: str, examples: int, classes: int) -> dict[str, Any]:
    """Seconds of scoring (without making predictions), peak memory, and the scores."""
    import scipy.stats  # noqa: F401, as torchmetrics below: what is measured is not the import

    torch.set_num_threads(2)
    scores: dict[str, float] = {}
    spent = 0.0
    if who == "torchmetrics":
        from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

        metrics = [MulticlassAccuracy(classes, average="micro"), MulticlassCalibrationError(classes, n_bins=15)]
    stream = ev.StreamingScores(classes, top_k=(5,)) if who == "ours" else None
    for probs, labels in tqdm(batches(examples, classes), total=-(-examples // BATCH), desc=who, disable=None):
        start = time.perf_counter()
        if stream is not None:
            stream.update(probs, labels)
        elif who == "torchmetrics":
            for metric in metrics:
                metric.update(probs, labels)
        spent += time.perf_counter() - start
    start = time.perf_counter()
    if stream is not None:
        scores = stream.scores()
    elif who == "torchmetrics":
        scores = {"accuracy": metrics[0].compute().item(), "ece": metrics[1].compute().item()}
    spent += time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    numbers = {
        name: scores[name]
        for name in ("accuracy", "nll", "ece", "ece_null_high", "ks", "ece_classwise")
        if name in scores
    }
    return {"seconds": spent, "peak_mib": peak, "num_scores": len(scores), **numbers}


def render(cells: dict[str, dict[str, Any]]) -> list[str]:
    """Body of the Markdown file."""
    body = []
    for size in sorted({key.rpartition("/")[0] for key in cells}):
        rows = []
        for who, text in WHO.items():
            cell = cells.get(f"{size}/{who}")
            if cell:
                shown = [f"{cell[name]:.4f}" if name in cell else "" for name in ("accuracy", "ece")]
                rows.append(
                    [text, f"{cell['seconds']:.1f}", f"{cell['peak_mib']:,.0f}", str(cell["num_scores"]), *shown]
                )
        examples, classes = map(int, size.split("x"))
        body += [f"## {examples:,} predictions of {classes:,} classes", ""]
        header = ["", "seconds", "peak memory of the process, MiB", "numbers", "accuracy", "ECE"]
        body += [*markdown_table(header, rows), ""]
    return body


def main() -> None:
    """The command line."""
    command = Command(__doc__, threads=2)
    command.option("--examples", type=int, default=1_000_000, help="number of predictions (%(default)s)")
    command.option("--classes", type=int, default=100, help="number of classes (%(default)s)").redo().table()
    args = command.hidden("--who", choices=tuple(WHO)).parse()  # in its own process
    if args.who:
        print(json.dumps(score(args.who, args.examples, args.classes)))
        return
    file = ResultFile("evaluation_cost")
    if not args.table:
        size = f"{args.examples}x{args.classes}"
        work = {f"{size}/{who}": partial(in_process, who, args.examples, args.classes) for who in WHO}
        run_cells(file, work, args.redo)
    print(file.write_markdown("What scores cost", render(file.cells)))


def in_process(who: str, examples: int, classes: int) -> dict[str, Any]:
    """The result of :func:`score` in a new process."""
    command = [sys.executable, "-m", "benchmarks.speed.evaluation_cost", "--who", who]
    command += ["--examples", str(examples), "--classes", str(classes)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603, this script
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
