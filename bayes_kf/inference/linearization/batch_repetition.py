"""How many copies of each example go through the network at once, so that a few passes carry all of their directions.

A backward pass carries one direction for every row of the batch. Rows are repeated where that is cheaper than more
passes: for small batches, whose passes cost the same with more rows, and where examples differ in how many directions
they have, as under truncated curvature, for else the one with the most would keep all others waiting.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

FORWARD_COST = 1.3  # cost of a forward pass that keeps its graph, in backward passes; a small BERT on a CPU


class BackwardPass(NamedTuple):
    """What one backward pass carries.

    Attributes:
        rows: the rows of the batch that have a direction, (R',); None where all have.
        example: whose they are, (R',).
        which: of its directions, (R',).
    """

    rows: Tensor | None
    example: Tensor
    which: Tensor


class BatchRepetition(NamedTuple):
    """The rows of a batch in which examples are repeated.

    Attributes:
        copies: of each example, (B,), on the CPU.
        example: of each row, (R,), on the CPU, in order.
    """

    copies: Tensor
    example: Tensor

    @property
    def first(self) -> Tensor:
        """The first row of each example, (B,)."""
        return self.copies.cumsum(0) - self.copies

    def backward_passes(self, number: int, needed: Tensor | None, device: torch.device) -> Iterator[BackwardPass]:
        """The passes that carry ``needed`` (B,) directions of each example, or ``number`` of all."""
        alike = [number] * len(self.copies)
        wanted = torch.tensor(alike if needed is None else needed.tolist())[self.example]
        copies, copy = self.copies[self.example], torch.arange(len(self.example)) - self.first[self.example]
        example = self.example.to(device)
        for number_of_pass in range(int(wanted.add(copies - 1).floor_divide(copies).max())):
            which = number_of_pass * copies + copy
            rows = (which < wanted).nonzero().squeeze(1)
            if len(rows) == len(which):
                yield BackwardPass(None, example, which.to(device))
            else:
                yield BackwardPass(rows.to(device), self.example[rows].to(device), which[rows].to(device))

    @classmethod
    def of(cls, copies: Tensor) -> BatchRepetition:
        """From the copies of each example, (B,)."""
        return cls(copies, torch.arange(len(copies)).repeat_interleave(copies))


@functools.lru_cache(maxsize=64)
def cheapest_repetition(needed: tuple[int, ...], free: int, most: int) -> BatchRepetition:
    """The layout whose passes take least time.

    Args:
        needed: directions of each example, B of them.
        free: rows up to which a pass costs the same.
        most: rows that may be there at once, where they are not fewer than the examples.
    """
    wanted = torch.tensor(needed).clamp_min(1)
    longest = int(wanted.max())
    copies_of = range(1, min(longest, most) + 1)
    passes = torch.tensor(sorted({-(-number // k) for number in set(wanted.tolist()) for k in copies_of}))
    copies = -(-wanted // passes.unsqueeze(1))  # (candidates, B)
    rows = copies.sum(1)
    cost = (FORWARD_COST + passes) * rows.clamp_min(free)
    cost = cost.masked_fill(rows > max(most, len(needed)), torch.inf)
    return BatchRepetition.of(copies[int(cost.argmin())])
