"""UCI's digits, which come with scikit-learn, with the transformer trained on MNIST; in no default run."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bayes_kf.data import uci_digits_split
from benchmarks.bench.registry.problems import Sizes

TITLE = "UCI digits / MNIST transformer"
NETWORK, CLASSES, FRESH_HEAD = "digits-vit", 10, False
TRAIN, TEST = 1_197, 600
SIZES: dict[str, Sizes] = {}
PRIORITY, EXTRA = 90, True


def train(which: Tensor) -> tuple[Any, Tensor]:
    """Images in [0, 1] and labels."""
    images, labels = uci_digits_split(TRAIN)[0]
    return (images[which] + 1) / 2, labels[which]


def test(which: Tensor) -> tuple[Any, Tensor]:
    """Other images and their labels."""
    images, labels = uci_digits_split(TRAIN)[1]
    return (images[which] + 1) / 2, labels[which]
