"""J = ∂η/∂θ of a batch as an operator: its products, never the matrix of all rows and all columns.

A block holds the rows of one tensor. ``Rows`` are stored as they are (LoRA's A and B, norms, convolutions): their
length is the tensor's size, which is small for adapters. ``Outer`` is a Linear applied to one vector per example
(classifiers): a row is g ⊗ a, and only g and a are kept, so that a head of m classes on d features costs m + d numbers
a row and not m·d. Blocks that share a factor on their left (all that lies below the classifier: J = W ∂h/∂θ) are one
``Part``. Whitening is a factor on the left too, so M = W J shares every number with J.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

PIECE = 2**19  # numbers in a temporary
Pieces = Iterator[tuple[slice, Tensor]]  # some columns of a block at a time


@dataclass(frozen=True)
class Rows:
    """Stored rows of the columns ``where`` of θ, (B, c, s)."""

    where: slice | Tensor
    rows: Tensor

    @property
    def width(self) -> int:
        """Columns, s."""
        return self.rows.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.rows.untyped_storage().nbytes()

    def examples(self, which: slice) -> Rows:
        """Those of some examples (views)."""
        return replace(self, rows=self.rows[which])

    def matmul(self, matrix: Tensor) -> Tensor:
        """J F, (B, c, L) for F (n, L), in F's precision."""
        table = matrix[self.where]
        if matrix.dtype == self.rows.dtype:
            return self.rows @ table
        total = matrix.new_zeros(*self.rows.shape[:2], matrix.shape[1])
        for part in _pieces(self.width, self.rows.shape[0] * self.rows.shape[1]):
            total += self.rows[..., part].to(matrix) @ table[part]
        return total

    def rmatmul(self, weights: Tensor) -> Pieces:
        """Jᵀ w, (s, L) for w (B, c, L)."""
        yield slice(0, self.width), self.rows.flatten(0, 1).mT @ weights.flatten(0, 1)

    def gram(self, variance: Tensor) -> Tensor:
        """J diag(p) Jᵀ, (B·c, B·c), in float64."""
        rows, root = self.rows.flatten(0, 1), variance[self.where].sqrt()
        total = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
        for part in _pieces(self.width, len(rows)):
            scaled = (rows[:, part] * root[part]).double()
            total.addmm_(scaled, scaled.mT)
        return total

    def block_gram(self, variance: Tensor) -> Tensor:
        """J_b diag(p) J_bᵀ of every example, (B, c, c), in float64."""
        root = variance[self.where].sqrt()
        total = self.rows.new_zeros(*self.rows.shape[:2], self.rows.shape[1], dtype=torch.float64)
        for part in _pieces(self.width, self.rows.shape[0] * self.rows.shape[1]):
            scaled = (self.rows[..., part] * root[part]).double()
            total.baddbmm_(scaled, scaled.mT)
        return total

    def column_squares(self, left: Tensor) -> Pieces:
        """Σ_q (Σ_bc A_qbc J_bc)² by column, (s,), for A (q, B, c)."""
        rows, left = self.rows.flatten(0, 1), left.flatten(1)
        for part in _pieces(self.width, len(left)):
            yield part, (left @ rows[:, part]).square_().sum(0)

    def example_squares(self, left: Tensor | None) -> Pieces:
        """Σ_bq (Σ_c W_bqc J_bc)² by column, (s,), for W (B, q, c) or the identity."""
        num_rows = self.rows.shape[0] * (self.rows.shape[1] if left is None else left.shape[1])
        for part in _pieces(self.width, num_rows):
            rows = self.rows[..., part] if left is None else left @ self.rows[..., part]
            yield part, rows.square().sum((0, 1))

    def dense(self) -> Tensor:
        """The rows, (B, c, s)."""
        return self.rows


