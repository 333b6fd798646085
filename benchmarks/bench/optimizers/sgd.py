"""Stochastic gradient descent with momentum 0.9, the rate falling linearly: GRNG's first-order baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.bench.learners import GradientLearner, trainable

TITLE = "SGD"
GRID = {
    "online": ({"lr": 1e-3}, {"lr": 3e-3}, {"lr": 1e-2}, {"lr": 3e-2}),
    "optimizers": ({"lr": 1e-2}, {"lr": 3e-2}, {"lr": 1e-1}, {"lr": 3e-1}),
}
PRIORITY = 22


def make(model: nn.Module, choice: Mapping[str, Any], seed: int, num_steps: int, inputs: Any) -> GradientLearner:
    """A learner for this row."""
    return GradientLearner(model, torch.optim.SGD(trainable(model), lr=choice["lr"], momentum=0.9), num_steps)
