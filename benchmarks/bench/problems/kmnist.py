"""KMNIST's cursive Japanese characters with the transformer trained on MNIST: LoRA, a new classifier.

KMNIST's test images are split here, because the data folder has no others; not in a default run of the optimizer bench.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from benchmarks.bench.quality_streams import letters, split_in_half
from benchmarks.bench.registry.problems import QualityData, QualityProblem, Sizes
from benchmarks.common.backbones import vit_mnist
from benchmarks.common.data import kmnist

TITLE = "KMNIST / MNIST transformer, new head"
NETWORK, CLASSES, FRESH_HEAD = "digits-vit", 10, True
TRAIN, TEST = 8_000, 2_000
SIZES: dict[str, Sizes] = {}
PRIORITY, EXTRA = 91, True


def train(which: Tensor) -> tuple[Any, Tensor]:
    """The first 8,000 images, in [0, 1], and labels."""
    return _part(slice(TRAIN), which)


def test(which: Tensor) -> tuple[Any, Tensor]:
    """The other images and their labels."""
    return _part(slice(TRAIN, None), which)


def _part(part: slice, which: Tensor) -> tuple[Any, Tensor]:
    images, labels = _all()
    return (images[part][which] + 1) / 2, labels[part][which]


@functools.cache
def _all() -> Any:
    return kmnist()


def quality(seed: int) -> QualityData:
    """A seed's split; notMNIST's letters are out of distribution."""
    return split_in_half(*kmnist(), seed, letters())


QUALITY = QualityProblem(
    "kmnist",
    "MNIST transformer → KMNIST, new head: 1,000 characters; out of distribution: notMNIST",
    quality,
    functools.partial(vit_mnist, new_classes=True),
    classes=10,
    priority=20,
)
