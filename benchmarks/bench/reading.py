"""Readers of the bench's data sets: functions of indices over images or texts that are read once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.text import rows_of

Read = Callable[[Tensor], tuple[Any, Tensor]]


def images(read: Callable[..., Any]) -> tuple[Read, Read]:
    """``train`` and ``test`` of a data set of images.

    Args:
        read: from "train" or "test" to images (N, C, H, W) in [-1, 1] and labels (N,).
    """
    cached = functools.cache(read)

    def some(split: str, which: Tensor) -> tuple[Any, Tensor]:
        pictures, labels = cached(split)
        return (pictures[which] + 1) / 2, labels[which]

    return functools.partial(some, "train"), functools.partial(some, "test")


def texts(name: str, test: str, pairs: bool = False) -> tuple[Read, Read]:
    """``train`` and ``test`` of a data set of texts, whose rows end with the label.

    Args:
        name: of its file.
        test: the test split.
        pairs: whether a row starts with two texts.
    """
    cached = functools.cache(lambda: rows_of(name))

    def some(split: str, which: Tensor) -> tuple[Any, Tensor]:
        chosen = [cached()[split][i] for i in which.tolist()]
        return [(row[0], row[1]) if pairs else row[0] for row in chosen], torch.tensor([row[-1] for row in chosen])

    return functools.partial(some, "train"), functools.partial(some, test)
