"""USPS's digits meet the transformer that was trained on MNIST: LoRA on queries and values."""

from __future__ import annotations

import functools
from typing import Any

from _data import usps
from torch import Tensor

from bench.problem import Sizes

TITLE = "USPS / MNIST transformer"
NETWORK, CLASSES, FRESH_HEAD = "digits-vit", 10, False
TRAIN, TEST = 7_291, 2_007
SIZES = {"online": Sizes(1000, 300, 300, 1000), "optimizers": Sizes(1000, 1000, 500, 1000)}
PRIORITY = 10


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
    return usps(split)
