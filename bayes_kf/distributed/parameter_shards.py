"""The division of the parameters among processes: each process holds some whole rows of every tensor."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from bayes_kf.models.adapter import AdapterModel


class ParameterShards:
    """Parameters divided among processes as evenly as whole rows of tensors allow.

    A row of a tensor (out, ...) is one index of its first dimension. With whole rows, the Jacobian rows g ⊗ a of a
    Linear stay outer products in every process.

    Args:
        adapter: the model.
        size: the number of processes.
        rank: the number of this process.

    Attributes:
        slices: for each process, the slices of θ that it holds, tensor by tensor.
        counts: the number of parameters that each process holds.
    """

    def __init__(self, adapter: AdapterModel, size: int, rank: int) -> None:
        self.size, self.rank = size, rank
        held = [0] * size
        self.slices: list[list[slice]] = [[] for _ in range(size)]
        for where, shape in zip(adapter.slices().values(), adapter.shapes, strict=True):
            rows = shape[0] if len(shape) else 1
            width = (where.stop - where.start) // max(rows, 1)
            counts = [rows // size] * size
            for process in sorted(range(size), key=lambda p: held[p])[: rows % size]:
                counts[process] += 1
            ends = list(itertools.accumulate(counts))
            for process, (count, end) in enumerate(zip(counts, ends, strict=True)):
                held[process] += count * width
                first, last = where.start + (end - count) * width, where.start + end * width
                self.slices[process].append(slice(first, last))
        self.counts = tuple(held)

    @property
    def num_own(self) -> int:
        """The number of parameters that this process holds."""
        return self.counts[self.rank]

    def held_by(self, process: int, where: slice) -> list[slice]:
        """The slices of θ[where] that a process holds, relative to ``where``; adjacent slices are joined."""
        held: list[slice] = []
        for piece in self.slices[process]:
            first, last = max(piece.start, where.start), min(piece.stop, where.stop)
            if first < last and held and held[-1].stop == first - where.start:
                held[-1] = slice(held[-1].start, last - where.start)
            elif first < last:
                held.append(slice(first - where.start, last - where.start))
        return held

    def position(self, process: int, where: slice) -> slice:
        """The slice of a process's shard that holds its part of θ[where]."""
        before = sum(_overlap(piece, slice(0, where.start)) for piece in self.slices[process])
        return slice(before, before + sum(_overlap(piece, where) for piece in self.slices[process]))

    def shard(self, values: Tensor) -> Tensor:
        """This process's shard of values for all parameters, (n, ...)."""
        return torch.cat([values[piece] for piece in self.slices[self.rank]])

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """Values for all parameters, (n, ...), from the shards of all processes."""
        whole = shards[0].new_empty(sum(self.counts), *shards[0].shape[1:])
        for slices, shard in zip(self.slices, shards, strict=True):
            lengths = [piece.stop - piece.start for piece in slices]
            for piece, part in zip(slices, shard.split(lengths), strict=True):
                whole[piece] = part
        return whole


def _overlap(first: slice, second: slice) -> int:
    return max(0, min(first.stop, second.stop) - max(first.start, second.start))
