"""MNIST with a residual network trained on CIFAR-10: LoRA on convolutions, a new classifier.

In place of LoKO's DenseNet-121 on MNIST.
"""

from __future__ import annotations

from benchmarks.bench.reading import images
from benchmarks.bench.registry.problems import Sizes
from benchmarks.common.data import mnist

TITLE = "MNIST / ResNet-20 (CIFAR-10's), new head"
NETWORK, CLASSES, FRESH_HEAD = "resnet20", 10, True
TRAIN, TEST = 60_000, 10_000
SIZES = {"online": Sizes(1000, 300, 300, 1000)}
PRIORITY = 20
train, test = images(mnist)
