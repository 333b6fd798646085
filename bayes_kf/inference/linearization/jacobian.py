"""J = ∂η/∂θ of a batch as an operator: its products, never the matrix of all rows and all columns.

Blocks hold the rows of the tensors. Those that share a factor on their left (all that lies below the classifier:
J = W ∂h/∂θ) are one ``Part``. Whitening is a factor on the left too, so M = W J shares every number with J.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bayes_kf.inference.linearization import parameter_sums
from bayes_kf.inference.linearization.jacobian_blocks import Block, DenseBlock, Pieces


@dataclass
class FactoredBlocks:
    """Blocks with one factor on their left; their last Gram matrix is kept, since one belief asks for it often."""

    blocks: Sequence[Block]
    shape: tuple[int, int]  # (B, d), of the rows before the factor
    _gram: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def gram(self, variance: Tensor) -> Tensor:
        """Σ over blocks of J diag(p) Jᵀ, (B·d, B·d), in float64."""
        if self._gram is None or not (
            self._gram[0] is variance or parameter_sums.all_shards_agree(torch.equal(self._gram[0], variance))
        ):
            total = self.blocks[0].gram(variance)
            for block in self.blocks[1:]:
                total += block.gram(variance)
            self._gram = (variance, parameter_sums.sum_over_shards(total))
        return self._gram[1]


@dataclass(frozen=True)
class Jacobian:
    """J (B·c, n) for a batch of B examples with c rows each, or W J.

    Args:
        terms: factor on the left (B, c, d) or None, and what it multiplies.
        size: B.
        num_rows: c.
        num_parameters: n.
    """

    terms: Sequence[tuple[Tensor | None, FactoredBlocks]]
    size: int
    num_rows: int
    num_parameters: int

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(block.nbytes for _, part in self.terms for block in part.blocks)

    def examples(self, which: slice) -> Jacobian:
        """The rows of some examples (views)."""
        start, stop, _ = which.indices(self.size)
        if (start, stop) == (0, self.size):
            return self
        terms = [
            (
                None if left is None else left[which],
                FactoredBlocks([block.examples(which) for block in part.blocks], (stop - start, part.shape[1])),
            )
            for left, part in self.terms
        ]
        return Jacobian(terms, stop - start, self.num_rows, self.num_parameters)

    def rows(self, count: int) -> Jacobian:
        """The first ``count`` rows of every example (views)."""
        if count >= self.num_rows:
            return self
        terms = [
            (None, FactoredBlocks([block.first_rows(count) for block in part.blocks], (self.size, count)))
            if left is None
            else (left[:, :count], part)
            for left, part in self.terms
        ]
        return Jacobian(terms, self.size, count, self.num_parameters)

    def left_multiply(self, factor: Tensor) -> Jacobian:
        """W J for W (B, r, c); rows are shared, not copied."""
        terms = [(factor.to(self.like) if left is None else factor.to(left) @ left, part) for left, part in self.terms]
        return Jacobian(terms, self.size, factor.shape[1], self.num_parameters)

    def scaled(self, number: float) -> Jacobian:
        """All rows times a number; they are shared, not copied."""
        eye = torch.eye(self.num_rows, dtype=self.like.dtype, device=self.like.device)
        return self.left_multiply((number * eye).expand(self.size, -1, -1))

    @property
    def like(self) -> Tensor:
        """A tensor of its kind and device."""
        block = self.terms[0][1].blocks[0]
        return block.rows if isinstance(block, DenseBlock) else block.activation

    def matmul(self, matrix: Tensor) -> Tensor:
        """J F, (B, c, L) for F (n, L), in F's precision."""
        total = matrix.new_zeros(self.size, self.num_rows, matrix.shape[1])
        for left, part in self.terms:
            inner = torch.stack([block.matmul(matrix) for block in part.blocks]).sum(0)
            total += inner if left is None else left.to(matrix) @ inner
        return parameter_sums.sum_over_shards(total)

    def matvec(self, vector: Tensor) -> Tensor:
        """J v, (B, c)."""
        return self.matmul(vector.unsqueeze(-1)).squeeze(-1)

    def rmatmul(self, weights: Tensor) -> Tensor:
        """Jᵀ w, (n, L) for w (B, c, L)."""
        result = self.like.new_zeros(self.num_parameters, weights.shape[-1])
        for left, part in self.terms:
            inner = weights if left is None else left.mT @ weights
            for block in part.blocks:
                _fill(result, block, block.rmatmul(inner))
        return result

    def rmatvec(self, weights: Tensor) -> Tensor:
        """Jᵀ w, (n,) for w (B, c)."""
        return self.rmatmul(weights.unsqueeze(-1)).squeeze(-1)

    def gram(self, variance: Tensor) -> Tensor:
        """J diag(p) Jᵀ over the whole batch, (B·c, B·c), in float64."""
        total: Tensor | None = None
        for left, part in self.terms:
            found = part.gram(variance)
            if left is not None:
                found = congruence(left.double(), found)
            total = found if total is None else total + found
        assert total is not None
        return total

    def block_gram(self, variance: Tensor) -> Tensor:
        """J_b diag(p) J_bᵀ of every example, (B, c, c), in float64."""
        total: Tensor | None = None
        for left, part in self.terms:
            found = torch.stack([block.block_gram(variance) for block in part.blocks]).sum(0)
            if left is not None:
                found = left.double() @ found @ left.double().mT
            total = found if total is None else total + found
        assert total is not None
        return parameter_sums.sum_over_shards(total)

    def column_squares(self, left: Tensor | None = None) -> Tensor:
        """diag((A J)ᵀ A J), (n,): the column sums of squares of A J, A (q, B·c), or of J itself."""
        result = self.like.new_zeros(self.num_parameters)
        outer = None if left is None else left.to(self.like).view(-1, self.size, self.num_rows)
        for factor, part in self.terms:
            inner = outer
            if outer is not None and factor is not None:
                inner = torch.einsum("qbc,bcd->qbd", outer, factor)
            for block in part.blocks:
                _fill(result, block, block.example_squares(factor) if inner is None else block.column_squares(inner))
        return result

    def dense(self) -> Tensor:
        """All rows, (B, c, n); for small problems, and beliefs that are dense themselves."""
        result = self.like.new_zeros(self.size, self.num_rows, self.num_parameters)
        for left, part in self.terms:
            for block in part.blocks:
                rows = block.dense()
                result[..., block.where] = rows if left is None else left @ rows
        return result

    @classmethod
    def from_rows(cls, rows: Tensor) -> Jacobian:
        """From stored rows (B, c, n)."""
        size, num_rows, num_parameters = rows.shape
        part = FactoredBlocks([DenseBlock(slice(0, num_parameters), rows)], (size, num_rows))
        return cls([(None, part)], size, num_rows, num_parameters)


def _fill(result: Tensor, block: Block, pieces: Pieces) -> None:
    """Write what a block says of its columns."""
    for part, values in pieces:
        if isinstance(block.where, slice):
            result[block.where][part] = values
        else:
            result[block.where[part]] = values


def congruence(factor: Tensor, gram: Tensor) -> Tensor:
    """Block-diagonal W (B, r, c) on both sides of G (B·c, B·c), (B·r, B·r)."""
    size, r, c = factor.shape
    half = (factor @ gram.view(size, c, size * c)).view(size * r, size, c)
    return (half.transpose(0, 1) @ factor.mT).transpose(0, 1).reshape(size * r, size * r)


def diagonal_blocks(joint: Tensor, size: int) -> Tensor:
    """The diagonal blocks of (B·c, B·c), (B, c, c)."""
    width = len(joint) // size
    return joint.view(size, width, size, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
