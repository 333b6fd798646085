"""CIFAR-10 as JPEG, enlarged to 96 pixels, with MobileNetV2 trained on ImageNet: LoRA, a new classifier."""

from __future__ import annotations

import functools

from torch import Tensor

from benchmarks.bench.problems import cifar10
from benchmarks.bench.quality_streams import NUM_TEST, NUM_TRAIN, resized
from benchmarks.bench.registry.problems import QualityData, QualityProblem
from benchmarks.common.backbones import mobilenet
from benchmarks.common.learners import Stream


def quality(seed: int) -> QualityData:
    """400 training images drawn by the seed, and the first 600 test images; flowers are out of distribution."""
    train, test, ood, _ = cifar10.quality(seed, NUM_TRAIN)
    return QualityData(_enlarged(train), _enlarged(test.first(NUM_TEST)), _enlarged(ood))


def _enlarged(stream: Stream) -> Stream:
    assert isinstance(stream.inputs, Tensor)
    return Stream(resized(stream.inputs), stream.labels)


QUALITY = QualityProblem(
    "cifar-mobilenet",
    "MobileNetV2 → CIFAR-10, new head: 400 images; out of distribution: flowers",
    quality,
    functools.partial(mobilenet, num_classes=10),
    classes=10,
    priority=140,
    sealed=True,
    is_one_of_nine=False,
)
