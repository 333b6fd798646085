"""How often each example of a batch is repeated, so that few backward passes carry all rows of the Jacobian.

A backward pass carries one direction of the outputs for every row of the batch. Examples are repeated if that costs
less than more passes: in small batches, whose passes cost the same with more rows, and if examples have different
numbers of directions, as with truncated curvature, since the others would wait for the example that has most.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

FORWARD_COST = 1.3  # of a forward pass that records its graph, in backward passes; measured on a small BERT on a CPU


class BackwardPass(NamedTuple):
    """The directions that one backward pass carries.

    Attributes:
        rows: the rows of the batch that have a direction, (R',); None if all have.
        example: of each of these rows, (R',).
        which: the direction of the example, (R',).
    """

    rows: Tensor | None
    example: Tensor
    which: Tensor


class BatchRepetition(NamedTuple):
    """The rows of a batch in which examples are repeated.

    Attributes:
        copies: of each example, (B,), on the CPU.
        example: of each row, (R,), on the CPU, in order.
        first: row of each example, (B,), on the CPU.
    """

    copies: Tensor
    example: Tensor
    first: Tensor

    def backward_passes(
        self, num_rows: int, rows_per_example: Tensor | None, device: torch.device
    ) -> list[BackwardPass]:
        """The passes that carry ``rows_per_example`` (B,) directions of each example, or ``num_rows`` of all."""
        counts = [num_rows] * len(self.copies) if rows_per_example is None else rows_per_example.tolist()
        wanted = torch.tensor(counts)[self.example]  # directions of the example of each row, (R,)
        copies, copy = self.copies[self.example], torch.arange(len(self.example)) - self.first[self.example]
        example, passes = self.example.to(device), []
        for number in range(int(wanted.add(copies - 1).floor_divide(copies).max())):
            which = number * copies + copy
            rows = (which < wanted).nonzero().squeeze(1)
            if len(rows) == len(which):
                passes.append(BackwardPass(None, example, which.to(device)))
            else:
                passes.append(BackwardPass(rows.to(device), self.example[rows].to(device), which[rows].to(device)))
        return passes

    @classmethod
    def of(cls, copies: Tensor) -> BatchRepetition:
        """From the copies of each example, (B,)."""
        return cls(copies, torch.arange(len(copies)).repeat_interleave(copies), copies.cumsum(0) - copies)


@functools.lru_cache(maxsize=64)
def cheapest_repetition(rows_per_example: tuple[int, ...], free: int, most: int) -> BatchRepetition:
    """The repetition whose passes take least time.

    Args:
        rows_per_example: directions of each example, B numbers.
        free: the number of rows up to which a pass costs the same.
        most: the number of rows allowed at once, unless there are more examples.
    """
    wanted = torch.tensor(rows_per_example).clamp_min(1)
    longest = int(wanted.max())
    copies_of = range(1, min(longest, most) + 1)
    passes = torch.tensor(sorted({-(-number // k) for number in set(wanted.tolist()) for k in copies_of}))
    copies = -(-wanted // passes.unsqueeze(1))  # (candidates, B)
    rows = copies.sum(1)
    cost = (FORWARD_COST + passes) * rows.clamp_min(free)
    cost = cost.masked_fill(rows > max(most, len(rows_per_example)), torch.inf)
    return BatchRepetition.of(copies[int(cost.argmin())])
