"""MRPC's pairs of sentences, paraphrases or not, meet MiniLM: LoRA on queries and values, a new classifier."""

from __future__ import annotations

import functools
from typing import Any

import torch
from _quality_problems import _rows
from torch import Tensor

from bench.problem import Sizes

TITLE = "MRPC / MiniLM, new head"
NETWORK, CLASSES, FRESH_HEAD = "minilm", 2, True
TRAIN, TEST = 4_076, 1_725
SIZES = {"online": Sizes(400, 300, 200, 400)}
PRIORITY = 60


def train(which: Tensor) -> tuple[Any, Tensor]:
    """Training pairs and labels."""
    return _pairs("train", which)


def test(which: Tensor) -> tuple[Any, Tensor]:
    """Test pairs and labels."""
    return _pairs("test", which)


def _pairs(split: str, which: Tensor) -> tuple[Any, Tensor]:
    rows = _all()[split]
    chosen = [rows[i] for i in which.tolist()]
    return [(row[0], row[1]) for row in chosen], torch.tensor([row[-1] for row in chosen])


@functools.cache
def _all() -> Any:
    return _rows("mrpc")
