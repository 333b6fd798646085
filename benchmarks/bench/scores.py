"""Scores of predictions, and curves for the results file."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bayes_kf.evaluation import accuracy, calibration_test
from benchmarks.bench.learners import Learner
from benchmarks.common.learners import Stream

POINTS = 50  # of a curve
WINDOW = 100  # examples of a moving average


def heldout_scores(learner: Learner, heldout: Stream, batch: int = 100) -> dict[str, float]:
    """Accuracy, log loss and calibration error of a learner's predictions, with the error's null band."""
    probs = torch.cat([learner.probs(inputs) for inputs, _ in heldout.batches(batch)])
    ece = calibration_test(probs, heldout.labels, "ece")
    tiny = torch.finfo(torch.float64).tiny
    log_prob = probs.clamp_min(tiny).log().gather(1, heldout.labels[:, None])
    return {
        "accuracy": accuracy(probs, heldout.labels),
        "nll": -log_prob.mean().item(),
        "ece": ece.value,
        "ece_null_low": ece.null_low,
        "ece_null_high": ece.null_high,
    }


def log_losses(outputs: Tensor, labels: Tensor) -> Tensor:
    """−log p(label) of logits, (B,), float64."""
    return -outputs.double().log_softmax(1).gather(1, labels[:, None]).squeeze(1)


def curve(correct: Tensor, losses: Tensor) -> dict[str, Any]:
    """Average online accuracy and moving average of the loss at some 50 steps.

    Args:
        correct: of every example, (T,).
        losses: of every example, (T,).
    """
    total = len(losses)
    if total == 0:
        return {"steps": [], "accuracy": [], "loss": []}
    stride = max(1, math.ceil(total / POINTS))
    steps = list(range(stride, total + 1, stride))
    accuracies, sums = correct.double().cumsum(0), torch.cat([torch.zeros(1), losses.cumsum(0)]).double()
    starts = [max(0, step - window(total)) for step in steps]
    return {
        "steps": steps,
        "accuracy": [round(float(accuracies[step - 1]) / step, 4) for step in steps],
        "loss": [
            round(float(sums[step] - sums[start]) / (step - start), 4)
            for step, start in zip(steps, starts, strict=True)
        ],
    }


def window(total: int) -> int:
    """Examples of a moving average: a tenth of the stream if it has fewer than a thousand."""
    return min(WINDOW, max(1, total // 10)) if total < 10 * WINDOW else WINDOW
