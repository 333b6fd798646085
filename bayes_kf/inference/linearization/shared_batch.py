"""A linearized batch whose examples several processes share; each gets the outputs and Jacobian rows of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from bayes_kf.inference.linearization.jacobian import FactoredBlocks, Jacobian
from bayes_kf.inference.linearization.jacobian_blocks import Block, DenseBlock
from bayes_kf.inference.linearization.linearized_batch import LinearizedBatch
from bayes_kf.inference.linearization.row_buffer import Directions
from bayes_kf.processes import shared_work
from bayes_kf.processes.shared_work import Share


class SharedLinearizedBatch:
    """As :class:`.LinearizedBatch`, which each process has for its own examples.

    Args:
        share: of this process.
        linearize: linearizes the examples of this process.
        refused: the tensors whose hooks have given wrong rows in this process, in some order.
        refuse: computes the rows of some tensors by the general path from now on.

    Attributes:
        outputs: η, (B, m), in the latent dtype, detached.
    """

    def __init__(
        self,
        share: Share,
        linearize: Callable[[], LinearizedBatch],
        refused: Callable[[], list[str]],
        refuse: Callable[[list[str]], None],
    ) -> None:
        self._share, self._refused, self._refuse = share, refused, refuse
        self._own = shared_work.done_everywhere(linearize, is_share=True)
        self.outputs = share.gathered(self._own.outputs)

    def jacobian(self, directions: Directions | None = None) -> Jacobian:
        """As :meth:`.LinearizedBatch.jacobian`."""
        if directions is not None:
            directions = _directions_of(directions, self._share.where)
        return self._gathered(lambda: self._own.jacobian(directions))

    def softmax_jacobian(self) -> Jacobian:
        """As :meth:`.LinearizedBatch.softmax_jacobian`."""
        return self._gathered(self._own.softmax_jacobian)

    def _gathered(self, rows: Callable[[], Jacobian]) -> Jacobian:
        """The rows of all examples; dense ones if processes hold theirs in different forms.

        Hooks that gave wrong rows in one process are refused in all from now on, so that all have one plan.
        """
        own = shared_work.done_everywhere(rows, is_share=True)
        forms = [(factor is None, _forms(part.blocks)) for factor, part in own.terms]
        if not shared_work.is_equal_everywhere((self._refused(), forms)):
            self._refuse(shared_work.union(self._refused()))
            return Jacobian.from_rows(self._share.gathered(own.dense()))
        size = sum(self._share.sizes)
        terms: list[tuple[Tensor | None, FactoredBlocks]] = []
        for factor, part in own.terms:
            blocks = [_gathered_block(self._share, block) for block in part.blocks]
            whole = None if factor is None else self._share.gathered(factor)
            terms.append((whole, FactoredBlocks(blocks, (size, part.shape[1]))))
        return Jacobian(terms, size, own.num_rows, own.num_parameters)


def _forms(blocks: Sequence[Block]) -> list[tuple[object, ...]]:
    """Kind, columns and shape of an example of each block."""
    return [
        (type(block).__name__, _columns(block.columns), *(tuple(tensor.shape[1:]) for tensor in _tensors(block)))
        for block in blocks
    ]


def _columns(columns: slice | Tensor) -> tuple[int, ...]:
    """What tells the columns of blocks apart."""
    if isinstance(columns, slice):
        return columns.start, columns.stop
    return len(columns), int(columns.sum())


def _tensors(block: Block) -> list[Tensor]:
    return [block.rows] if isinstance(block, DenseBlock) else [block.cotangent, block.activation]


def _gathered_block(share: Share, block: Block) -> Block:
    if isinstance(block, DenseBlock):
        return replace(block, rows=share.gathered(block.rows))
    return replace(block, cotangent=share.gathered(block.cotangent), activation=share.gathered(block.activation))


def _directions_of(directions: Directions, where: slice) -> Directions:
    """The directions of some examples, which are numbered from 0."""
    counts = directions.rows_per_example

    def seeds(examples: Tensor, which: Tensor) -> Tensor:
        return directions.seeds(examples + where.start, which)

    return Directions(directions.num_rows, seeds, None if counts is None else counts[where])


Linearized = LinearizedBatch | SharedLinearizedBatch  # of one process, or of several
