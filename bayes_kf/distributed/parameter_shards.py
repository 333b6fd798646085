"""Which process holds which parameters: of every tensor some whole rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from bayes_kf.models.adapter import AdapterModel


class Columns:
    """Parameters divided among processes as evenly as whole rows of tensors allow.

    A row of a tensor (out, ...) is what belongs to one index of its first dimension, so that the rows g ⊗ a of a
    Linear's Jacobian stay outer products in every process.

    Args:
        adapter: the model.
        size: number of processes.
        rank: this one.
    """

    def __init__(self, adapter: AdapterModel, size: int, rank: int) -> None:
        self.size, self.rank = size, rank
        held = [0] * size
        self.pieces: list[list[slice]] = [[] for _ in range(size)]  # of θ, tensor by tensor
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
                self.pieces[process].append(slice(first, last))
        self.counts = tuple(held)

    @property
    def own(self) -> int:
        """How many parameters this process holds."""
        return self.counts[self.rank]

    def of(self, process: int, where: slice) -> list[slice]:
        """The parts of θ[where] that a process holds, relative to ``where``; neighbours are one."""
        found: list[slice] = []
        for piece in self.pieces[process]:
            first, last = max(piece.start, where.start), min(piece.stop, where.stop)
            if first < last and found and found[-1].stop == first - where.start:
                found[-1] = slice(found[-1].start, last - where.start)
            elif first < last:
                found.append(slice(first - where.start, last - where.start))
        return found

    def place(self, process: int, where: slice) -> slice:
        """Where what a process holds of θ[where] lies in its shard."""
        before = sum(_overlap(piece, slice(0, where.start)) for piece in self.pieces[process])
        return slice(before, before + sum(_overlap(piece, where) for piece in self.pieces[process]))

    def shard(self, values: Tensor) -> Tensor:
        """This process's part of values of all parameters, (n, ...)."""
        return torch.cat([values[piece] for piece in self.pieces[self.rank]])

    def whole(self, shards: Sequence[Tensor]) -> Tensor:
        """Values of all parameters, (n, ...), from every process's part."""
        found = shards[0].new_empty(sum(self.counts), *shards[0].shape[1:])
        for pieces, shard in zip(self.pieces, shards, strict=True):
            lengths = [piece.stop - piece.start for piece in pieces]
            for piece, part in zip(pieces, shard.split(lengths), strict=True):
                found[piece] = part
        return found


def _overlap(first: slice, second: slice) -> int:
    return max(0, min(first.stop, second.stop) - max(first.start, second.start))