@dataclass(frozen=True)
class Outer:
    """Rows g ⊗ a of the columns ``where`` of θ, s = out·in: g (B, c, out), a (B, in)."""

    where: slice
    cotangent: Tensor
    taken: Tensor

    @property
    def width(self) -> int:
        """Columns, s."""
        return self.cotangent.shape[-1] * self.taken.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.cotangent.untyped_storage().nbytes() + self.taken.untyped_storage().nbytes()

    def examples(self, which: slice) -> Outer:
        """Those of some examples (views)."""
        return replace(self, cotangent=self.cotangent[which], taken=self.taken[which])

    def matmul(self, matrix: Tensor) -> Tensor:
        """J F, (B, c, L) for F (n, L), in F's precision."""
        taken, columns = self.taken.to(matrix), matrix[self.where].unbind(1)
        products = [taken @ self._table(column).mT for column in columns]  # (B, out) each
        return self.cotangent.to(matrix) @ torch.stack(products, -1)

    def rmatmul(self, weights: Tensor) -> Pieces:
        """Jᵀ w, (s, L) for w (B, c, L)."""
        for part, g in self._parts(weights.shape[-1]):
            sums = torch.einsum("bco,bcl->lbo", g, weights)
            yield part, (sums.mT @ self.taken).flatten(1).mT

    def gram(self, variance: Tensor) -> Tensor:
        """J diag(p) Jᵀ, (B·c, B·c), in float64: Σ_o g_bco g_b'c'o Q_obb', Q_o = Σ_i p_oi a_bi a_b'i."""
        size, c, _ = self.cotangent.shape
        pairs = (self.taken.unsqueeze(0) * self.taken.unsqueeze(1)).double()  # (B, B, in)
        total = pairs.new_zeros(size, c, size, c)
        for part, some in self._parts(size * size + size * c):
            g, inner = some.double(), pairs @ self._table(variance[self.where], part).double().mT  # (B, B, o)
            for b in range(size):
                total[b] += ((g[b] * inner[b].unsqueeze(1)) @ g.mT).transpose(0, 1)
        return total.view(size * c, size * c)

    def block_gram(self, variance: Tensor) -> Tensor:
        """J_b diag(p) J_bᵀ of every example, (B, c, c), in float64."""
        size, c, _ = self.cotangent.shape
        squares, total = self.taken.square().double(), self.taken.new_zeros(size, c, c, dtype=torch.float64)
        for part, some in self._parts(size * c):
            g, own = some.double(), squares @ self._table(variance[self.where], part).double().mT  # (B, o)
            total.baddbmm_(g * own.unsqueeze(1), g.mT)
        return total

    def column_squares(self, left: Tensor) -> Pieces:
        """Σ_q (Σ_bc A_qbc J_bc)² by column, (s,), for A (q, B, c)."""
        for part, g in self._parts(len(left) * len(self.taken)):
            sums = torch.einsum("qbc,bco->oqb", left, g)
            inner = sums.mT @ sums  # (o, B, B)
            yield part, (inner @ self.taken).mul_(self.taken).sum(1).flatten()

    def example_squares(self, left: Tensor | None) -> Pieces:
        """Σ_bq (Σ_c W_bqc J_bc)² by column, (s,), for W (B, q, c) or the identity."""
        squares = self.taken.square()
        for part, some in self._parts(self.cotangent.shape[0] * self.cotangent.shape[1]):
            g = some if left is None else left @ some
            yield part, (g.square().sum(1).mT @ squares).flatten()

    def dense(self) -> Tensor:
        """The rows, (B, c, s)."""
        return (self.cotangent.unsqueeze(-1) * self.taken[:, None, None, :]).flatten(2)

    def _table(self, values: Tensor, part: slice | None = None) -> Tensor:
        """Values by column as (out, in), or some of its rows (a view)."""
        width = self.taken.shape[-1]
        return (values if part is None else values[part]).view(-1, width)

    def _parts(self, numbers: int) -> Iterator[tuple[slice, Tensor]]:
        """Columns of some outputs at a time, with their cotangents, so that temporaries stay under ``PIECE`` numbers.

        Args:
            numbers: of a temporary, per output, beside the examples times the features.
        """
        width = self.taken.shape[-1]
        for outs in _pieces(self.cotangent.shape[-1], max(numbers, self.taken.numel())):
            yield slice(outs.start * width, outs.stop * width), self.cotangent[..., outs]


