"""MNIST from scratch with LeNet-5, all parameters trainable, as in LoKO's Figure 6."""

from __future__ import annotations

from benchmarks.bench.problems.mnist import TEST, TRAIN, test, train
from benchmarks.bench.registry.problems import Sizes

__all__ = ["TEST", "TRAIN", "test", "train"]

TITLE = "MNIST / LeNet-5 from scratch, all parameters"
NETWORK, CLASSES, FRESH_HEAD = "lenet5", 10, False
SIZES = {"online": Sizes(1000, 300, 300, 1000), "optimizers": Sizes(1000, 1000, 500, 1000)}
PRIORITY, EXTRA = 70, True
