"""Sparse Optimization (SO) on the weights themselves of the layers that LoRA would adapt, and on the classifier.

Its paper's density is for matrices of a million entries; those here have thousands, so larger densities are tried too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bayes_kf.inference.baselines.sparse import SparseOptimization
from benchmarks.bench.learners import GradientLearner

TITLE = "SO"
GRID = (
    {"lr": 2e-4, "density": 5e-4},
    {"lr": 1e-3, "density": 5e-2},
    {"lr": 5e-3, "density": 5e-2},
    {"lr": 2e-2, "density": 5e-2},
)
ADAPTERS = ("weights", "full")
PRIORITY = 34


def make(model: nn.Module, choice: Mapping[str, Any], seed: int, num_steps: int, inputs: Any) -> GradientLearner:
    """A learner for this row."""
    optimizer = SparseOptimization(model, choice["lr"], density=choice["density"], seed=seed)
    return GradientLearner(model, optimizer, num_steps)
