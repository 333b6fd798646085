"""CIFAR-10 as JPEG meets a small vision transformer trained on the clean images: LoRA on its feed-forward layers."""

from __future__ import annotations

import functools
from typing import Any

import torch
from _quality_problems import _archive, _photographs
from torch import Tensor

from bench.problem import Sizes

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
    return _photographs(archive, which.numpy()), torch.from_numpy(archive["y"])[which].long()


@functools.cache
def _all(name: str) -> Any:
    return _archive(name)
