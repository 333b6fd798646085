"""CIFAR-10 as JPEG with ResNet-20 trained on the clean images: LoRA on the convolutions of its last stage."""

from __future__ import annotations

import functools

from benchmarks.bench.problems.cifar10 import TEST, TRAIN, quality, test, train
from benchmarks.bench.registry.problems import QualityProblem, Sizes
from benchmarks.common.backbones import resnet_cifar

__all__ = ["TEST", "TRAIN", "test", "train"]

TITLE = "CIFAR-10 (JPEG) / ResNet-20"
NETWORK, CLASSES, FRESH_HEAD = "resnet20", 10, False
SIZES = {"online": Sizes(500, 200, 300, 1000)}
PRIORITY, EXTRA = 71, True
QUALITY = QualityProblem(
    "cifar-noisy",
    "ResNet-20 → JPEG copy, 1,000 images with one person's labels (17 % wrong); out of distribution: flowers",
    functools.partial(quality, size=1000, labels="y_random1"),
    resnet_cifar,
    classes=10,
    priority=50,
)
