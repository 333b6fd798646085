"""USPS's digits with the transformer trained on MNIST: LoRA on queries and values."""

from __future__ import annotations

from benchmarks.bench.reading import images
from benchmarks.bench.registry.problems import Sizes
from benchmarks.common.data import usps

TITLE = "USPS / MNIST transformer"
NETWORK, CLASSES, FRESH_HEAD = "digits-vit", 10, False
TRAIN, TEST = 7_291, 2_007
SIZES = {"online": Sizes(1000, 300, 300, 1000), "optimizers": Sizes(1000, 1000, 500, 1000)}
PRIORITY = 10
train, test = images(usps)
