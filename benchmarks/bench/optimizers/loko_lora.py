"""LoKO (arXiv:2410.11551), equations 9 to 12: p₀ ~ Uniform(0, p0), noise by its second method.

Its own bound of p₀, 0.2, is in the grid. On LoRA, or on all parameters where there is no adapter (its LeNet-5).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bayes_kf import KalmanConfig
from benchmarks.bench.learners import KalmanLearner

TITLE = "LoKO/LoRA"
GRID = ({"p0": 0.02}, {"p0": 0.2}, {"p0": 2.0}, {"p0": 20.0})
BENCHES = ("online",)
ADAPTERS = ("lora", "full")
PRIORITY = 11


def config(choice: Mapping[str, Any], seed: int) -> KalmanConfig:
    """The filter's settings."""
    return KalmanConfig.loko(initial_variance=choice["p0"], seed=seed)


def make(model: nn.Module, choice: Mapping[str, Any], seed: int, num_steps: int, inputs: Any) -> KalmanLearner:
    """A learner for this row."""
    return KalmanLearner(model, config(choice, seed), inputs)
