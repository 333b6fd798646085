"""R-Kalman, ours after GRNG's abstract: the default filter; ρ‖g‖² makes the steps of its mean shorter.

Over several epochs the penalty acts in the first, which is the filter's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bayes_kf import KalmanConfig
from benchmarks.bench.learners import KalmanLearner

TITLE = "R-Kalman"
GRID = {
    "online": tuple({"rho": rho} for rho in (1e-3, 1e-2, 1e-1, 1.0)),
    "optimizers": tuple({"rho": rho, "for": "data sets"} for rho in (1e-3, 1e-2, 1e-1, 1.0)),
}
PRIORITY = 14


def config(choice: Mapping[str, Any], seed: int) -> KalmanConfig:
    """The filter's settings."""
    rank = KalmanConfig.dataset().rank if "for" in choice else KalmanConfig().rank
    return KalmanConfig(gradient_penalty=choice["rho"], gradient_penalty_form="transient", rank=rank, seed=seed)


def make(model: nn.Module, choice: Mapping[str, Any], seed: int, num_steps: int, inputs: Any) -> KalmanLearner:
    """A learner for this row."""
    return KalmanLearner(model, config(choice, seed), inputs)
