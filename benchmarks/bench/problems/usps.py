"""USPS's digits with the transformer trained on MNIST: LoRA on queries and values."""

from __future__ import annotations

from benchmarks.bench.quality_streams import letters, seeded_order
from benchmarks.bench.reading import images
from benchmarks.bench.registry.problems import QualityData, QualityProblem, Sizes
from benchmarks.common.backbones import vit_mnist
from benchmarks.common.data import usps
from benchmarks.common.learners import Stream

TITLE = "USPS / MNIST transformer"
NETWORK, CLASSES, FRESH_HEAD = "digits-vit", 10, False
TRAIN, TEST = 7_291, 2_007
SIZES = {"online": Sizes(1000, 300, 300, 1000), "optimizers": Sizes(1000, 1000, 500, 1000)}
PRIORITY = 10
train, test = images(usps)


def quality(seed: int) -> QualityData:
    """1,000 training images drawn by the seed, and the first 1,000 test images; notMNIST is out of distribution."""
    train, test = usps("train"), usps("test")
    order = seeded_order(len(train.labels), seed)[:1000]
    return QualityData(Stream(train.images[order], train.labels[order]), Stream(*test).first(1000), letters())


QUALITY = QualityProblem(
    "usps",
    "MNIST transformer → USPS: 1,000 digits; out of distribution: notMNIST's letters",
    quality,
    vit_mnist,
    classes=10,
    priority=10,
)
