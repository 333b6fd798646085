"""One cell of the bench: learn, predict, score, and the time of an AdamW step measured before and after.

``run_in_process`` preloads this module, so that its imports are paid once.
"""

from __future__ import annotations

import math
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.bench.registry.problems import QualityProblem, RegressionProblem, found_split_problems
from benchmarks.common.learners import Stream, logits
from benchmarks.common.subprocesses import MIB, held, peak
from benchmarks.quality.split import regression_rows, rows
from benchmarks.quality.split.scores import classification_scores, regression_scores, variant_scores
from benchmarks.quality.split.strong import BATCH

PROBLEMS = found_split_problems()
CPU = torch.device("cpu")
PROBE = 20  # AdamW steps timed before and after each cell, the units of its cost


def measure(data: str, row: str, seed: int, cap: float) -> dict[str, Any]:
    """One cell: learn, predict, score. SIGALRM ends this process after ``cap`` seconds."""
    problem = PROBLEMS[data]
    given = problem.load(seed)

    def scores(learned: Any) -> dict[str, Any]:
        if isinstance(problem, RegressionProblem):
            return dict(regression_scores(learned.predict(given.heldout), given.heldout.labels))
        cell = classification_scores(learned.predict, given, problem.model(seed, 0.0), seed)
        return cell | variant_scores(learned.variants, given.heldout)

    return measured(problem, given, seed, cap, lambda: learn(problem, row, given.stream, seed), scores)


def measured(
    problem: Any,
    given: Any,
    seed: int,
    cap: float,
    learn: Callable[[], Any],
    scores: Callable[[Any], dict[str, Any]],
) -> dict[str, Any]:
    """The scores of a row with its times and memory; SIGALRM ends this process after ``cap`` seconds.

    Args:
        problem: whose AdamW steps are the units of the costs.
        given: its streams.
        seed: of the cell.
        cap: in seconds.
        learn: returns what the row has learned.
        scores: of that.
    """
    warnings.simplefilter("ignore")
    units = epoch_seconds(problem, given.stream, seed)
    before = held(CPU, reset=True)
    signal.setitimer(signal.ITIMER_REAL, cap)
    try:
        begun = time.process_time()
        learned = learn()
        fitted, most = time.process_time() - begun, peak(CPU) - before
        begun = time.process_time()
        learned.predict(given.heldout)
        predicted = time.process_time() - begun
        cell = scores(learned)
    except Exception as error:  # an error of a row is its result
        place = traceback.extract_tb(error.__traceback__)[-1]
        return {"skipped": f"{type(error).__name__}: {error}".splitlines()[0][:160], "at": f"{place.name}"}
    signal.setitimer(signal.ITIMER_REAL, 0)
    again = epoch_seconds(problem, given.stream, seed)
    times = {"seconds": fitted, "predict_seconds": predicted, "mib": most / MIB}
    return cell | times | {unit: (units[unit] + again[unit]) / 2 for unit in units} | dict(learned.facts)


def learn(problem: QualityProblem | RegressionProblem, row: str, stream: Stream, seed: int) -> Any:
    """The row's result on a problem of either kind."""
    return rows_of(problem.name)[row][1](problem, stream, seed)


def epoch_seconds(problem: QualityProblem | RegressionProblem, stream: Stream, seed: int) -> dict[str, float]:
    """Processor seconds of epochs of AdamW with batches of 16 and of 1, from steps measured now."""
    sizes = {"epoch_seconds": BATCH, "single_seconds": 1}
    steps = {unit: math.ceil(len(stream.labels) / size) for unit, size in sizes.items()}
    return {unit: steps[unit] * probe(problem, stream, seed, size) for unit, size in sizes.items()}


def probe(problem: QualityProblem | RegressionProblem, stream: Stream, seed: int, size: int) -> float:
    """Processor seconds of an AdamW step on a batch of this stream, measured now."""
    is_regression = isinstance(problem, RegressionProblem)
    model = problem.model(seed) if isinstance(problem, RegressionProblem) else problem.model(seed, 0.0)
    loss = F.mse_loss if is_regression else F.cross_entropy
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    batches = [batch for batch in stream.first(PROBE * size).batches(size) if len(batch[1]) == size]
    for number in range(-1, PROBE):  # the first step is not timed
        if number == 0:
            begun = time.process_time()
        inputs, labels = batches[number % len(batches)]
        optimizer.zero_grad(set_to_none=True)
        loss(logits(model, inputs), labels).backward()
        optimizer.step()
    return (time.process_time() - begun) / PROBE


def rows_of(data: str) -> Mapping[str, Any]:
    """The rows that apply to a data set."""
    return regression_rows.ROWS if isinstance(PROBLEMS[data], RegressionProblem) else rows.ROWS
