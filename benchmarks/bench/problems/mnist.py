"""MNIST meets a residual network that was trained on CIFAR-10: LoRA on convolutions, a new classifier.

In place of LoKO's DenseNet-121 on MNIST.
"""

from __future__ import annotations

import functools
from typing import Any

from _data import mnist
from torch import Tensor

from bench.problem import Sizes

TITLE = "MNIST / ResNet-20 (CIFAR-10's), new head"
NETWORK, CLASSES, FRESH_HEAD = "resnet20", 10, True
TRAIN, TEST = 60_000, 10_000
SIZES = {"online": Sizes(1000, 300, 300, 1000)}
PRIORITY = 20


def train(which: Tensor) -> tuple[Any, Tensor]:
    """Training images in [0, 1] and labels."""
    return _images("train", which)


def test(which: Tensor) -> tuple[Any, Tensor]:
    """Test images in [0, 1] and labels."""
    return _images("test", which)


def _images(split: Any, which: Tensor) -> tuple[Any, Tensor]:
    images, labels = _all(split)
    return (images[which] + 1) / 2, labels[which]


@functools.cache
def _all(split: Any) -> Any:
    return mnist(split)
