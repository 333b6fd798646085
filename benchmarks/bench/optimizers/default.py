"""``fit`` without settings: ``KalmanConfig.stream()``, or ``KalmanConfig.dataset()`` over several epochs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bayes_kf import KalmanConfig
from bayes_kf.inference.fitting.selection.filter_bank import candidates
from benchmarks.bench.learners import BankLearner, KalmanLearner, Learner

TITLE = "**ours (default)**, not tuned"
GRID = {"online": ({},), "optimizers": ({"for": "data sets"},)}
PRIORITY = 10


def config(choice: Mapping[str, Any], seed: int) -> KalmanConfig:
    """The settings of ``fit``."""
    return KalmanConfig.dataset(seed=seed) if choice else KalmanConfig.stream(seed=seed)


def make(model: nn.Module, choice: Mapping[str, Any], seed: int, num_steps: int, inputs: Any) -> Learner:
    """A learner for this row."""
    settings = config(choice, seed)
    if settings.tune is None:
        return KalmanLearner(model, settings, inputs)
    several = candidates(settings, settings.tune)
    return BankLearner(model, several, inputs, until=settings.tune_examples, margin=settings.tune_margin)
