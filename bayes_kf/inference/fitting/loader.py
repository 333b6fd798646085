"""The first batches of a data loader, and the number of all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.fitting.loop import inputs_and_targets
from bayes_kf.models.batch import Inputs, batch_size, split_batch, to_device
from bayes_kf.processes import shared_work

SCALE_EXAMPLES = 32  # first examples, on which the scale of the prior is measured


def num_batches(loader: Iterable[Any]) -> int | None:
    """The number of batches, or None; a DataLoader over a stream has ``__len__`` but no length."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def first_batches(batches: Iterator[Any], least: int = SCALE_EXAMPLES) -> list[Any]:
    """The first batches, which together hold at least ``least`` examples or all there are."""
    first, examples = list[Any](), 0
    for batch in shared_work.same_batches(batches):
        first.append(batch)
        examples += batch_size(split_batch(batch)[0])
        if examples >= least:
            break
    return first


def scale_inputs(kf: KalmanFilter, batches: list[Any]) -> Inputs:
    """The inputs on which the scale of the prior is measured: those of the first batches, concatenated if possible."""
    pieces = [inputs_and_targets(batch, number)[0] for number, batch in enumerate(batches)]
    return concatenate_inputs([to_device(piece, kf.adapter.device) for piece in pieces])


def concatenate_inputs(pieces: list[Inputs]) -> Inputs:
    """Inputs as one batch, or the first piece if their shapes differ (text padded to different lengths)."""
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
