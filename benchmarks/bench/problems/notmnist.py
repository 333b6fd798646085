"""notMNIST's letters with the transformer trained on MNIST: LoRA, a new classifier."""

from __future__ import annotations

import functools

from benchmarks.bench.quality_streams import MAX_OOD, split_in_half
from benchmarks.bench.registry.problems import QualityData, QualityProblem
from benchmarks.common.backbones import vit_mnist
from benchmarks.common.data import fashion_mnist, notmnist
from benchmarks.common.learners import Stream


def quality(seed: int) -> QualityData:
    """A seed's split; Fashion-MNIST is out of distribution."""
    return split_in_half(*notmnist(), seed, Stream(*fashion_mnist()).first(MAX_OOD))


QUALITY = QualityProblem(
    "notmnist",
    "MNIST transformer → notMNIST, new head: 1,000 letters; out of distribution: Fashion-MNIST",
    quality,
    functools.partial(vit_mnist, new_classes=True),
    classes=10,
    priority=30,
)
