"""This package's defaults, not tuned: ``KalmanConfig()`` on streams, ``KalmanConfig.dataset()`` over several epochs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bayes_kf import KalmanConfig
from bench.learners import KalmanLearner

TITLE = "**ours (default)**, not tuned"
GRID = {"online": ({},), "optimizers": ({"for": "data sets"},)}
PRIORITY = 10


def config(choice: Mapping[str, Any], seed: int) -> KalmanConfig:
    """The filter's settings."""
    return KalmanConfig.dataset(seed=seed) if choice else KalmanConfig(seed=seed)


def make(model: nn.Module, choice: Mapping[str, Any], seed: int, num_steps: int, inputs: Any) -> KalmanLearner:
    """A learner."""
    return KalmanLearner(model, config(choice, seed), inputs)
