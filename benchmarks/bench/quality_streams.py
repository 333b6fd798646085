"""Seeded orders, splits and out-of-distribution inputs of the posterior-quality bench's data sets.

Streams are short, because adapters are fitted where labels are few.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.bench.registry.problems import QualityData
from benchmarks.common.data import notmnist
from benchmarks.common.learners import Stream
from benchmarks.common.text import rows_of, sentences, tokenized

MAX_OOD = 500  # out-of-distribution inputs


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
