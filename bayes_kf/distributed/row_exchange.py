"""Rows of a Jacobian against columns: from some examples with all parameters to all examples with some parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bayes_kf.distributed.parameter_shards import Columns
from bayes_kf.distributed.process_group import Group
from bayes_kf.inference.linearization.jacobian import FactoredBlocks, Jacobian
from bayes_kf.inference.linearization.jacobian_blocks import Block, DenseBlock, OuterProductBlock


def columns_for_rows(group: Group, columns: Columns, jacobian: Jacobian, sizes: Sequence[int]) -> Jacobian:
    """The rows of all processes' examples, over the parameters of this one.

    Stored rows are sent to the processes that hold their columns; outer products and factors on the left go to all.

    Args:
        group: the processes.
        columns: who holds which parameters.
        jacobian: of this process's examples, over all parameters.
        sizes: how many examples each process has.

    Raises:
        RuntimeError: where processes' Jacobians are not made of the same blocks.
    """
    group.check_alike("what a model's Jacobian is made of", *_made_of(jacobian), device=jacobian.like.device)
    jacobian = _with_common_tokens(group, jacobian)
    received = iter(_exchanged(group, columns, jacobian, sizes))
    total, terms = sum(sizes), []
    for left, part in jacobian.terms:
        blocks = [
            DenseBlock(columns.place(columns.rank, _span(block.columns)), next(received))
            if isinstance(block, DenseBlock)
            else _outer(group, columns, block, sizes)
            for block in part.blocks
        ]
        left = None if left is None else _rows(group, left, sizes)
        terms.append((left, FactoredBlocks(blocks, (total, part.shape[1]))))
    return Jacobian(terms, total, jacobian.num_rows, columns.own)


def _exchanged(group: Group, columns: Columns, jacobian: Jacobian, sizes: Sequence[int]) -> Iterator[Tensor]:
    """The stored rows of every block for all examples over this process's columns."""
    stored = [block for block in _blocks(jacobian) if isinstance(block, DenseBlock)]
    parts = []
    for process in range(columns.size):
        sent = [
            torch.cat([block.rows[..., p] for p in columns.of(process, _span(block.columns))], -1).reshape(-1)
            for block in stored
            if columns.of(process, _span(block.columns))
        ]
        parts.append(torch.cat(sent) if sent else jacobian.like.new_empty(0))
    counts = [block.rows.shape[1] for block in stored]
    widths = []
    for block in stored:
        place = columns.place(columns.rank, _span(block.columns))
        widths.append(place.stop - place.start)
    each = sum(count * width for count, width in zip(counts, widths, strict=True))
    found = group.exchange(parts, [size * each for size in sizes])
    split = [
        flat.split([size * c * w for c, w in zip(counts, widths, strict=True)])
        for flat, size in zip(found, sizes, strict=True)
    ]
    for number, (count, width) in enumerate(zip(counts, widths, strict=True)):
        of_all = [rows[number].view(size, count, width) for rows, size in zip(split, sizes, strict=True)]
        yield torch.cat(of_all)


def _outer(group: Group, columns: Columns, block: OuterProductBlock, sizes: Sequence[int]) -> Block:
    """A block of outer products for all examples, cut to the outputs whose parameters this process holds."""
    width, where = block.activation.shape[-1], columns.of(columns.rank, block.columns)
    cotangent, activation = _rows(group, block.cotangent, sizes), _rows(group, block.activation, sizes)
    place = columns.place(columns.rank, block.columns)
    if not where:
        return DenseBlock(place, cotangent[..., :0])
    (own,) = where
    return OuterProductBlock(place, cotangent[..., own.start // width : own.stop // width], activation)


def _rows(group: Group, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """All processes' rows; what is the same for all examples is not sent."""
    same = tensor.stride(0) == 0
    flags = group.numbers(int(same), tensor.device)
    if all(flags) and len(tensor):
        return tensor[:1].expand(sum(sizes), *tensor.shape[1:])
    return group.rows(tensor, sizes)


def _blocks(jacobian: Jacobian) -> list[Block]:
    return [block for _, part in jacobian.terms for block in part.blocks]


def _span(where: slice | Tensor) -> slice:
    assert isinstance(where, slice)  # tables of tokens were spread out before
    return where


def _made_of(jacobian: Jacobian) -> list[object]:
    """Kinds and places of the blocks, and rows of an example."""
    found: list[object] = [jacobian.num_rows]
    for left, part in jacobian.terms:
        found.append((left is None, part.shape[1]))
        for block in part.blocks:
            place = (block.columns.start, block.columns.stop) if isinstance(block.columns, slice) else "tokens"
            found.append((type(block).__name__, place))
    return found


def _with_common_tokens(group: Group, jacobian: Jacobian) -> Jacobian:
    """Rows of embedding tables, which hold the tokens that an example's own batch looked up, over whole tables."""
    if all(isinstance(block.columns, slice) for block in _blocks(jacobian)):
        return jacobian
    terms = []
    for left, part in jacobian.terms:
        blocks: list[Block] = []
        for block in part.blocks:
            if isinstance(block, DenseBlock) and isinstance(block.columns, Tensor):
                ends = torch.stack([-block.columns.min(), block.columns.max()])
                low, high = (max(group.numbers(int(end), ends.device)) for end in ends.tolist())
                wide = block.rows.new_zeros(*block.rows.shape[:2], high + low + 1)
                wide[..., block.columns + low] = block.rows
                block = DenseBlock(slice(-low, high + 1), wide)
            blocks.append(block)
        terms.append((left, FactoredBlocks(blocks, part.shape)))
    return Jacobian(terms, jacobian.size, jacobian.num_rows, jacobian.num_parameters)
