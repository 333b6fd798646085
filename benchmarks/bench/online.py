"""The online bench: one pass, one example at a time, each predicted before the update (LoKO's Tables 1 to 3)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.bench.learners import STOPS, Learner, trainable
from benchmarks.bench.registry.optimizers import Row
from benchmarks.bench.registry.problems import Problem, Split, first_inputs
from benchmarks.bench.scores import curve, heldout_scores, log_losses
from benchmarks.common.learners import SCALE_EXAMPLES, Stream, quiet_bar

NAME = "online"
CRITERIA = {"online": "online_log_loss", "final": "nll"}
"""By what settings are chosen on the tuning stream: the smallest of these."""
PROBE = 40  # AdamW steps timed before and after a pass


class Pass(NamedTuple):
    """Correctness and log losses of a pass before each update, up to a divergence."""

    correct: Tensor
    losses: Tensor
    seconds: float
    wall: float
    cause: str | None = None


def measure(
    row: Row, problem: Problem, adapter: str, choice: Mapping[str, Any], split: Split, seed: int, adamw: Row | None
) -> dict[str, Any]:
    """The numbers of a row's pass that the results file keeps.

    Args:
        row: the optimizer.
        problem: the data set.
        adapter: the kind of its trainable tensors.
        choice: the row's setting.
        split: the stream and the held-out examples.
        seed: of the network's start and of the row's random numbers.
        adamw: row whose steps are timed before and after; None: no timing.
    """
    model = problem.model(adapter, seed)
    before = probe(problem, split.stream, adamw)
    learner = row.make(model, choice, seed, len(split.stream.labels), first_inputs(split.stream, SCALE_EXAMPLES))
    result = run(learner, split.stream)
    cell = summary(result, len(split.stream.labels))
    cell |= {"adapter": adapter, "parameters": sum(p.numel() for p in trainable(model)), "state_bytes": learner.bytes()}
    if result.cause is None:
        try:
            cell |= heldout_scores(learner, split.heldout)
        except STOPS as error:
            cell |= {"diverged_at": len(result.losses), "cause": str(error).splitlines()[0]}
    after = probe(problem, split.stream, adamw)
    if before is not None and after is not None:
        cell |= {"adamw_milliseconds": 500 * (before[0] + after[0]), "adamw_wall": 500 * (before[1] + after[1])}
    return cell


def run(learner: Learner, stream: Stream) -> Pass:
    """A pass, up to the example on which the learner diverges, if any."""
    correct: list[Tensor] = []
    losses: list[Tensor] = []
    cause = None
    start, wall = time.process_time(), time.perf_counter()
    for inputs, labels in quiet_bar(stream.batches()):
        try:
            outputs = learner.learn(inputs, labels)
        except STOPS as error:
            cause = f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
            break
        correct.append(outputs.argmax(1) == labels)
        losses.append(log_losses(outputs, labels))
    done = max(1, len(losses))
    seconds, wall = (time.process_time() - start) / done, (time.perf_counter() - wall) / done
    empty = torch.empty(0)
    return Pass(torch.cat([empty.bool(), *correct]), torch.cat([empty.double(), *losses]), seconds, wall, cause)


def summary(result: Pass, total: int) -> dict[str, Any]:
    """Numbers of a pass; examples after a divergence count as wrong."""
    cell: dict[str, Any] = {
        "steps": len(result.losses),
        "online_accuracy": result.correct.double().sum().item() / total,
        "milliseconds": 1e3 * result.seconds,
        "wall": 1e3 * result.wall,
        "curve": curve(result.correct, result.losses),
    }
    if result.cause is None:
        return cell | {"online_log_loss": result.losses.mean().item()}
    return cell | {"diverged_at": len(result.losses), "cause": result.cause}


def probe(problem: Problem, stream: Stream, adamw: Row | None) -> tuple[float, float] | None:
    """Processor and wall seconds of an AdamW step on the problem's own adapter, measured now."""
    if adamw is None:
        return None
    few = stream.first(min(PROBE, len(stream.labels)))
    learner = adamw.make(problem.model(problem.network.adapters[0], 0), {"lr": 1e-4}, 0, PROBE, None)
    result = run(learner, few)
    return result.seconds, result.wall
