"""Few-shot learning of a CLIP, as the papers on CLIP measure it: k images of every class, and then what is it worth?

A small CLIP (``train_clip.py``) learns classes from 1, 2, 4, 8 and 16 images each: zero-shot, CLIP-LoRA, Sparse
Optimization, Tip-Adapter-F, feature adapters by AdamW, and this package's filters over LoRA or feature adapters with
both observation models of ``bayes_kf.models.clip``. Validation shots (as many, at most four a class) are drawn before
training shots; on them every row chooses among its own grid, by accuracy and then by log loss, and temperatures. Tested
are accuracy, calibration error and log loss on images like those learned (ID), on shifted ones (OOD), and how well
entropy tells images of other things. Data is read from ../shared/data or $BAYES_KF_DATA.

    OMP_NUM_THREADS=1 python -m benchmarks.few_shot.run                    # everything; goes on where it was stopped
    OMP_NUM_THREADS=1 python -m benchmarks.few_shot.run --rows kalman-lora --tasks letters --shots 4
    OMP_NUM_THREADS=1 python -m benchmarks.few_shot.run --wrong 0.25       # a quarter of the training labels are wrong
    python -m benchmarks.few_shot.run --table                              # write table and figure again
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import CLIPModel

from bayes_kf.evaluation import accuracy, entropy, expected_calibration_error, ood_scores
from bayes_kf.models.clip import prompt_tokens
from benchmarks.common import result_files
from benchmarks.common.result_files import ResultFile
from benchmarks.few_shot.clip import WEIGHTS, LetterTokenizer, trained
from benchmarks.few_shot.figure import draw_figure
from benchmarks.few_shot.learn import Learned, Row, Setting
from benchmarks.few_shot.rows import MEASURED_BEFORE, ROWS
from benchmarks.few_shot.table import render
from benchmarks.few_shot.tasks import BENCH, SHOTS, TASKS, Task, draw, relabelled

SEEDS = (1, 2, 3)  # settings were tried out under seed 0
TINY = torch.finfo(torch.float64).tiny


def measure(row: Row, task: Task, clip: CLIPModel, shots: int, seed: int, wrong: float = 0.0) -> dict[str, Any]:
    """A row's choice, what else it tried, and the scores of what it predicts."""
    drawn = draw(task.pool, shots, seed)
    training = relabelled(drawn.training, wrong, seed)
    tokens = prompt_tokens(LetterTokenizer(), task.pool.names)
    setting = Setting(clip, tokens, training, drawn.validation, shots, seed)
    tried, best = [], None
    for choice in row.grid:
        start = time.process_time()
        learned = row.learn(setting, choice)
        seconds = time.process_time() - start
        found = _sums(learned.predict(setting.validation.images)[""], setting.validation.labels)
        tried.append(dict(choice) | {"nll": found["nll"], "accuracy": found["accuracy"], "seconds": round(seconds, 2)})
        if row.tests_all:
            tested = scores(learned, task)[""]
            tried[-1]["test"] = {"id": tested["id"], "shifts": tested["shifts"]}
        rank = (-found["accuracy"], found["nll"])
        if best is None or rank < best[0]:
            best = (rank, choice, learned)
    assert best is not None  # a grid has a choice
    _, choice, learned = best
    cell = {"choice": dict(choice), "tried": tried, "facts": dict(learned.facts)}
    return cell | {"variants": _variants(learned, task)}


def _variants(learned: Learned, task: Task) -> dict[str, Any]:
    """The scores of a row's predictions, and of its variants'."""
    found = scores(learned, task)
    for name, make in learned.later.items():
        found[name] = scores(Learned(**make()), task)[""]
    return found


def scores(learned: Learned, task: Task) -> dict[str, Any]:
    """Variant -> scores on the test images, on every shift, and how well its entropy tells foreign images."""
    known = learned.predict(task.test.images)
    found: dict[str, Any] = {
        variant: {"id": _sums(probs, task.test.labels), "shifts": {}, "foreign": {}} for variant, probs in known.items()
    }
    for name, shifted in task.shifts.items():
        for variant, probs in learned.predict(shifted.images).items():
            found[variant]["shifts"][name] = _sums(probs, shifted.labels)
    for name, images in task.foreign.items():
        for variant, probs in learned.predict(images).items():
            found[variant]["foreign"][name] = ood_scores(entropy(known[variant]), entropy(probs)).auroc
    return found


def _sums(probs: Tensor, labels: Tensor) -> dict[str, float]:
    nll = -probs.clamp_min(TINY).log().gather(1, labels[:, None]).mean().item()
    found = {"accuracy": accuracy(probs, labels), "nll": nll, "ece": expected_calibration_error(probs, labels)}
    return {name: round(value, 5) for name, value in found.items()}


def run(
    file: ResultFile,
    clip: CLIPModel,
    rows: dict[str, Row],
    tasks: Sequence[str],
    shots: Sequence[int],
    seeds: Sequence[int],
    wrong: float = 0.0,
    redo: bool = False,
) -> None:
    """Measure the cells that are not there."""
    file.begin()
    places = list(itertools.product(tasks, seeds, shots, rows))
    missing = [place for place in places if redo or key(*place) not in file.cells]
    bar = tqdm(missing, unit="cell", disable=not sys.stderr.isatty())
    task, name = None, None
    for place in bar:
        bar.set_postfix_str(key(*place), refresh=False)
        if place[0] != name:
            task, name = TASKS[place[0]](), place[0]
        assert task is not None  # the first place has a task
        start = time.process_time()
        cell = measure(rows[place[3]], task, clip, place[2], place[1], wrong)
        file.put(key(*place), cell | {"cell_seconds": round(time.process_time() - start, 1)})
        if bar.disable:
            found = cell["variants"][""]["id"]
            print(
                f"{key(*place)}: accuracy {found['accuracy']:.3f}, ECE {found['ece']:.3f}", file=sys.stderr, flush=True
            )


def key(task: str, seed: int, shots: int, row: str) -> str:
    """A cell's name."""
    return f"{task}/{row}/{shots}/{seed}"


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    torch.set_num_threads(1)
    if args.results is not None:
        result_files.RESULTS = args.results
    file = ResultFile("few_shot" + (f"-wrong{round(100 * args.wrong)}" if args.wrong else ""))
    if not args.table:
        clip = trained(args.weights).requires_grad_(False)
        rows = {name: ROWS[name] for name in args.rows}
        run(file, clip, rows, args.tasks, args.shots, args.seeds, args.wrong, args.redo)
    shown = ROWS | MEASURED_BEFORE
    print(file.write_markdown("Few-shot learning of a small CLIP", render(file.cells, shown, args.wrong)))
    draw_figure(file.cells, shown, file.path.with_suffix(".png"))


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--tasks", nargs="+", choices=TASKS, default=list(BENCH))
    found.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    found.add_argument("--shots", nargs="+", type=int, default=list(SHOTS))
    found.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    found.add_argument("--wrong", type=float, default=0.0, help="share of the training labels that are wrong")
    found.add_argument("--weights", type=Path, default=WEIGHTS, help="what train_clip.py wrote")
    found.add_argument("--results", type=Path, help="folder of the results; by default benchmarks/results")
    found.add_argument("--redo", action="store_true", help="measure again what is already there")
    found.add_argument("--table", action="store_true", help="measure nothing; write table and figure again")
    return found


if __name__ == "__main__":
    main()
