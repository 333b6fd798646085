"""This package's filters with three widths of the prior side by side, weighted by evidence; nothing else is tuned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bayes_kf import KalmanConfig
from bench.learners import BankLearner

TITLE = "ours (three priors to the end), not tuned"
GRID: tuple[dict[str, Any], ...] = ({},)
BENCHES = ("online",)
PRIORITY = 12
SPREADS = (3.0, 1.0, 0.3)  # prior standard deviations of the outputs, in logits; the default has the first


def make(model: nn.Module, choice: Mapping[str, Any], seed: int, num_steps: int, inputs: Any) -> BankLearner:
    """A learner."""
    return BankLearner(model, [KalmanConfig(initial_logit_sd=spread, seed=seed) for spread in SPREADS], inputs)
