"""The optimizer bench: several epochs over a small data set in batches (GRNG's comparison of optimizers).

After every epoch the training loss and the norm of its gradient over the whole training set, and the test loss, are
measured at the point that was learned (a filter's mean). A filter counts no example twice (``KalmanLearner``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.bench.learners import STOPS, Learner, trainable
from benchmarks.bench.registry.optimizers import Row
from benchmarks.bench.registry.problems import Problem, Split, first_inputs
from benchmarks.bench.scores import heldout_scores
from benchmarks.common.learners import SCALE_EXAMPLES, Stream, logits, quiet_bar

NAME = "optimizers"
CRITERIA = {"train": "mean_train_loss", "final": "nll"}
"""By what settings are chosen on the tuning data: the smallest of these."""
EPOCHS, BATCH = 5, 32
MEASURED = 128  # examples of a batch in measurements of losses
PROBE = 10  # AdamW steps timed before and after


class Point(NamedTuple):
    """Losses and gradient norm of a learner after an epoch."""

    train_loss: float
    test_loss: float
    gradient_norm: float


def measure(
    row: Row,
    problem: Problem,
    adapter: str,
    choice: Mapping[str, Any],
    split: Split,
    seed: int,
    adamw: Row | None,
) -> dict[str, Any]:
    """The numbers of a row's epochs that the results file keeps; arguments as in the online bench."""
    model, epochs = problem.model(adapter, seed), EPOCHS
    before = probe(problem, split.stream, adamw)
    per_epoch = math.ceil(len(split.stream.labels) / BATCH)
    inputs = first_inputs(split.stream, SCALE_EXAMPLES)
    points = [point(model, split)]
    learner = row.make(model, choice, seed, per_epoch * epochs, inputs)
    seconds = wall = 0.0
    cause = None
    for epoch in range(epochs):
        try:
            spent = run_epoch(learner, split.stream, seed, epoch, epochs)
            learner.settle()
            points.append(point(model, split))
        except STOPS as error:
            cause = f"{type(error).__name__}: {error}".splitlines()[0]
            break
        seconds, wall = seconds + spent[0], wall + spent[1]
    done = max(1, len(points) - 1) * per_epoch
    cell: dict[str, Any] = {
        "adapter": adapter,
        "parameters": sum(p.numel() for p in trainable(model)),
        "state_bytes": learner.bytes(),
        "steps": (len(points) - 1) * per_epoch,
        "milliseconds": 1e3 * seconds / done,
        "wall": 1e3 * wall / done,
        "train_loss": [_rounded(p.train_loss) for p in points],
        "test_loss": [_rounded(p.test_loss) for p in points],
        "gradient_norm": [_rounded(p.gradient_norm) for p in points],
    }
    if cause is None:
        try:
            cell |= heldout_scores(learner, split.heldout)
            cell["mean_train_loss"] = sum(p.train_loss for p in points[1:]) / epochs
        except STOPS as error:
            cause = f"{type(error).__name__}: {error}".splitlines()[0]
    if cause is not None:
        cell |= {"diverged_at": len(points) - 1, "cause": cause}
    after = probe(problem, split.stream, adamw)
    if before is not None and after is not None:
        cell |= {"adamw_milliseconds": 500 * (before[0] + after[0]), "adamw_wall": 500 * (before[1] + after[1])}
    return cell


def run_epoch(learner: Learner, stream: Stream, seed: int, epoch: int, epochs: int) -> tuple[float, float]:
    """Processor and wall seconds of an epoch, whose order is the same for every row."""
    total = len(stream.labels)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(1000 * seed + epoch))
    batches = stream.at(order).batches(BATCH)
    start, wall = time.process_time(), time.perf_counter()
    learner.begin_epoch(epoch, epochs, total)
    for inputs, labels in quiet_bar(batches):
        learner.learn(inputs, labels)
    return time.process_time() - start, time.perf_counter() - wall


def point(model: nn.Module, split: Split) -> Point:
    """Losses and gradient norm at the model's current tensors.

    Raises:
        FloatingPointError: if one of them is not finite.
    """
    tensors = trainable(model)
    gradient = [torch.zeros_like(tensor) for tensor in tensors]
    train, total = 0.0, len(split.stream.labels)
    for inputs, labels in split.stream.batches(MEASURED):
        loss = F.cross_entropy(logits(model, inputs), labels, reduction="sum") / total
        for accumulated, part in zip(gradient, torch.autograd.grad(loss, tensors), strict=True):
            accumulated += part
        train += float(loss.detach())
    with torch.no_grad():
        losses = [
            F.cross_entropy(logits(model, inputs), labels, reduction="sum")
            for inputs, labels in split.heldout.batches(MEASURED)
        ]
    test = float(torch.stack(losses).sum()) / len(split.heldout.labels)
    norm = math.sqrt(sum(float(part.double().square().sum()) for part in gradient))
    if not all(map(math.isfinite, (train, test, norm))):
        raise FloatingPointError("a loss or its gradient is not finite")
    return Point(train, test, norm)


def probe(problem: Problem, stream: Stream, adamw: Row | None) -> tuple[float, float] | None:
    """Processor and wall seconds of an AdamW step on the problem's own adapter, measured now."""
    if adamw is None:
        return None
    batches = stream.first(PROBE * BATCH).batches(BATCH)
    learner = adamw.make(problem.model(problem.network.adapters[0], 0), {"lr": 1e-4}, 0, PROBE, None)
    start, wall = time.process_time(), time.perf_counter()
    for inputs, labels in batches:
        learner.learn(inputs, labels)
    return (time.process_time() - start) / len(batches), (time.perf_counter() - wall) / len(batches)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
