"""Photographs of daisies, dandelions, roses, sunflowers and tulips of 32 pixels, with two networks and new classifiers.

MobileNetV2 sees them enlarged to 96 pixels; ResNet-20, trained on CIFAR-10, as they are.
"""

from __future__ import annotations

import functools

import numpy as np
from torch import Tensor

from benchmarks.bench.quality_streams import (
    NUM_TEST,
    NUM_TRAIN,
    SIDE,
    flowers,
    imagenet_without_flowers,
    resized,
    seeded_order,
)
from benchmarks.bench.registry.problems import QualityData, QualityProblem
from benchmarks.common.backbones import mobilenet, resnet_cifar
from benchmarks.common.data import archive_of
from benchmarks.common.learners import Stream


def quality(side: int, seed: int) -> QualityData:
    """400 training photographs drawn by the seed and 600 of the test part; ImageNet is out of distribution."""
    is_test = archive_of("flowers5-32px/flowers")["is_test"].astype(bool)
    train, test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    train = train[seeded_order(len(train), seed)[:NUM_TRAIN].numpy()]
    test = test[seeded_order(len(test), 0)[:NUM_TEST].numpy()]
    return QualityData(_enlarged(flowers(train), side), _enlarged(flowers(test), side), imagenet_without_flowers(side))


def _enlarged(stream: Stream, side: int) -> Stream:
    assert isinstance(stream.inputs, Tensor)
    return Stream(resized(stream.inputs, side), stream.labels)


QUALITY = (
    QualityProblem(
        "flowers",
        "MobileNetV2 → five kinds of flowers, new head: 400 photographs; out of distribution: ImageNet",
        functools.partial(quality, SIDE),
        functools.partial(mobilenet, num_classes=5),
        classes=5,
        priority=120,
        is_one_of_nine=False,
    ),
    QualityProblem(
        "flowers-resnet",
        "ResNet-20 → five kinds of flowers, new head: 400 photographs; out of distribution: ImageNet",
        functools.partial(quality, 32),
        functools.partial(resnet_cifar, new_classes=5),
        classes=5,
        priority=121,
        sealed=True,
        is_one_of_nine=False,
    ),
)
