"""The Jacobian J = ∂η/∂θ of a batch as an operator: products with J, never the matrix of all rows and all columns.

Blocks hold the rows of consecutive tensors. Blocks that share a factor on the left are one ``FactoredBlocks``: below a
classifier with weight W, J = W ∂h/∂θ. Whitening is a factor on the left too, so W J shares every number with J.

Letters: B examples, c rows per example, n parameters, p the diagonal of the covariance P.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from bayes_kf.inference.linearization.jacobian_blocks import (
    Block,
    DenseBlock,
    multiply_blocks,
    multiply_transposed_blocks,
)
from bayes_kf.processes.parameter_sums import all_shards_agree, sum_over_shards


@dataclass
class FactoredBlocks:
    """Blocks with one factor on their left.

    Their last Gram matrix is cached, because an update asks for it several times with the same variance.
    """

    blocks: Sequence[Block]
    shape: tuple[int, int]  # (B, d), of the rows before the factor
    _gram: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def gram(self, variance: Tensor) -> Tensor:
        """Σ over blocks of J diag(p) Jᵀ, (B·d, B·d), in float64."""
        cached = self._gram
        if cached is None or not (cached[0] is variance or all_shards_agree(torch.equal(cached[0], variance))):
            gram = self.blocks[0].gram(variance)
            for block in self.blocks[1:]:
                gram += block.gram(variance)
            cached = self._gram = (variance, sum_over_shards(gram))
        return cached[1]


@dataclass(frozen=True)
class Jacobian:
    """J (B·c, n) for a batch of B examples with c rows each, or W J.

    Args:
        terms: factor on the left (B, c, d) or None, and the blocks that it multiplies.
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

    @cached_property
    def like(self) -> Tensor:
        """A tensor of J's dtype and device."""
        block = self.terms[0][1].blocks[0]
        return block.rows if isinstance(block, DenseBlock) else block.activation

    def examples(self, which: slice) -> Jacobian:
        """The rows of some examples (views)."""
        start, stop, _ = which.indices(self.size)
        if (start, stop) == (0, self.size):
            return self
        terms = [
            (
                None if factor is None else factor[which],
                FactoredBlocks([block.examples(which) for block in part.blocks], (stop - start, part.shape[1])),
            )
            for factor, part in self.terms
        ]
        return Jacobian(terms, stop - start, self.num_rows, self.num_parameters)

    def rows(self, count: int) -> Jacobian:
        """The first ``count`` rows of every example (views)."""
        if count >= self.num_rows:
            return self
        terms = [
            (None, FactoredBlocks([block.first_rows(count) for block in part.blocks], (self.size, count)))
            if factor is None
            else (factor[:, :count], part)
            for factor, part in self.terms
        ]
        return Jacobian(terms, self.size, count, self.num_parameters)

    def left_multiply(self, factor: Tensor) -> Jacobian:
        """W J for W (B, r, c). Rows are shared, not copied."""
        like, terms = self.like, []
        for own, part in self.terms:
            terms.append((factor.to(like) if own is None else factor.to(own) @ own, part))
        return Jacobian(terms, self.size, factor.shape[1], self.num_parameters)

    def scaled(self, number: float) -> Jacobian:
        """All rows times a number. Rows are shared, not copied."""
        eye = torch.eye(self.num_rows, dtype=self.like.dtype, device=self.like.device)
        return self.left_multiply((number * eye).expand(self.size, -1, -1))

    def matmul(self, matrix: Tensor) -> Tensor:
        """J F, (B, c, L), for F (n, L), or J v, (B, c), for v (n,), in the dtype of the argument."""
        columns = matrix if matrix.ndim == 2 else matrix.unsqueeze(-1)  # (n, L)
        product = columns.new_zeros(self.size, self.num_rows, columns.shape[1])
        for factor, part in self.terms:
            inner = torch.stack(multiply_blocks(part.blocks, columns)).sum(0)  # (B, d, L)
            product += inner if factor is None else factor.to(columns) @ inner
        product = sum_over_shards(product)
        return product if matrix.ndim == 2 else product.squeeze(-1)

    matvec = matmul

    def rmatmul(self, weights: Tensor) -> Tensor:
        """Jᵀw, (n, L), for w (B, c, L), or (n,), for w (B, c)."""
        columns = weights if weights.ndim == 3 else weights.unsqueeze(-1)  # (B, c, L)
        product = self.like.new_zeros(self.num_parameters, columns.shape[-1])
        for factor, part in self.terms:
            inner = columns if factor is None else factor.mT @ columns  # (B, d, L)
            multiply_transposed_blocks(part.blocks, inner, product)
        return product if weights.ndim == 3 else product.squeeze(-1)

    rmatvec = rmatmul

    def gram(self, variance: Tensor) -> Tensor:
        """J diag(p) Jᵀ of the whole batch, (B·c, B·c), in float64."""
        total: Tensor | None = None
        for factor, part in self.terms:
            gram = part.gram(variance)
            if factor is not None:
                gram = congruence(factor.double(), gram)
            total = gram if total is None else total + gram
        assert total is not None
        return total

    def block_gram(self, variance: Tensor) -> Tensor:
        """J_b diag(p) J_bᵀ of every example b, (B, c, c), in float64."""
        total: Tensor | None = None
        for factor, part in self.terms:
            gram = torch.stack([block.block_gram(variance) for block in part.blocks]).sum(0)
            if factor is not None:
                gram = factor.double() @ gram @ factor.double().mT
            total = gram if total is None else total + gram
        assert total is not None
        return sum_over_shards(total)

    def column_squares(self, left: Tensor | None = None) -> Tensor:
        """diag((A J)ᵀ A J), (n,): the column sums of squares of A J, A (q, B·c), or of J itself."""
        result = self.like.new_zeros(self.num_parameters)
        outer = None if left is None else left.to(self.like).view(-1, self.size, self.num_rows)  # (q, B, c)
        for factor, part in self.terms:
            inner = outer
            if outer is not None and factor is not None:
                inner = torch.einsum("qbc,bcd->qbd", outer, factor)
            for block in part.blocks:
                if inner is None:
                    block.example_squares(factor, result)
                else:
                    block.column_squares(inner, result)
        return result

    def dense(self) -> Tensor:
        """All rows, (B, c, n); for small problems and for dense covariances."""
        result = self.like.new_zeros(self.size, self.num_rows, self.num_parameters)
        for factor, part in self.terms:
            for block in part.blocks:
                rows = block.dense()
                result[..., block.columns] = rows if factor is None else factor @ rows
        return result

    @classmethod
    def from_rows(cls, rows: Tensor) -> Jacobian:
        """From stored rows (B, c, n)."""
        size, num_rows, num_parameters = rows.shape
        part = FactoredBlocks([DenseBlock(slice(0, num_parameters), rows)], (size, num_rows))
        return cls([(None, part)], size, num_rows, num_parameters)


def congruence(factor: Tensor, gram: Tensor) -> Tensor:
    """W G Wᵀ, (B·r, B·r), for block-diagonal W (B, r, c) and G (B·c, B·c)."""
    size, r, c = factor.shape
    half = (factor @ gram.view(size, c, size * c)).view(size * r, size, c)  # W G
    return (half.transpose(0, 1) @ factor.mT).transpose(0, 1).reshape(size * r, size * r)


def diagonal_blocks(joint: Tensor, size: int) -> Tensor:
    """The B diagonal blocks, (B, c, c), of a matrix (B·c, B·c)."""
    width = len(joint) // size
    return joint.view(size, width, size, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
