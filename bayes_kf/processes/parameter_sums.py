"""Sums over all parameters, each process of a group holding a shard of them; in one process they are already whole.

A covariance structure is written for whole vectors. It passes its sums over parameters through :func:`sum_over_shards`
and its decisions about all parameters through :func:`all_shards_agree`. So the same code works on a shard of θ.
``bayes_kf.distributed`` decides which process holds which parameters, and how tensors are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_sum: ContextVar[Callable[[Tensor], Tensor] | None] = ContextVar("sum over processes", default=None)


@contextmanager
def sharded(sum_over_processes: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, vectors of parameters are shards; the argument sums a tensor over all processes."""
    token = _sum.set(sum_over_processes)
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
    """A sum over all parameters, from one over this process's parameters."""
    sum_over_processes = _sum.get()
    return tensor if sum_over_processes is None else sum_over_processes(tensor)


def all_shards_agree(condition: bool) -> bool:
    """Whether a condition is true for all parameters, from whether it is for this process's."""
    if _sum.get() is None:
        return condition
    return float(sum_over_shards(torch.tensor(0.0 if condition else 1.0))) == 0.0


def norm(vector: Tensor) -> float:
    """Euclidean length of a vector of parameters, (n,)."""
    if _sum.get() is None:
        return float(vector.norm())
    return float(sum_over_shards(vector.double().square().sum()).sqrt())
