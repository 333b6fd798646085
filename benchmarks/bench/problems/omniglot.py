"""Omniglot's handwriting with the transformer trained on MNIST: which alphabet, or which character.

Alphabets: five classes of about 30 characters each, in both parts of the data; hard, because the characters of an
alphabet have little in common. Characters: the first 50 of a part; ten drawers wrote the training examples, the other
ten the test examples.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

from benchmarks.bench.quality_streams import clothes, drawn_parts, seeded_order
from benchmarks.bench.registry.problems import QualityData, QualityProblem
from benchmarks.common.backbones import vit_mnist_classes
from benchmarks.common.data import omniglot
from benchmarks.common.learners import Stream

DRAWERS, CHARACTERS = 20, 50


def alphabets(part: Literal[1, 2], seed: int) -> QualityData:
    """500 images drawn by the seed and 600 others; Fashion-MNIST is out of distribution."""
    images, _, alphabet = omniglot(part)
    return drawn_parts(images, alphabet, seed, clothes(), num_train=500)


def characters(part: Literal[1, 2], seed: int) -> QualityData:
    """The first 50 characters of a part; see :func:`drawn_characters`."""
    images, character, _ = omniglot(part)
    return drawn_characters(images, character, seed)


def drawn_characters(images: Tensor, character: Tensor, seed: int) -> QualityData:
    """The first 50 characters by ten drawers of the seed's choice and by the others; clothes are the other inputs."""
    drawers, first = seeded_order(DRAWERS, seed), torch.arange(CHARACTERS)[:, None] * DRAWERS
    train, test = [(first + chosen).flatten() for chosen in (drawers[:10], drawers[10:])]
    train = train[seeded_order(len(train), seed + 1)]
    return QualityData(Stream(images[train], character[train]), Stream(images[test], character[test]), clothes())


def _alphabets(part: Literal[1, 2]) -> QualityProblem:
    return QualityProblem(
        f"omniglot-{part}",
        f"MNIST transformer → five alphabets of Omniglot's part {part}, new head: 500 characters;"
        " out of distribution: Fashion-MNIST",
        functools.partial(alphabets, part),
        functools.partial(vit_mnist_classes, classes=5),
        classes=5,
        priority=110 + part,
        is_one_of_nine=False,
    )


def _characters(part: Literal[1, 2], name: str, priority: int, sealed: bool) -> QualityProblem:
    where = "Omniglot" if part == 1 else "Omniglot's part 2"
    return QualityProblem(
        name,
        f"MNIST transformer → 50 characters of {where}, new head: 500 images; out of distribution: Fashion-MNIST",
        functools.partial(characters, part),
        functools.partial(vit_mnist_classes, classes=CHARACTERS),
        classes=CHARACTERS,
        priority=priority,
        sealed=sealed,
        is_one_of_nine=False,
    )


QUALITY = (
    _alphabets(1),
    _alphabets(2),
    _characters(1, "omniglot-characters", 113, sealed=True),
    _characters(2, "omniglot-2-characters", 114, sealed=False),  # added after the sealed images were opened
)
