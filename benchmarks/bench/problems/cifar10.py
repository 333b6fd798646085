"""CIFAR-10 as JPEG with a small vision transformer trained on the clean images: LoRA on its feed-forward layers."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.bench.quality_streams import MAX_OOD, seeded_order
from benchmarks.bench.registry.problems import QualityData, QualityProblem, Sizes
from benchmarks.common.backbones import vit_cifar
from benchmarks.common.data import archive_of, photographs
from benchmarks.common.learners import Stream

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


def quality(seed: int, size: int = 500, labels: str = "y") -> QualityData:
    """``size`` training images drawn by the seed, and the first 1,000 test images; flowers are out of distribution."""
    train, test = archive_of("cifar10-jpeg/train_00000-24999"), archive_of("cifar10-jpeg/test")
    order = seeded_order(len(train["y"]), seed)[:size].numpy()
    counts = torch.from_numpy(test["human_counts"][:1000]).double()
    return QualityData(
        Stream(photographs(train, order), torch.from_numpy(train[labels][order]).long()),
        Stream(photographs(test, np.arange(1000)), torch.from_numpy(test["y"][:1000]).long()),
        _flowers(32),
        counts / counts.sum(1, keepdim=True),
    )


def _flowers(side: int) -> Stream:
    archive = archive_of("flowers5-32px/flowers")
    images = photographs(archive, np.flatnonzero(archive["is_test"])[:MAX_OOD])
    assert images.shape[-1] == side, f"flowers are of {images.shape[-1]} pixels"
    return Stream(images, torch.zeros(len(images), dtype=torch.long))


QUALITY = QualityProblem(
    "cifar-few",
    "CIFAR-10 transformer → JPEG copy, 500 images; out of distribution: flowers",
    quality,
    vit_cifar,
    classes=10,
    priority=40,
)
