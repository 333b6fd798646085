"""A filter of this package with the prior of ``KalmanConfig()``, not tuned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bayes_kf import KalmanConfig
from benchmarks.bench.learners import KalmanLearner

TITLE = "ours (`KalmanConfig()`), not tuned"
GRID: tuple[dict[str, Any], ...] = ({},)
BENCHES = ("online",)
PRIORITY = 11


def config(choice: Mapping[str, Any], seed: int) -> KalmanConfig:
    """The filter's settings."""
    return KalmanConfig(seed=seed)


def make(model: nn.Module, choice: Mapping[str, Any], seed: int, num_steps: int, inputs: Any) -> KalmanLearner:
    """A learner for this row."""
    return KalmanLearner(model, config(choice, seed), inputs)
