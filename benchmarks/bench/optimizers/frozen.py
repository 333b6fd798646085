"""The pre-trained network without learning: the baseline of every other row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.bench.learners import GradientLearner, trainable
from benchmarks.common.learners import Inputs, logits

TITLE = "frozen"
GRID: tuple[dict[str, Any], ...] = ({},)
BENCHES = ("online",)
PRIORITY = 60


class Frozen(GradientLearner):
    """A learner that only predicts."""

    @torch.no_grad()
    def learn(self, inputs: Inputs, labels: Tensor) -> Tensor:
        """The logits."""
        return logits(self.model, inputs)


def make(model: nn.Module, choice: Mapping[str, Any], seed: int, num_steps: int, inputs: Any) -> Frozen:
    """A learner for this row."""
    return Frozen(model, torch.optim.SGD(trainable(model), lr=0.0))
