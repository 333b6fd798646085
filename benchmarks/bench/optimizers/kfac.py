"""K-FAC with this package's defaults for factors and KL clip, the rate falling linearly. Martens and Grosse 2015."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bayes_kf.inference.baselines import KFAC
from benchmarks.bench.learners import GradientLearner

TITLE = "K-FAC"
GRID = (
    {"lr": 1e-3, "damping": 1e-3},
    {"lr": 1e-2, "damping": 1e-3},
    {"lr": 1e-1, "damping": 1e-3},
    {"lr": 1e-2, "damping": 1e-2},
)
PRIORITY = 30


def make(model: nn.Module, choice: Mapping[str, Any], seed: int, num_steps: int, inputs: Any) -> GradientLearner:
    """A learner for this row."""
    return GradientLearner(model, KFAC(model, choice["lr"], damping=choice["damping"], seed=seed), num_steps)
