"""The posterior of a stream under several settings, on the data sets of all online tables.

One pass, one example at a time: USPS, UCI digits, KMNIST and SST-2 as in ``benchmarks.papers.online``, the data sets of
``benchmarks.bench.run_online``, and MNIST that changes as in ``benchmarks.quality.drift``; the longer ones are cut.
Rows: the settings of ``fit`` for streams, with whitened LoRA inputs, and with the size and the sharpness that the
latest examples choose; ``KalmanConfig()`` without and with whitened inputs. Row "before" is the first one under an
earlier version of the package (commit 8273a08), whose folder comes first in PYTHONPATH.

    python -m benchmarks.quality.streams              # all rows but "before"; a stopped run continues
    PYTHONPATH=EARLIER:. python -P -m benchmarks.quality.streams --rows before
    python -m benchmarks.quality.streams --table      # the table from existing results
"""

from __future__ import annotations

import time
import warnings
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import bayes_kf as bkf
from bayes_kf.evaluation import accuracy, calibration_test
from bayes_kf.models.zoo import lora_digits_vit
from benchmarks.bench.registry.problems import found_problems
from benchmarks.common.command import Command, run_cells
from benchmarks.common.learners import Stream
from benchmarks.common.result_files import ResultFile
from benchmarks.papers import online
from benchmarks.quality import drift
from benchmarks.quality.streams_table import render

ROWS = {
    "before": "before size and sharpness",
    "stream": "**default (`KalmanConfig.stream()`)**",
    "stream-whitened": "default, whitened",
    "stream-latest": "default, latest examples",
    "single": "`KalmanConfig()`",
    "single-whitened": "`KalmanConfig()`, whitened",
}
BLOCK = 25  # examples whose mean loss is kept, for standard errors of differences
HELDOUT = 1000  # held-out examples, at most


class Task(NamedTuple):
    """A stream, held-out examples (none where the stream changes) and a model at its start."""

    stream: Stream
    heldout: Stream | None
    model: nn.Module


class Problem(NamedTuple):
    """A stream of the online tables.

    Attributes:
        title: in the table.
        seeds: of its cells.
        limit: examples of the stream, at most.
    """

    title: str
    seeds: tuple[int, ...]
    limit: int | None = None


PROBLEMS = {
    "digits": Problem("MNIST transformer to UCI digits", (0, 1, 2), 600),
    "kmnist": Problem("MNIST transformer to KMNIST, new head", (0, 1, 2), 800),
    "usps": Problem("MNIST transformer to USPS", (0,), 1000),
    "sst2": Problem("MiniLM to SST-2, new head", (0,), 400),
    "bench-mnist": Problem("ResNet-20 of CIFAR-10 to MNIST, new head", (0,), 400),
    "bench-cifar10": Problem("CIFAR-10 transformer to JPEG", (0,), 400),
    "bench-cola": Problem("MiniLM to CoLA, new head", (0,), 400),
    "bench-mrpc": Problem("MiniLM to MRPC, new head", (0,), 300),
    "bench-cifar10_resnet": Problem("ResNet-20 to JPEG", (0,), 300),
    "drift-permuted": Problem("MNIST, labels permuted half-way", (0,), 800),
    "drift-rotating": Problem("MNIST, turning to 180 degrees", (0,), 800),
}


def task(name: str, seed: int) -> Task:
    """The task of a seed."""
    kind, _, data = name.rpartition("-")
    limit = PROBLEMS[name].limit
    if kind == "drift":
        given = drift.stream(data, seed)
        kept = given.at(torch.linspace(0, len(given.labels) - 1, limit or len(given.labels)).long())
        return Task(kept, None, lora_digits_vit(rank=4, seed=seed))
    if kind == "bench":
        problem = found_problems()[data]
        split, kinds = problem.split("online", seed, limit), problem.network.adapters
        return Task(split.stream, split.heldout.first(HELDOUT), problem.model(kinds[0], seed))
    found = online.task(data, seed, limit)
    return Task(found.stream, found.heldout.first(HELDOUT), online.make_model(seed, 4, found.new_classes, found.text))


def config_of(row: str, seed: int) -> bkf.KalmanConfig:
    """The settings of a row."""
    settings: dict[str, Any] = {"lora_inputs": "whitened"} if row.endswith("-whitened") else {}
    return (bkf.KalmanConfig if row.startswith("single") else bkf.KalmanConfig.stream)(seed=seed, **settings)


def measure(name: str, row: str, seed: int) -> dict[str, Any]:
    """The numbers of a row on one stream that the results file keeps."""
    given, start = task(name, seed), time.process_time()
    settings: dict[str, Any] = {"held_out": "latest"} if row.endswith("-latest") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of temperatures and sizes at an end, which the table shows
        posterior = bkf.fit(given.model, given.stream.batches(), config_of(row, seed), progress=False, **settings)
    seconds = time.process_time() - start
    losses, count = posterior.history["log_loss"].double(), len(given.stream.labels)
    cell = {
        "online_log_loss": losses.mean().item(),
        "online_accuracy": posterior.history["correct"].double().mean().item(),
        "blocks": [round(block.mean().item(), 5) for block in losses.split(BLOCK)],
        "examples": count,
        "milliseconds": 1e3 * seconds / count,
        "temperature": posterior.temperature,
        "logit_sd": posterior.config.initial_logit_sd,
        "size": float(posterior.history["size"][0]) if "size" in posterior.history else None,
        "sharpness": posterior.config.softmax_temperature,
    }
    return cell if given.heldout is None else cell | heldout_scores(posterior, given.heldout)


def heldout_scores(posterior: bkf.Posterior, heldout: Stream) -> dict[str, float]:
    """Scores of the predictions of held-out examples, and their mean epistemic and total entropy in nats."""
    prediction = posterior.predict_loader(heldout.batches(256))
    probs, log_prob, entropy, epistemic = (
        _given(getattr(prediction, field)).double() for field in ("probs", "log_prob", "entropy", "epistemic")
    )
    ece = calibration_test(probs, heldout.labels, "ece")
    return {
        "accuracy": accuracy(probs, heldout.labels),
        "nll": -log_prob.mean().item(),
        "ece": ece.value,
        "ece_null_high": ece.null_high,
        "entropy": entropy.mean().item(),
        "epistemic": epistemic.mean().item(),
    }


def _given(values: Tensor | None) -> Tensor:
    assert values is not None  # of a classifier, with labels
    return values


def main() -> None:
    """The command line."""
    today = [row for row in ROWS if row != "before"]
    command = Command(__doc__).names("--rows", ROWS, today).names("--problems", PROBLEMS).redo().table()
    args = command.parse()
    file = ResultFile("streams")
    if not args.table:
        work = {
            f"{name}/{row}/{seed}": partial(measure, name, row, seed)
            for name in args.problems
            for row in args.rows
            for seed in PROBLEMS[name].seeds
        }
        run_cells(file, work, args.redo, show)
    titles = {name: problem.title for name, problem in PROBLEMS.items()}
    print(file.write_markdown("Streams: settings on all online tables", render(file.cells, titles, ROWS)))


def show(cell: dict[str, Any]) -> str:
    """A measured cell in one line."""
    final = f", NLL {cell['nll']:.4f}, epistemic {cell['epistemic']:.4f}" if "nll" in cell else ""
    return f"online {cell['online_log_loss']:.4f}{final}, T {cell['temperature']:g}, {cell['milliseconds']:.0f} ms"


if __name__ == "__main__":
    main()
