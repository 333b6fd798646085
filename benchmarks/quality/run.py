"""Quality of posteriors: real data, one model and budget for all, sixteen ways from a stream to predictions.

Nine data sets (files of ``bench/problems/``), each with a pre-trained network, an adapter, a short stream, held-out
examples and out-of-distribution inputs; sixteen rows (``rows.py``). Rates of AdamW, IVON and Pyro's SVI are chosen on
the last eighth of seed 0's stream and used for all seeds; AdamW's also serve temperature scaling, dropout, the
ensemble, Laplace and the post hoc rows. Nothing is chosen for this package's rows. Every cell runs in its own process.
Data and weights are read from ../shared or from $BAYES_KF_DATA and $BAYES_KF_WEIGHTS; texts need the extra `bench`.

    python -m benchmarks.quality.run                                   # everything; a stopped run continues
    python -m benchmarks.quality.run --data usps sst2 --rows adamw default --seeds 1
    python -m benchmarks.quality.run --redo '^(usps|sst2)/default/'    # cells to run again
    python -m benchmarks.quality.run --table                           # the table from existing results
"""

from __future__ import annotations

import math
import signal
import time
import traceback
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bayes_kf.evaluation import (
    accuracy,
    brier_score,
    calibration_test,
    entropy,
    negative_log_likelihood,
    ood_scores,
)
from benchmarks.bench.registry.problems import QualityData, found_quality_problems
from benchmarks.common.command import Command, run_cells
from benchmarks.common.result_files import ResultFile
from benchmarks.common.subprocesses import MIB, alarmed, held, peak, run_in_process
from benchmarks.quality.rows import BATCH, ROWS, TUNED, Learned, descend, tune
from benchmarks.quality.table import render

PROBLEMS = found_quality_problems()
CPU = torch.device("cpu")
PROBE = 30  # AdamW steps timed before and after each cell, the unit of its cost


def measure(data: str, row: str, seed: int, choice: Mapping[str, float], cap: float) -> dict[str, Any]:
    """One cell: learn, predict, score. SIGALRM ends this process after ``cap`` seconds."""
    warnings.simplefilter("ignore")
    problem = PROBLEMS[data]
    given, learn = problem.load(seed), ROWS[row][1]
    step = probe(data, given, seed)
    before = held(CPU, reset=True)
    signal.setitimer(signal.ITIMER_REAL, cap)
    try:
        begun = time.process_time()
        learned = learn(problem, given.stream, seed, choice)
        fitted, most = time.process_time() - begun, peak(CPU) - before
        begun = time.process_time()
        probs = learned.predict(given.heldout).probs
        predicted = time.process_time() - begun
        cell = scores(probs, learned.predict(given.ood).probs, given)
    except Exception as error:  # an error of a peer is its result
        place = traceback.extract_tb(error.__traceback__)[-1]
        return {"skipped": f"{type(error).__name__}: {error}".splitlines()[0][:160], "at": f"{place.name}"}
    signal.setitimer(signal.ITIMER_REAL, 0)
    step = (step + probe(data, given, seed)) / 2
    run = step * math.ceil(len(given.stream.labels) / BATCH)
    times = {"seconds": fitted, "adamw_seconds": run, "predict_seconds": predicted, "mib": most / MIB}
    return cell | online(learned) | times | dict(learned.facts)


def scores(probs: Tensor, ood_probs: Tensor, given: QualityData) -> dict[str, float]:
    """Scores of held-out predictions, and of entropy as a detector of out-of-distribution inputs and of errors."""
    if not bool(torch.isfinite(probs).all()):
        raise FloatingPointError("a probability is not finite")
    labels, uncertainty = given.heldout.labels, entropy(probs)
    ece = calibration_test(probs, labels, "ece")
    wrong = probs.argmax(1) != labels
    numbers = {
        "accuracy": accuracy(probs, labels),
        "nll": negative_log_likelihood(probs, labels),
        "brier": brier_score(probs, labels),
        "ece": ece.value,
        "ece_null_low": ece.null_low,
        "ece_null_high": ece.null_high,
        "confidence": probs.max(1).values.mean().item(),
        "ood_auroc": ood_scores(uncertainty, entropy(ood_probs)).auroc,
        "error_auroc": ood_scores(uncertainty[~wrong], uncertainty[wrong]).auroc,
    }
    if given.human is not None:  # cross-entropy against the shares of people's answers
        numbers["human_nll"] = -(given.human * probs.log()).nan_to_num(0.0).sum(1).mean().item()
    return numbers


def online(learned: Learned) -> dict[str, float]:
    """Mean scores of the predictions before each update."""
    if learned.online is None:
        return {}
    correct, losses = learned.online
    return {"online_accuracy": correct.double().mean().item(), "online_log_loss": losses.double().mean().item()}


def probe(data: str, given: QualityData, seed: int) -> float:
    """Processor seconds of an AdamW step on this stream, measured now."""
    model, first = PROBLEMS[data].model(seed, 0.0), given.stream.first(PROBE * BATCH)
    descend(model, first.first(BATCH), seed, 1e-6)
    begun = time.process_time()
    descend(model, first, seed, 1e-6)
    return (time.process_time() - begun) / PROBE


def chosen(family: str, data: str) -> dict[str, Any]:
    """The rates of a method on a data set, chosen on seed 0."""
    warnings.simplefilter("ignore")
    choice, losses = tune(family, PROBLEMS[data], PROBLEMS[data].load(0).stream, 0)
    return {"choice": dict(choice), "losses": [None if math.isinf(loss) else loss for loss in losses]}


def run(file: ResultFile, data: str, row: str, seed: int, cap: float) -> dict[str, Any]:
    """A measured cell; the rates of its family are chosen first if they are missing."""
    family, choice = ROWS[row][2], {}
    if family is not None:
        key = f"{data}/rates/{family}"
        if key not in file.cells:
            rates = run_in_process(chosen, family, data)
            if not isinstance(rates, dict):
                raise RuntimeError(f"choosing {key} ended with {rates}")
            file.put(key, rates)
        choice = file.cells[key]["choice"]
    cell = run_in_process(measure, data, row, seed, choice, cap)
    if isinstance(cell, dict):
        return cell
    if cell > 0:  # an error of a peer is its result; this one is ours
        raise RuntimeError(f"the process of {data}/{row}/{seed} ended with {cell}")
    return {"skipped": f"more than {cap:g} s" if alarmed(cell) else f"ended with {cell}"}


def show(cell: Mapping[str, Any]) -> str:
    """A measured cell in one line."""
    names = ("accuracy", "nll", "ece", "ood_auroc", "seconds", "predict_seconds")
    return cell.get("skipped") or "  ".join(f"{name} {cell[name]:.4f}" for name in names)


def main() -> None:
    """The command line."""
    command = Command(__doc__).names("--data", PROBLEMS).names("--rows", ROWS).seeds(3)
    command.option("--cap", type=float, default=1200.0, help="seconds that a cell may take (%(default)s)")
    args = command.redo().table().parse()
    file = ResultFile("posterior_quality")
    if not args.table:
        places = [(data, row, seed) for seed in args.seeds for data in args.data for row in args.rows]
        work = {f"{d}/{row}/{seed}": partial(run, file, d, row, seed, args.cap) for d, row, seed in places}
        run_cells(file, work, args.redo, show)
    print(file.write_markdown("How good the posteriors are", render(file.cells, PROBLEMS)))


assert set(TUNED) == {family for _, _, family in ROWS.values() if family}

if __name__ == "__main__":
    main()