Block = Rows | Outer


@dataclass
class Part:
    """Blocks with one factor on their left; their last Gram matrix is kept, since one belief asks for it often."""

    blocks: Sequence[Block]
    shape: tuple[int, int]  # (B, d), of the rows before the factor
    _gram: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def gram(self, variance: Tensor) -> Tensor:
        """Σ over blocks of J diag(p) Jᵀ, (B·d, B·d), in float64."""
        if self._gram is None or self._gram[0] is not variance:
            total = self.blocks[0].gram(variance)
            for block in self.blocks[1:]:
                total += block.gram(variance)
            self._gram = (variance, total)
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

    terms: Sequence[tuple[Tensor | None, Part]]
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
                Part([block.examples(which) for block in part.blocks], (stop - start, part.shape[1])),
            )
            for left, part in self.terms
        ]
        return Jacobian(terms, stop - start, self.num_rows, self.num_parameters)

    def multiplied(self, factor: Tensor) -> Jacobian:
        """W J for W (B, r, c); rows are shared, not copied."""
        terms = [(factor.to(self.like) if left is None else factor.to(left) @ left, part) for left, part in self.terms]
        return Jacobian(terms, self.size, factor.shape[1], self.num_parameters)

    def scaled(self, number: float) -> Jacobian:
        """All rows times a number; they are shared, not copied."""
        eye = torch.eye(self.num_rows, dtype=self.like.dtype, device=self.like.device)
        return self.multiplied((number * eye).expand(self.size, -1, -1))

    @property
    def like(self) -> Tensor:
        """A tensor of its kind and device."""
        block = self.terms[0][1].blocks[0]
        return block.rows if isinstance(block, Rows) else block.taken

    def matmul(self, matrix: Tensor) -> Tensor:
        """J F, (B, c, L) for F (n, L), in F's precision."""
        total = matrix.new_zeros(self.size, self.num_rows, matrix.shape[1])
        for left, part in self.terms:
            inner = torch.stack([block.matmul(matrix) for block in part.blocks]).sum(0)
            total += inner if left is None else left.to(matrix) @ inner
        return total

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
                found = both_sides(left.double(), found)
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
        return total

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
    def of_rows(cls, rows: Tensor) -> Jacobian:
        """From stored rows (B, c, n)."""
        size, num_rows, num_parameters = rows.shape
        part = Part([Rows(slice(0, num_parameters), rows)], (size, num_rows))
        return cls([(None, part)], size, num_rows, num_parameters)


def _fill(result: Tensor, block: Block, pieces: Pieces) -> None:
    """Write what a block says of its columns."""
    for part, values in pieces:
        if isinstance(block.where, slice):
            result[block.where][part] = values
        else:
            result[block.where[part]] = values


def both_sides(factor: Tensor, gram: Tensor) -> Tensor:
    """Block-diagonal W (B, r, c) on both sides of G (B·c, B·c), (B·r, B·r)."""
    size, r, c = factor.shape
    half = (factor @ gram.view(size, c, size * c)).view(size * r, size, c)
    return (half.transpose(0, 1) @ factor.mT).transpose(0, 1).reshape(size * r, size * r)


def blocks(joint: Tensor, size: int) -> Tensor:
    """The diagonal blocks of (B·c, B·c), (B, c, c)."""
    width = len(joint) // size
    return joint.view(size, width, size, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _pieces(width: int, rows: int) -> Iterator[slice]:
    """Ranges of columns whose temporaries stay under ``PIECE`` numbers."""
    step = max(1, PIECE // rows)
    return (slice(start, min(start + step, width)) for start in range(0, width, step))
