"""The nine UCI regressions of the literature on Bayesian networks, with one hidden layer of 50 units from scratch.

Inputs and targets are standardized by the training examples, so that losses of different sets may be averaged. A seed's
split is one of the standard ones, counted from the last. At most 500 training and 1,000 test examples, the first in an
order of the seed.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.bench.quality_streams import seeded_order
from benchmarks.bench.registry.problems import RegressionData, RegressionProblem
from benchmarks.common.data import uci_regression
from benchmarks.common.learners import Stream

MAX_TRAIN, MAX_TEST, HIDDEN = 500, 1000, 50
DIMENSIONS = {
    "boston": 13,
    "concrete": 8,
    "energy": 8,
    "kin8nm": 8,
    "naval": 16,
    "power": 4,
    "protein": 9,
    "wine": 11,
    "yacht": 6,
}
SEALED = ("concrete", "naval", "wine", "yacht")


def load(name: str, seed: int) -> RegressionData:
    """The seed's split."""
    inputs, targets, test = uci_regression(name, -1 - seed)
    train = torch.from_numpy(np.setdiff1d(np.arange(len(targets)), test.numpy()))
    train = train[seeded_order(len(train), seed)[:MAX_TRAIN]]
    test = test[seeded_order(len(test), seed)[:MAX_TEST]]
    inputs = _standardized(inputs, inputs[train])
    targets = _standardized(targets[:, None], targets[train, None])
    return RegressionData(Stream(inputs[train], targets[train]), Stream(inputs[test], targets[test]))


def network(name: str, seed: int) -> nn.Module:
    """The network at its start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(DIMENSIONS[name], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1)).eval()


def _standardized(values: Tensor, train: Tensor) -> Tensor:
    """Float32 values with mean 0 and sd 1 over ``train``; a constant column becomes 0."""
    sd = train.std(0)
    return ((values - train.mean(0)) / torch.where(sd > 0, sd, 1.0)).float()


REGRESSION = tuple(
    RegressionProblem(
        name,
        f"UCI {name}: 50 hidden units from scratch, at most 500 examples",
        functools.partial(load, name),
        functools.partial(network, name),
        priority=300 + place,
        sealed=name in SEALED,
    )
    for place, name in enumerate(DIMENSIONS)
)
