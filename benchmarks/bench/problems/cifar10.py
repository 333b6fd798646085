"""CIFAR-10 as JPEG with a small vision transformer trained on the clean images: LoRA on its feed-forward layers."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench.registry.problems import Sizes
from benchmarks.common.data import archive_of, photographs

TITLE = "CIFAR-10 (JPEG) / ViT"
NETWORK, CLASSES, FRESH_HEAD = "vit-cifar10", 10, False
TRAIN, TEST = 25_000, 10_000
SIZES = {"online": Sizes(500, 200, 300, 1000)}
PRIORITY = 30


def train(which: Tensor) -> tuple[Any, Tensor]:
    """Training images in [0, 1] and clean labels."""
    return _images("cifar10-jpeg/train_00000-24999", which)


def test(which: Tensor) -> tuple[Any, Tensor]:
    """Test images in [0, 1] and labels."""
    return _images("cifar10-jpeg/test", which)


def _images(name: str, which: Tensor) -> tuple[Any, Tensor]:
    archive = _all(name)
    return photographs(archive, which.numpy()), torch.from_numpy(archive["y"])[which].long()


@functools.cache
def _all(name: str) -> Any:
    return archive_of(name)
