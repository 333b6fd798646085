"""Fashion-MNIST's clothes with the transformer trained on MNIST: LoRA, a new classifier."""

from __future__ import annotations

import functools

from benchmarks.bench.quality_streams import drawn_parts, letters
from benchmarks.bench.registry.problems import QualityData, QualityProblem
from benchmarks.common.backbones import vit_mnist
from benchmarks.common.data import fashion_mnist


def quality(seed: int) -> QualityData:
    """400 of 900 images drawn by the seed, the others for the test; notMNIST is out of distribution."""
    return drawn_parts(*fashion_mnist(), seed, letters(), num_test=500)


QUALITY = QualityProblem(
    "fashion",
    "MNIST transformer → Fashion-MNIST, new head: 400 images; out of distribution: notMNIST",
    quality,
    functools.partial(vit_mnist, new_classes=True),
    classes=10,
    priority=110,
    is_one_of_nine=False,
)
