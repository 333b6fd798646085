"""The posterior of a stream under several settings, on the data sets of all online tables.

One pass, one example at a time: USPS, UCI digits, KMNIST and SST-2 as in ``benchmarks.papers.online``, the data sets of
``benchmarks.bench.run_online``, and MNIST that changes as in ``benchmarks.quality.drift``; the longer ones are cut.
Rows: the settings of ``fit`` for streams, with whitened LoRA inputs, and with the size and the sharpness that the
latest examples choose; ``KalmanConfig()`` without and with whitened inputs. Row "before" is the first one under an
earlier version of the package, whose folder comes first in PYTHONPATH.

    python -m benchmarks.quality.streams              # all rows but "before"; a stopped run continues
    PYTHONPATH=EARLIER:. python -P -m benchmarks.quality.streams --rows before
    python -m benchmarks.quality.streams --table      # the table from existing results
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
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
from benchmarks.common.result_files import ResultFile, markdown_table, mean_sd
from benchmarks.papers import online
from benchmarks.quality import drift

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


def render(cells: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The differences of online log loss, then a table for each stream."""
    lines = [
        "One pass, one example at a time. Online scores come before each update; the others are of held-out examples"
        " after the pass. Epistemic: mutual information of label and parameters, mean in nats. ECE [upper end of the"
        " null band]. T: temperature. Mean ± sd over seeds where there are several.",
        "",
        "## Differences of online log loss",
        "",
        "In nats an example, with the standard error over blocks of 25 examples; negative: the first is better.",
        "",
        *differences(cells),
    ]
    for name, problem in PROBLEMS.items():
        rows = [row for row in ROWS if _of(cells, name, row)]
        if rows:
            examples, seeds = _of(cells, name, rows[0])[0]["examples"], len(_of(cells, name, rows[0]))
            lines += [
                "",
                f"## {problem.title}",
                "",
                f"{examples:,} examples, seeds: {seeds}.",
                "",
            ]
            lines += markdown_table(HEADER, [_line(ROWS[row], _of(cells, name, row)) for row in rows])
    return lines


ONLINE, HELD_OUT = ["online log loss", "online accuracy"], ["NLL", "accuracy", "ECE", "epistemic"]
HEADER = ["", *ONLINE, *HELD_OUT, "T", "size", "sharpness", "ms"]
PAIRS = {
    "today − before": ("stream", "before"),
    "whitened − default": ("stream-whitened", "stream"),
    "whitened − `KalmanConfig()`": ("single-whitened", "single"),
}


def differences(cells: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each stream, a column for each pair of rows; the held-out differences beside them."""
    header = ["", *PAIRS, *(f"NLL, {pair}" for pair in PAIRS), "NLL, latest − default"]
    table = []
    for name, problem in PROBLEMS.items():
        online_ = [difference(cells, name, *pair) for pair in PAIRS.values()]
        final = [_heldout_difference(cells, name, *pair) for pair in [*PAIRS.values(), ("stream-latest", "stream")]]
        table.append([problem.title, *online_, *final])
    return markdown_table(header, table)


def difference(cells: Mapping[str, Mapping[str, Any]], name: str, first: str, second: str) -> str:
    """The text "mean ± standard error" of the differences of two rows' losses, paired by block; a dash for none."""
    pairs = _paired(cells, name, first, second)
    values = [a - b for one, other in pairs for a, b in zip(one["blocks"], other["blocks"], strict=True)]
    if len(values) < 2:
        return "–"
    values_ = torch.tensor(values, dtype=torch.float64)
    return f"{values_.mean():+.3f} ± {values_.std() / math.sqrt(len(values)):.3f}"


def _heldout_difference(cells: Mapping[str, Mapping[str, Any]], name: str, first: str, second: str) -> str:
    values = [one["nll"] - other["nll"] for one, other in _paired(cells, name, first, second) if "nll" in one]
    return f"{sum(values) / len(values):+.3f}" if values else "–"


def _paired(
    cells: Mapping[str, Mapping[str, Any]], name: str, first: str, second: str
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    keys = [(f"{name}/{first}/{seed}", f"{name}/{second}/{seed}") for seed in PROBLEMS[name].seeds]
    return [(cells[one], cells[other]) for one, other in keys if one in cells and other in cells]


def _of(cells: Mapping[str, Mapping[str, Any]], name: str, row: str) -> list[Mapping[str, Any]]:
    keys = [f"{name}/{row}/{seed}" for seed in PROBLEMS[name].seeds]
    return [cells[key] for key in keys if key in cells]


def _line(title: str, cells: Sequence[Mapping[str, Any]]) -> list[str]:
    def text(name: str, digits: int = 3) -> str:
        return mean_sd([cell[name] for cell in cells if cell.get(name) is not None], digits)

    def listed(name: str) -> str:
        return ", ".join(f"{cell[name]:.3g}" for cell in cells if cell[name] is not None) or "–"

    band = "" if "ece" not in cells[0] else f" [{max(cell['ece_null_high'] for cell in cells):.3f}]"
    scores = [text("nll"), text("accuracy"), text("ece") + band, text("epistemic")]
    chosen = [listed("temperature"), listed("size"), listed("sharpness")]
    return [title, text("online_log_loss"), text("online_accuracy"), *scores, *chosen, text("milliseconds", 0)]


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
    print(file.write_markdown("Streams: settings on all online tables", render(file.cells)))


def show(cell: dict[str, Any]) -> str:
    """A measured cell in one line."""
    final = f", NLL {cell['nll']:.4f}, epistemic {cell['epistemic']:.4f}" if "nll" in cell else ""
    return f"online {cell['online_log_loss']:.4f}{final}, T {cell['temperature']:g}, {cell['milliseconds']:.0f} ms"


if __name__ == "__main__":
    main()
