"""CoLA's sentences, acceptable or not, meet MiniLM: LoRA on queries and values, a new classifier."""

from __future__ import annotations

import functools
from typing import Any

import torch
from _quality_problems import _rows
from torch import Tensor

from bench.problem import Sizes

TITLE = "CoLA / MiniLM, new head"
NETWORK, CLASSES, FRESH_HEAD = "minilm", 2, True
TRAIN, TEST = 8_551, 527
SIZES = {"online": Sizes(500, 300, 200, 400)}
PRIORITY = 50


def train(which: Tensor) -> tuple[Any, Tensor]:
    """Training sentences and labels."""
    return _sentences("train", which)


def test(which: Tensor) -> tuple[Any, Tensor]:
    """Development sentences and labels."""
    return _sentences("dev", which)


def _sentences(split: str, which: Tensor) -> tuple[Any, Tensor]:
    rows = _all()[split]
    chosen = [rows[i] for i in which.tolist()]
    return [row[0] for row in chosen], torch.tensor([row[-1] for row in chosen])


@functools.cache
def _all() -> Any:
    return _rows("cola")
