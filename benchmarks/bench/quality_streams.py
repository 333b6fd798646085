"""Seeded orders, splits and out-of-distribution inputs of the data sets in the benches of posteriors.

Streams are short, because adapters are fitted where labels are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench.registry.problems import QualityData
from benchmarks.common.data import archive_of, fashion_mnist, notmnist, photographs
from benchmarks.common.learners import Stream
from benchmarks.common.text import rows_of, sentences, tokenized

MAX_OOD = 500  # out-of-distribution inputs
NUM_TRAIN, NUM_TEST = 400, 600  # examples of the sets that are not among the nine
TEST_SEED = 12_345  # of test examples that are the same for all seeds
SIDE = 96  # pixels of photographs for MobileNetV2
FLOWERS_OF_IMAGENET = (984, 985, 986)  # rapeseed, daisy, yellow lady's slipper


def seeded_order(size: int, seed: int) -> Tensor:
    """A seed's permutation of ``size`` indices, (size,)."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def split_in_half(images: Tensor, labels: Tensor, seed: int, ood: Stream) -> QualityData:
    """1,000 training examples and 1,000 other test examples, drawn by the seed."""
    order = seeded_order(len(labels), seed)
    first, rest = order[:1000], order[1000:2000]
    return QualityData(Stream(images[first], labels[first]), Stream(images[rest], labels[rest]), ood)


def letters() -> Stream:
    """notMNIST's first letters, out of distribution for digits and characters."""
    return Stream(*notmnist()).first(MAX_OOD)


def labelled_sentences(name: str, seed: int) -> QualityData:
    """1,000 training sentences drawn by the seed; questions about banking are out of distribution."""
    order = seeded_order(len(rows_of(name)["train"]), seed)[:1000]
    questions = [row[0] for row in rows_of("banking77")["test"][:MAX_OOD]]
    return QualityData(sentences(name, "train", order), sentences(name, "dev"), unlabelled(questions))


def unlabelled(texts: list[str]) -> Stream:
    """Texts with labels of no meaning."""
    return Stream(tokenized(texts), torch.zeros(len(texts), dtype=torch.long))


def drawn_parts(
    images: Tensor, labels: Tensor, seed: int, ood: Stream, num_train: int = NUM_TRAIN, num_test: int = NUM_TEST
) -> QualityData:
    """Training examples and other test examples, both drawn by the seed."""
    order = seeded_order(len(labels), seed)
    first, rest = order[:num_train], order[num_train : num_train + num_test]
    return QualityData(Stream(images[first], labels[first]), Stream(images[rest], labels[rest]), ood)


def clothes() -> Stream:
    """The first images of Fashion-MNIST, out of distribution for letters and characters."""
    return Stream(*fashion_mnist()).first(MAX_OOD)


def coloured(stream: Stream) -> Stream:
    """Grey images (N, 1, 28, 28) in [-1, 1] in a black frame, (N, 3, 32, 32) in [0, 1], for networks of CIFAR-10."""
    assert isinstance(stream.inputs, Tensor)
    framed = F.pad((stream.inputs + 1) / 2, (2, 2, 2, 2))
    return Stream(framed.expand(-1, 3, -1, -1).contiguous(), stream.labels)


def resized(images: Tensor, side: int = SIDE) -> Tensor:
    """Photographs (N, 3, H, W) with sides of ``side`` pixels."""
    return F.interpolate(images, (side, side), mode="bilinear", align_corners=False, antialias=True)


def flowers(which: Tensor | np.ndarray | None = None) -> Stream:
    """Photographs of five kinds of flowers, (N, 3, 32, 32); by default the first test ones, out of distribution."""
    archive = archive_of("flowers5-32px/flowers")
    chosen = np.flatnonzero(archive["is_test"])[:MAX_OOD] if which is None else np.asarray(which)
    return Stream(photographs(archive, chosen), torch.from_numpy(archive["y"][chosen]).long())


def imagenet_without_flowers(side: int) -> Stream:
    """Every fourth photograph of ImageNet that shows no flower."""
    chosen = np.array([i for i in range(0, 1000, 4) if i not in FLOWERS_OF_IMAGENET])
    pictures = resized(photographs(archive_of("imagenet-1000-128px/images"), chosen), side)
    return Stream(pictures, torch.zeros(len(chosen), dtype=torch.long))


def drawn_texts(
    rows: Sequence[Sequence[Any]], test_rows: Sequence[Sequence[Any]] | None, seed: int, num_train: int = NUM_TRAIN
) -> QualityData:
    """Training texts drawn by the seed; queries that CLINC150 calls out of scope are out of distribution.

    Args:
        rows: texts first, labels last. Classes are numbered in the order of the sorted labels.
        test_rows: the test texts are drawn from these with one seed for all; None: those that follow the training
            texts in the order of the seed.
        seed: of the training texts.
        num_train: their number.
    """
    number = {name: i for i, name in enumerate(sorted({row[-1] for row in rows}))}
    order = seeded_order(len(rows), seed)
    if test_rows is None:
        test = [rows[i] for i in order[num_train : num_train + NUM_TEST].tolist()]
    else:
        test = [test_rows[i] for i in seeded_order(len(test_rows), TEST_SEED)[:NUM_TEST].tolist()]
    train = [rows[i] for i in order[:num_train].tolist()]
    outside = unlabelled([row[0] for row in rows_of("clinc150")["oos_test"][:MAX_OOD]])
    return QualityData(_labelled(train, number), _labelled(test, number), outside)


def _labelled(rows: Sequence[Sequence[Any]], number: dict[Any, int]) -> Stream:
    return Stream(tokenized([row[0] for row in rows]), torch.tensor([number[row[-1]] for row in rows]))
