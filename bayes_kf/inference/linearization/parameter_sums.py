"""Sums over parameters, where every process of a group holds some of them; in one process nothing is added.

A covariance structure is written for whole vectors. What it sums over parameters it passes through :func:`total`, and
what it decides by looking at parameters through :func:`agreed`, so that the same code serves the shard of a belief:
``bayes_kf.distributed`` says which process holds what, and how sums are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_sum: ContextVar[Callable[[Tensor], Tensor] | None] = ContextVar("sum over processes", default=None)


@contextmanager
def sharded(over_processes: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, vectors of parameters are shards; the argument sums a tensor over all processes."""
    token = _sum.set(over_processes)
    try:
        yield
    finally:
        _sum.reset(token)


@contextmanager
def unsharded() -> Iterator[None]:
    """Inside, vectors of parameters are whole again, also within :func:`sharded`."""
    token = _sum.set(None)
    try:
        yield
    finally:
        _sum.reset(token)


def is_sharded() -> bool:
    """Whether vectors of parameters are shards here."""
    return _sum.get() is not None


def sum_over_shards(tensor: Tensor) -> Tensor:
    """A sum over this process's parameters made into that over all parameters."""
    over_processes = _sum.get()
    return tensor if over_processes is None else over_processes(tensor)


def all_shards_agree(holds: bool) -> bool:
    """Whether something holds of all parameters, given whether it does of this process's."""
    if not is_sharded():
        return holds
    return float(sum_over_shards(torch.tensor(0.0 if holds else 1.0))) == 0.0


def norm(vector: Tensor) -> float:
    """Euclidean length of a vector of parameters, (n,)."""
    return float(sum_over_shards(vector.double().square().sum()).sqrt()) if is_sharded() else float(vector.norm())
