"""Which posterior deserves trust: real data, one model and budget for all, sixteen ways to a prediction.

Nine data sets (``_quality_problems.py``), each with a pre-trained network, an adapter, a short stream, held-out
examples and foreign inputs; sixteen rows (``_quality_rows.py``). Rates of AdamW, IVON and Pyro's SVI are chosen on
the last eighth of seed 0's stream and kept; AdamW's serve temperature scaling, dropout, the ensemble, Laplace and the
post hoc row too. Nothing is chosen for this package's rows. Every cell runs in a process of its own. Data and weights
are read from ../shared or from $BAYES_KF_DATA and $BAYES_KF_WEIGHTS; texts need the extra `bench`.

    python benchmarks/posterior_quality.py                                   # everything; a stopped run goes on
    python benchmarks/posterior_quality.py --data usps sst2 --rows adamw default --seeds 1
    python benchmarks/posterior_quality.py --redo '^(usps|sst2)/default/'    # measure again what matches
    python benchmarks/posterior_quality.py --table                           # print what is there
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from bayes_kf.evaluation import (
    accuracy,
    brier_score,
    calibration_test,
    entropy,
    negative_log_likelihood,
    ood_scores,
)
from benchmarks.common.result_files import ResultFile
from benchmarks.common.subprocesses import MIB, alarmed, elsewhere, held, peak
from benchmarks.quality.problems import PROBLEMS, Problem
from benchmarks.quality.rows import BATCH, ROWS, TUNED, Learned, descend, tune
from benchmarks.quality.table import render

CPU = torch.device("cpu")
PROBE = 30  # AdamW steps timed before and after each cell, to state its cost in


def measure(data: str, row: str, seed: int, choice: Mapping[str, float], cap: float) -> dict[str, Any]:
    """One cell: learn, predict, score. This process ends by SIGALRM when that takes longer than ``cap`` seconds."""
    warnings.simplefilter("ignore")
    setting = PROBLEMS[data]
    given, learn = setting.load(seed), ROWS[row][1]
    step = probe(data, given, seed)
    before = held(CPU, reset=True)
    signal.setitimer(signal.ITIMER_REAL, cap)
    try:
        begun = time.process_time()
        learned = learn(setting, given.stream, seed, choice)
        fitted, most = time.process_time() - begun, peak(CPU) - before
        begun = time.process_time()
        probs = learned.predict(given.heldout)
        predicted = time.process_time() - begun
        kept = scores(probs, learned.predict(given.foreign), given)
    except Exception as error:  # whatever keeps a peer from running is its result
        place = traceback.extract_tb(error.__traceback__)[-1]
        return {"skipped": f"{type(error).__name__}: {error}".splitlines()[0][:160], "at": f"{place.name}"}
    signal.setitimer(signal.ITIMER_REAL, 0)
    step = (step + probe(data, given, seed)) / 2
    run = step * math.ceil(len(given.stream.labels) / BATCH)
    times = {"seconds": fitted, "adamw_seconds": run, "predict_seconds": predicted, "mib": most / MIB}
    return kept | online(learned) | times | dict(learned.facts)


def scores(probs: Tensor, foreign: Tensor, given: Problem) -> dict[str, float]:
    """What the held-out part says, and how well entropy tells foreign inputs and errors."""
    if not bool(torch.isfinite(probs).all()):
        raise FloatingPointError("a probability is not finite")
    labels, doubt = given.heldout.labels, entropy(probs)
    ece = calibration_test(probs, labels, "ece")
    wrong = probs.argmax(1) != labels
    found = {
        "accuracy": accuracy(probs, labels),
        "nll": negative_log_likelihood(probs, labels),
        "brier": brier_score(probs, labels),
        "ece": ece.value,
        "ece_null_low": ece.null_low,
        "ece_null_high": ece.null_high,
        "confidence": probs.max(1).values.mean().item(),
        "ood_auroc": ood_scores(doubt, entropy(foreign)).auroc,
        "error_auroc": ood_scores(doubt[~wrong], doubt[wrong]).auroc,
    }
    if given.human is not None:  # cross-entropy against the shares of people's answers
        found["human_nll"] = -(given.human * probs.log()).nan_to_num(0.0).sum(1).mean().item()
    return found


def online(learned: Learned) -> dict[str, float]:
    """Scores before each example was learned from."""
    if learned.online is None:
        return {}
    correct, losses = learned.online
    return {"online_accuracy": correct.double().mean().item(), "online_log_loss": losses.double().mean().item()}


def probe(data: str, given: Problem, seed: int) -> float:
    """Processor seconds of an AdamW step on this stream, now."""
    model, first = PROBLEMS[data].model(seed, 0.0), given.stream.first(PROBE * BATCH)
    descend(model, first.first(BATCH), seed, 1e-6)
    begun = time.process_time()
    descend(model, first, seed, 1e-6)
    return (time.process_time() - begun) / PROBE


def chosen(family: str, data: str) -> dict[str, Any]:
    """The rates that a method uses on a data set, from seed 0."""
    warnings.simplefilter("ignore")
    choice, losses = tune(family, PROBLEMS[data], PROBLEMS[data].load(0).stream, 0)
    return {"choice": dict(choice), "losses": [None if math.isinf(loss) else loss for loss in losses]}


def run(file: ResultFile, data: str, row: str, seed: int, cap: float) -> None:
    """Measure a cell, write it, and say how it went."""
    family, choice = ROWS[row][2], {}
    if family is not None:
        key = f"{data}/rates/{family}"
        if key not in file.cells:
            found = elsewhere(chosen, family, data)
            if not isinstance(found, dict):
                raise RuntimeError(f"choosing {key} ended with {found}")
            file.put(key, found)
        choice = file.cells[key]["choice"]
    kept = elsewhere(measure, data, row, seed, choice, cap)
    if isinstance(kept, int):
        if kept > 0:  # what a method raises is its result; this is none of its own
            raise RuntimeError(f"the process of {data}/{row}/{seed} ended with {kept}")
        kept = {"skipped": f"more than {cap:g} s" if alarmed(kept) else f"ended with {kept}"}
    file.put(f"{data}/{row}/{seed}", kept)
    text = kept.get("skipped") or "  ".join(
        f"{name} {kept[name]:.4f}" for name in ("accuracy", "nll", "ece", "ood_auroc", "seconds", "predict_seconds")
    )
    tqdm.write(f"{data}/{row}/{seed}: {text}", file=sys.stderr)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=list(PROBLEMS), choices=PROBLEMS)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cap", type=float, default=1200.0, help="seconds that a cell may take")
    parser.add_argument("--redo", metavar="REGEX", help="measure again what is there and matches, as `.` for all")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    file = ResultFile("posterior_quality")
    if not args.table:
        file.begin()
        places = list(itertools.product(args.seeds, args.data, args.rows))
        for seed, data, row in tqdm(places, unit="cell", disable=not sys.stderr.isatty()):
            key = f"{data}/{row}/{seed}"
            if key not in file.cells or (args.redo and re.search(args.redo, key)):
                run(file, data, row, seed, args.cap)
    print(file.write_markdown("How good the posteriors are", render(file.cells)))


assert set(TUNED) == {family for _, _, family in ROWS.values() if family}

if __name__ == "__main__":
    main()
