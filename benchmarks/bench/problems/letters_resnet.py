"""KMNIST's characters, notMNIST's letters and Fashion-MNIST's clothes with ResNet-20, trained on CIFAR-10.

LoRA, a new classifier. The clothes were added after the sealed images were opened, so that development has such a pair.
"""

from __future__ import annotations

import functools

from benchmarks.bench.quality_streams import clothes, coloured, drawn_parts, letters
from benchmarks.bench.registry.problems import QualityData, QualityProblem
from benchmarks.common.backbones import resnet_cifar
from benchmarks.common.data import fashion_mnist, kmnist, notmnist


def characters(seed: int) -> QualityData:
    """400 characters drawn by the seed, and 600 others; notMNIST is out of distribution."""
    return _coloured(drawn_parts(*kmnist(), seed, letters()))


def roman_letters(seed: int) -> QualityData:
    """400 letters drawn by the seed, and 600 others; Fashion-MNIST is out of distribution."""
    return _coloured(drawn_parts(*notmnist(), seed, clothes()))


def garments(seed: int) -> QualityData:
    """400 of 900 images drawn by the seed, the others for the test; notMNIST is out of distribution."""
    return _coloured(drawn_parts(*fashion_mnist(), seed, letters(), num_test=500))


def _coloured(data: QualityData) -> QualityData:
    return QualityData(coloured(data.stream), coloured(data.heldout), coloured(data.ood))


QUALITY = (
    QualityProblem(
        "kmnist-resnet",
        "ResNet-20 → KMNIST, new head: 400 characters; out of distribution: notMNIST",
        characters,
        functools.partial(resnet_cifar, new_classes=10),
        classes=10,
        priority=142,
        sealed=True,
        is_one_of_nine=False,
    ),
    QualityProblem(
        "notmnist-resnet",
        "ResNet-20 → notMNIST, new head: 400 letters; out of distribution: Fashion-MNIST",
        roman_letters,
        functools.partial(resnet_cifar, new_classes=10),
        classes=10,
        priority=143,
        sealed=True,
        is_one_of_nine=False,
    ),
    QualityProblem(
        "fashion-resnet",
        "ResNet-20 → Fashion-MNIST, new head: 400 images; out of distribution: notMNIST",
        garments,
        functools.partial(resnet_cifar, new_classes=10),
        classes=10,
        priority=144,
        is_one_of_nine=False,
    ),
)
