"""AdamW as LoKO's baseline (section 5.1): the rate falls linearly, weight decay 1e-4; its 1e-4 is in the online grid.

Loshchilov and Hutter 2017.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.bench.learners import GradientLearner, trainable

TITLE = "AdamW"
GRID = {
    "online": ({"lr": 1e-4}, {"lr": 1e-3}, {"lr": 3e-3}, {"lr": 1e-2}),
    "optimizers": ({"lr": 1e-3}, {"lr": 3e-3}, {"lr": 1e-2}, {"lr": 3e-2}),
}
PRIORITY = 20


def make(model: nn.Module, choice: Mapping[str, Any], seed: int, num_steps: int, inputs: Any) -> GradientLearner:
    """A learner for this row."""
    optimizer = torch.optim.AdamW(trainable(model), lr=choice["lr"], weight_decay=1e-4)
    return GradientLearner(model, optimizer, decay_over=num_steps)
