"""The network as it came, which learns nothing: what every other row has to better."""

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
    """Predicts only."""

    @torch.no_grad()
    def learn(self, inputs: Inputs, labels: Tensor) -> Tensor:
        """The logits."""
        return logits(self.model, inputs)


def make(model: nn.Module, choice: Mapping[str, Any], seed: int, num_steps: int, inputs: Any) -> Frozen:
    """A learner."""
    return Frozen(model, torch.optim.SGD(trainable(model), lr=0.0))
