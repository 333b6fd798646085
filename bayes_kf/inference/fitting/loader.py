"""Batches of a loader: what each must hold, the first of them, and which one an error is about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import DivergenceError
from bayes_kf.models.batch import Inputs, batch_size, split_batch, to_device

SCALE_EXAMPLES = 32  # inputs that the prior's scale is measured on, taken from the first batches


@contextmanager
def located(index: int) -> Iterator[None]:
    """Errors of a batch say which it was."""
    try:
        yield
    except DivergenceError:
        raise
    except ValueError as error:
        raise ValueError(f"{error} (batch {index} of `loader`)") from error
    except RuntimeError as error:  # the model's own complaint
        error.add_note(f"in batch {index} of `loader`")
        raise


def scaling(kf: KalmanFilter, batches: list[Any]) -> Inputs:
    """The first batches' inputs together where they can be joined: the prior's scale is measured on them."""
    pieces = [complete(batch, index)[0] for index, batch in enumerate(batches)]
    return join([to_device(piece, kf.adapter.device) for piece in pieces])


def join(pieces: list[Inputs]) -> Inputs:
    """Inputs as one batch; the first piece alone where they do not fit together (text padded to different lengths)."""
    first = pieces[0]
    if isinstance(first, Tensor):
        same = all(isinstance(p, Tensor) and p.shape[1:] == first.shape[1:] for p in pieces)
        return torch.cat(pieces) if same else first  # type: ignore[arg-type]
    sizes = [batch_size(p) for p in pieces]
    joined: dict[str, Any] = {}
    for key, value in first.items():
        values = [p[key] for p in pieces]  # type: ignore[index]
        tensors = isinstance(value, Tensor) and value.ndim > 0
        if tensors and all(len(v) == n and v.shape[1:] == value.shape[1:] for v, n in zip(values, sizes, strict=True)):
            joined[key] = torch.cat(values)
        elif len(set(sizes)) == 1 and all(v is value or (tensors and torch.equal(v, value)) for v in values):
            joined[key] = value
        else:
            return first
    return joined


def first(batches: Iterator[Any], num_examples: int) -> list[Any]:
    """The first batches that together hold ``num_examples``, or all there are."""
    first, seen = [], 0
    for batch in batches:
        first.append(batch)
        seen += batch_size(split_batch(batch)[0])
        if seen >= num_examples:
            break
    return first


def length(loader: Iterable[Any]) -> int | None:
    """Number of batches, where the loader knows it; a DataLoader over a stream has ``__len__`` and no length."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def complete(batch: Any, index: int) -> tuple[Inputs, Tensor]:
    """Inputs and targets of a batch that must have both."""
    inputs, targets = split_batch(batch)
    if targets is None:
        raise ValueError(f"`loader` must yield targets with every batch, got none in batch {index}.")
    return inputs, targets
