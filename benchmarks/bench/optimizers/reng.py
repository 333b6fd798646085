"""RENG, ours in the spirit of GRNG's abstract: K-FAC on g + ρHg by double backward; otherwise as the row of K-FAC."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bayes_kf.inference.baselines import RENG
from benchmarks.bench.learners import GradientLearner

TITLE = "RENG"
GRID = {
    "online": tuple({"lr": lr, "rho": rho} for lr in (1e-3, 1e-2) for rho in (1e-3, 1e-2)),
    "optimizers": tuple({"lr": lr, "rho": rho} for lr in (1e-2, 1e-1) for rho in (1e-2, 1e-1)),
}
PRIORITY = 32


def make(model: nn.Module, choice: Mapping[str, Any], seed: int, num_steps: int, inputs: Any) -> GradientLearner:
    """A learner for this row."""
    optimizer = RENG(model, choice["lr"], penalty=choice["rho"], seed=seed)
    return GradientLearner(model, optimizer, num_steps, optimizer.forward)
