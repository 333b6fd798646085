"""RING, ours in the spirit of GRNG's abstract: K-FAC whose damping grows by ρ‖g‖²; otherwise as the row of K-FAC."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bayes_kf.inference.baselines import RING
from benchmarks.bench.learners import GradientLearner

TITLE = "RING"
GRID = {
    "online": tuple({"lr": lr, "rho": rho} for lr in (1e-3, 1e-2) for rho in (1e-5, 1e-4)),
    "optimizers": tuple({"lr": lr, "rho": rho} for lr in (1e-2, 1e-1) for rho in (1e-4, 1e-3)),
}
PRIORITY = 31


def make(model: nn.Module, choice: Mapping[str, Any], seed: int, num_steps: int, inputs: Any) -> GradientLearner:
    """A learner for this row."""
    return GradientLearner(model, RING(model, choice["lr"], penalty=choice["rho"], seed=seed), num_steps)
