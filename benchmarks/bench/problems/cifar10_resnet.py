"""CIFAR-10 as JPEG with ResNet-20 trained on the clean images: LoRA on the convolutions of its last stage."""

from __future__ import annotations

from benchmarks.bench.problems.cifar10 import TEST, TRAIN, test, train
from benchmarks.bench.registry.problems import Sizes

__all__ = ["TEST", "TRAIN", "test", "train"]

TITLE = "CIFAR-10 (JPEG) / ResNet-20"
NETWORK, CLASSES, FRESH_HEAD = "resnet20", 10, False
SIZES = {"online": Sizes(500, 200, 300, 1000)}
PRIORITY, EXTRA = 71, True
