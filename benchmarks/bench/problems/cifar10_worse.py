"""CIFAR-10 as JPEG with the small vision transformer, learned from the worst of three people's labels (40 % wrong)."""

from __future__ import annotations

from benchmarks.bench.problems import cifar10
from benchmarks.bench.quality_streams import NUM_TEST
from benchmarks.bench.registry.problems import QualityData, QualityProblem
from benchmarks.common.backbones import vit_cifar


def quality(seed: int) -> QualityData:
    """500 training images drawn by the seed, and the first 600 test images, with clean labels; flowers are OOD."""
    train, test, ood, _ = cifar10.quality(seed, 500, "y_worse")
    return QualityData(train, test.first(NUM_TEST), ood)


QUALITY = QualityProblem(
    "cifar-worse",
    "CIFAR-10 transformer → JPEG copy, 500 images with one person's worst labels (40 % wrong);"
    " out of distribution: flowers",
    quality,
    vit_cifar,
    classes=10,
    priority=141,
    sealed=True,
    is_one_of_nine=False,
)
