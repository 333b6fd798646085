"""Few-shot learning of a CLIP, as the papers on CLIP measure it: k images of every class.

A small CLIP (``train_clip.py``) learns classes from 1, 2, 4, 8 and 16 images each. Rows: zero-shot, CLIP-LoRA, Sparse
Optimization, Tip-Adapter-F, feature adapters by AdamW, and this package's filters over LoRA or feature adapters with
both observation models of ``bayes_kf.models.clip``. Validation shots (as many, at most four a class) are drawn before
training shots. Every row chooses on them from its own grid, by accuracy and then by log loss, and its temperatures. The
tables have accuracy, calibration error and log loss on test images (ID) and on shifted ones (OOD), and the AUROC of
entropy as a detector of out-of-distribution images. Data is read from ../shared/data or $BAYES_KF_DATA.

    OMP_NUM_THREADS=1 python -m benchmarks.few_shot.run                    # everything; a stopped run continues
    OMP_NUM_THREADS=1 python -m benchmarks.few_shot.run --rows kalman-lora --tasks letters --shots 4
    OMP_NUM_THREADS=1 python -m benchmarks.few_shot.run --wrong 0.25       # a quarter of the training labels are wrong
    python -m benchmarks.few_shot.run --table                              # table and figure from existing results
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPModel

from bayes_kf.evaluation import accuracy, entropy, expected_calibration_error, ood_scores
from bayes_kf.models.clip import prompt_tokens
from benchmarks.common.command import Command, run_cells
from benchmarks.common.result_files import ResultFile
from benchmarks.few_shot.clip import WEIGHTS, LetterTokenizer, trained
from benchmarks.few_shot.figure import draw_figure
from benchmarks.few_shot.learn import Learned, Row, Setting
from benchmarks.few_shot.rows import MEASURED_BEFORE, ROWS
from benchmarks.few_shot.table import render
from benchmarks.few_shot.tasks import BENCH, SHOTS, TASKS, Task, draw, relabelled

SEEDS = (1, 2, 3)  # seed 0 served to find the grids
TINY = torch.finfo(torch.float64).tiny


def measure(row: Row, task: Task, clip: CLIPModel, shots: int, seed: int, wrong: float = 0.0) -> dict[str, Any]:
    """A row's choice, its other settings, and the scores of its predictions."""
    drawn = draw(task.pool, shots, seed)
    training = relabelled(drawn.training, wrong, seed)
    tokens = prompt_tokens(LetterTokenizer(), task.pool.names)
    setting = Setting(clip, tokens, training, drawn.validation, shots, seed)
    tried, best = [], None
    for choice in row.grid:
        start = time.process_time()
        learned = row.learn(setting, choice)
        seconds = time.process_time() - start
        scored = _sums(learned.predict(setting.validation.images)[""], setting.validation.labels)
        tried.append(
            dict(choice) | {"nll": scored["nll"], "accuracy": scored["accuracy"], "seconds": round(seconds, 2)}
        )
        if row.tests_all:
            tested = scores(learned, task)[""]
            tried[-1]["test"] = {"id": tested["id"], "shifts": tested["shifts"]}
        rank = (-scored["accuracy"], scored["nll"])
        if best is None or rank < best[0]:
            best = (rank, choice, learned)
    assert best is not None  # a grid has a choice
    _, choice, learned = best
    cell = {"choice": dict(choice), "tried": tried, "facts": dict(learned.facts)}
    return cell | {"variants": _variants(learned, task)}


def _variants(learned: Learned, task: Task) -> dict[str, Any]:
    """The scores of a row's predictions and of its variants."""
    variants = scores(learned, task)
    for name, make in learned.later.items():
        variants[name] = scores(Learned(**make()), task)[""]
    return variants


def scores(learned: Learned, task: Task) -> dict[str, Any]:
    """Variant -> scores on test images and on every shift, and AUROC of entropy for out-of-distribution images."""
    known = learned.predict(task.test.images)
    variants: dict[str, Any] = {
        variant: {"id": _sums(probs, task.test.labels), "shifts": {}, "foreign": {}} for variant, probs in known.items()
    }
    for name, shifted in task.shifts.items():
        for variant, probs in learned.predict(shifted.images).items():
            variants[variant]["shifts"][name] = _sums(probs, shifted.labels)
    for name, images in task.foreign.items():
        for variant, probs in learned.predict(images).items():
            variants[variant]["foreign"][name] = ood_scores(entropy(known[variant]), entropy(probs)).auroc
    return variants


def _sums(probs: Tensor, labels: Tensor) -> dict[str, float]:
    nll = -probs.clamp_min(TINY).log().gather(1, labels[:, None]).mean().item()
    sums = {"accuracy": accuracy(probs, labels), "nll": nll, "ece": expected_calibration_error(probs, labels)}
    return {name: round(value, 5) for name, value in sums.items()}


def show(cell: dict[str, Any]) -> str:
    """A measured cell in one line."""
    scored = cell["variants"][""]["id"]
    return f"accuracy {scored['accuracy']:.3f}, ECE {scored['ece']:.3f}"


def key(task: str, seed: int, shots: int, row: str) -> str:
    """The key of a cell."""
    return f"{task}/{row}/{shots}/{seed}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    command = Command(__doc__).names("--tasks", TASKS, BENCH, "data sets").names("--rows", ROWS)
    command.numbers("--shots", SHOTS, "images of every class").numbers("--seeds", SEEDS, "seeds")
    command.option("--wrong", type=float, default=0.0, help="share of the training labels that are wrong")
    command.option("--weights", type=Path, default=WEIGHTS, help="output of train_clip.py").redo().table()
    args = command.parse(arguments)
    file = ResultFile("few_shot" + (f"-wrong{round(100 * args.wrong)}" if args.wrong else ""))
    if not args.table:
        clip = trained(args.weights).requires_grad_(False)
        task_of = lru_cache(maxsize=1)(lambda name: TASKS[name]())

        def measured(name: str, seed: int, shots: int, row: str) -> dict[str, Any]:
            start = time.process_time()
            cell = measure(ROWS[row], task_of(name), clip, shots, seed, args.wrong)
            return cell | {"cell_seconds": round(time.process_time() - start, 1)}

        places = itertools.product(args.tasks, args.seeds, args.shots, args.rows)
        run_cells(file, {key(*place): partial(measured, *place) for place in places}, args.redo, show)
    shown = ROWS | MEASURED_BEFORE
    print(file.write_markdown("Few-shot learning of a small CLIP", render(file.cells, shown, args.wrong)))
    draw_figure(file.cells, shown, file.path.with_suffix(".png"))


if __name__ == "__main__":
    main()
