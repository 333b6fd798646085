"""AdaGrad as LoKO's baseline (section 5.1): no weight decay; its rate 1e-3 is in the grid. Duchi et al. 2011."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.bench.learners import GradientLearner, trainable

TITLE = "AdaGrad"
GRID = ({"lr": 1e-3}, {"lr": 1e-2}, {"lr": 3e-2}, {"lr": 1e-1})
PRIORITY = 21


def make(model: nn.Module, choice: Mapping[str, Any], seed: int, num_steps: int, inputs: Any) -> GradientLearner:
    """A learner for this row."""
    return GradientLearner(model, torch.optim.Adagrad(trainable(model), lr=choice["lr"]))
