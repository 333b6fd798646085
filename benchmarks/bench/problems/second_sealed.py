"""Pairs of data and network that were sealed after the first sealed images had been opened and the default mended.

What the first ones showed to be missing: networks with a new classifier whose features fit the data less, and many
classes with few examples each. On none of these pairs had anything run; the pictures had been used with other networks.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable

import numpy as np
import torch
from peft import PeftModel

from benchmarks.bench.problems import hymenoptera, imagenet_kinds
from benchmarks.bench.problems.omniglot import DRAWERS, drawn_characters
from benchmarks.bench.quality_streams import (
    NUM_TEST,
    NUM_TRAIN,
    clothes,
    coloured,
    drawn_parts,
    flowers,
    letters,
    resized,
    seeded_order,
)
from benchmarks.bench.registry.problems import QualityData, QualityProblem
from benchmarks.common.backbones import mobilenet, resnet_cifar, vit_mnist_classes
from benchmarks.common.data import archive_of, data_folder, fashion_mnist, omniglot, photographs, usps
from benchmarks.common.learners import Stream

SMALL = 32  # pixels of photographs for ResNet-20
CHARACTERS = 50
MOBILENET = functools.partial(mobilenet, num_classes=10)
VIT = functools.partial(vit_mnist_classes, classes=CHARACTERS)


def _resnet(classes: int) -> Callable[..., PeftModel]:
    return functools.partial(resnet_cifar, new_classes=classes)


def digits(seed: int) -> QualityData:
    """400 of USPS's training images drawn by the seed, its first 600 test images; notMNIST is out of distribution."""
    train, test = usps("train"), usps("test")
    order = seeded_order(len(train.labels), seed)[:NUM_TRAIN]
    stream = Stream(train.images[order], train.labels[order])
    return _coloured(QualityData(stream, Stream(*test).first(NUM_TEST), letters()))


def alphabets(seed: int) -> QualityData:
    """500 images of Omniglot's first part drawn by the seed, and 600 others; Fashion-MNIST is out of distribution."""
    images, _, alphabet = omniglot(1)
    return _coloured(drawn_parts(images, alphabet, seed, clothes(), num_train=500))


def garments(seed: int) -> QualityData:
    """400 of 900 images drawn by the seed, and the others; notMNIST is out of distribution."""
    return _sized(_coloured(drawn_parts(*fashion_mnist(), seed, letters(), num_test=500)))


def kinds(seed: int) -> QualityData:
    """As :func:`.imagenet_kinds.quality`, at 32 pixels."""
    names = json.loads((data_folder() / "imagenet-1000-128px" / "class_names.json").read_text(encoding="utf-8"))
    labels = torch.tensor([imagenet_kinds.KINDS.index(imagenet_kinds.kind_of(name)) for name in names])
    images = resized(photographs(archive_of("imagenet-1000-128px/images"), np.arange(len(names))), SMALL)
    outside = flowers()
    return drawn_parts(images, labels, seed, outside.at(outside.labels != 0), 450, 550)  # no daisies


def insects(seed: int) -> QualityData:
    """As :func:`.hymenoptera.quality`, at 32 pixels."""
    return _sized(hymenoptera.quality(seed), SMALL)


def last_characters(seed: int) -> QualityData:
    """The last 50 characters of Omniglot's first part; Fashion-MNIST is out of distribution."""
    images, character, _ = omniglot(1)
    first = len(images) - CHARACTERS * DRAWERS
    return drawn_characters(images[first:], character[first:] - character[first], seed)


def _coloured(data: QualityData) -> QualityData:
    return QualityData(coloured(data.stream), coloured(data.heldout), coloured(data.ood))


def _sized(data: QualityData, side: int | None = None) -> QualityData:
    """Pictures with sides of ``side`` pixels, or as many as MobileNetV2 takes in the other problems."""
    sides = () if side is None else (side,)
    return QualityData(
        *(Stream(resized(part.inputs, *sides), part.labels) for part in (data.stream, data.heldout, data.ood))
    )


QUALITY = tuple(
    QualityProblem(name, title, load, model, classes, priority, sealed=2, is_one_of_nine=False)
    for priority, (name, title, load, model, classes) in enumerate(
        (
            (
                "usps-resnet",
                "ResNet-20 → USPS, new head: 400 digits; out of distribution: notMNIST",
                digits,
                _resnet(10),
                10,
            ),
            (
                "omniglot-1-resnet",
                "ResNet-20 → five alphabets of Omniglot, new head: 500 characters; out of distribution: Fashion-MNIST",
                alphabets,
                _resnet(5),
                5,
            ),
            (
                "imagenet-kinds-resnet",
                "ResNet-20 → six kinds of ImageNet's photographs, new head: 450 of them; out of distribution: flowers",
                kinds,
                _resnet(6),
                6,
            ),
            (
                "ants-bees-resnet",
                "ResNet-20 → ants or bees, new head: 245 photographs; out of distribution: ImageNet",
                insects,
                _resnet(2),
                2,
            ),
            (
                "fashion-mobilenet",
                "MobileNetV2 → Fashion-MNIST, new head: 400 images; out of distribution: notMNIST",
                garments,
                MOBILENET,
                10,
            ),
            (
                "omniglot-last-characters",
                "MNIST transformer → Omniglot's last 50 characters, new head: 500; out of distribution: Fashion-MNIST",
                last_characters,
                VIT,
                50,
            ),
        ),
        start=150,
    )
)
