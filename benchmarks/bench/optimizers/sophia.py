"""Sophia-G, the rate falling linearly, without weight decay: one of GRNG's second-order baselines. Liu et al. 2023."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bayes_kf.inference.baselines.sophia import SophiaG
from benchmarks.bench.learners import GradientLearner

TITLE = "Sophia-G"
GRID = {
    "online": ({"lr": 1e-4}, {"lr": 3e-4}, {"lr": 1e-3}, {"lr": 3e-3}),
    "optimizers": ({"lr": 3e-4}, {"lr": 1e-3}, {"lr": 3e-3}, {"lr": 1e-2}),
}
PRIORITY = 33


def make(model: nn.Module, choice: Mapping[str, Any], seed: int, num_steps: int, inputs: Any) -> GradientLearner:
    """A learner for this row."""
    return GradientLearner(model, SophiaG(model, choice["lr"], seed=seed), num_steps)
