"""Exchange of Jacobian rows: from some examples with all parameters to all examples with some parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bayes_kf.distributed.parameter_shards import ParameterShards
from bayes_kf.inference.linearization.jacobian import FactoredBlocks, Jacobian
from bayes_kf.inference.linearization.jacobian_blocks import Block, DenseBlock, OuterProductBlock
from bayes_kf.processes.process_group import Group


def exchange_rows(group: Group, shards: ParameterShards, jacobian: Jacobian, sizes: Sequence[int]) -> Jacobian:
    """The Jacobian rows of all processes' examples, over the parameters of this process.

    Stored rows go to the processes that hold their columns. Outer products and left factors go to all processes.

    Args:
        group: the processes.
        shards: the division of the parameters.
        jacobian: of this process's examples, over all parameters.
        sizes: the number of examples of every process.

    Raises:
        RuntimeError: if the Jacobians of the processes do not consist of the same blocks.
    """
    group.check_equal("the block structure of the Jacobian", *_block_structure(jacobian), device=jacobian.like.device)
    jacobian = _with_common_tokens(group, jacobian)
    received = iter(_exchange_stored_rows(group, shards, jacobian, sizes))
    total, terms = sum(sizes), []
    for left, part in jacobian.terms:
        blocks = [
            DenseBlock(shards.position(shards.rank, _as_slice(block.columns)), next(received))
            if isinstance(block, DenseBlock)
            else _gather_outer(group, shards, block, sizes)
            for block in part.blocks
        ]
        left = None if left is None else _gather_rows(group, left, sizes)
        terms.append((left, FactoredBlocks(blocks, (total, part.shape[1]))))
    return Jacobian(terms, total, jacobian.num_rows, shards.num_own)


def _exchange_stored_rows(
    group: Group, shards: ParameterShards, jacobian: Jacobian, sizes: Sequence[int]
) -> Iterator[Tensor]:
    """The stored rows of every block, for all examples and the columns of this process."""
    stored = [block for block in _blocks(jacobian) if isinstance(block, DenseBlock)]
    counts = [block.rows.shape[1] for block in stored]
    widths = []
    for block in stored:
        position = shards.position(shards.rank, _as_slice(block.columns))
        widths.append(position.stop - position.start)
    per_example = sum(count * width for count, width in zip(counts, widths, strict=True))
    parts = _rows_by_receiver(shards, jacobian, stored)
    received = group.all_to_all(parts, [size * per_example for size in sizes])
    split = [
        flat.split([size * c * w for c, w in zip(counts, widths, strict=True)])
        for flat, size in zip(received, sizes, strict=True)
    ]
    for number, (count, width) in enumerate(zip(counts, widths, strict=True)):
        yield torch.cat([rows[number].view(size, count, width) for rows, size in zip(split, sizes, strict=True)])


def _rows_by_receiver(shards: ParameterShards, jacobian: Jacobian, stored: Sequence[DenseBlock]) -> list[Tensor]:
    """For each process, the flattened columns of this process's rows that it holds."""
    parts = []
    for process in range(shards.size):
        columns = [
            torch.cat([block.rows[..., where] for where in held], -1).reshape(-1)
            for block in stored
            if (held := shards.held_by(process, _as_slice(block.columns)))
        ]
        parts.append(torch.cat(columns) if columns else jacobian.like.new_empty(0))
    return parts


def _gather_outer(group: Group, shards: ParameterShards, block: OuterProductBlock, sizes: Sequence[int]) -> Block:
    """A block of outer products for all examples, cut to the outputs whose parameters this process holds."""
    width, held = block.activation.shape[-1], shards.held_by(shards.rank, block.columns)
    cotangent, activation = _gather_rows(group, block.cotangent, sizes), _gather_rows(group, block.activation, sizes)
    position = shards.position(shards.rank, block.columns)
    if not held:
        return DenseBlock(position, cotangent[..., :0])
    (own,) = held
    return OuterProductBlock(position, cotangent[..., own.start // width : own.stop // width], activation)


def _gather_rows(group: Group, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """The rows of all processes; a tensor that is equal for all examples is not sent."""
    expanded = tensor.stride(0) == 0
    flags = group.all_gather_int(int(expanded), tensor.device)
    if all(flags) and len(tensor):
        return tensor[:1].expand(sum(sizes), *tensor.shape[1:])
    return group.all_gather_rows(tensor, sizes)


def _blocks(jacobian: Jacobian) -> list[Block]:
    return [block for _, part in jacobian.terms for block in part.blocks]


def _as_slice(where: slice | Tensor) -> slice:
    assert isinstance(where, slice)  # rows of embedding tables are dense by now
    return where


def _block_structure(jacobian: Jacobian) -> list[object]:
    """The number of rows per example, and the kinds and positions of the blocks."""
    structure: list[object] = [jacobian.num_rows]
    for left, part in jacobian.terms:
        structure.append((left is None, part.shape[1]))
        for block in part.blocks:
            position = (block.columns.start, block.columns.stop) if isinstance(block.columns, slice) else "tokens"
            structure.append((type(block).__name__, position))
    return structure


def _with_common_tokens(group: Group, jacobian: Jacobian) -> Jacobian:
    """The Jacobian with the rows of embedding tables stored over the token range of all processes.

    Before, they cover only the tokens that occur in this process's examples.
    """
    if all(isinstance(block.columns, slice) for block in _blocks(jacobian)):
        return jacobian
    terms = []
    for left, part in jacobian.terms:
        blocks: list[Block] = []
        for block in part.blocks:
            if isinstance(block, DenseBlock) and isinstance(block.columns, Tensor):
                ends = torch.stack([-block.columns.min(), block.columns.max()])
                low, high = (max(group.all_gather_int(int(end), ends.device)) for end in ends.tolist())
                wide = block.rows.new_zeros(*block.rows.shape[:2], high + low + 1)
                wide[..., block.columns + low] = block.rows
                block = DenseBlock(slice(-low, high + 1), wide)
            blocks.append(block)
        terms.append((left, FactoredBlocks(blocks, part.shape)))
    return Jacobian(terms, jacobian.size, jacobian.num_rows, jacobian.num_parameters)
