"""Rows of the Jacobian of one or several neighbouring tensors, and their products.

``Rows`` are stored as they are (LoRA's A and B, norms, convolutions): their length is the tensor's size, small for
adapters. ``Outer`` is a Linear applied to one vector per example (classifiers): a row is g ⊗ a, and only g and a are
kept, so that a head of m classes on d features costs m + d numbers a row and not m·d.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CHUNK_NUMEL = 2**19  # numbers in a temporary
Pieces = Iterator[tuple[slice, Tensor]]  # some columns of a block at a time


@dataclass(frozen=True)
class DenseBlock:
    """Stored rows of the columns ``where`` of θ, (B, c, s)."""

    where: slice | Tensor
    rows: Tensor

    @property
    def width(self) -> int:
        """s, the number of columns."""
        return self.rows.shape[-1]

    @property
    def nbytes(self) -> int:
        """The bytes that its tensors take."""
        return self.rows.untyped_storage().nbytes()

    def examples(self, which: slice) -> DenseBlock:
        """Those of some examples (views)."""
        return replace(self, rows=self.rows[which])

    def first_rows(self, count: int) -> DenseBlock:
        """The first rows of every example (views)."""
        return replace(self, rows=self.rows[:, :count])

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
            scaled = rows[:, part].double() * root[part]
            total.addmm_(scaled, scaled.mT)
        return total

    def block_gram(self, variance: Tensor) -> Tensor:
        """J_b diag(p) J_bᵀ of every example, (B, c, c), in float64."""
        root = variance[self.where].sqrt()
        total = self.rows.new_zeros(*self.rows.shape[:2], self.rows.shape[1], dtype=torch.float64)
        for part in _pieces(self.width, self.rows.shape[0] * self.rows.shape[1]):
            scaled = self.rows[..., part].double() * root[part]
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
class OuterProductBlock:
    """Rows g ⊗ a of the columns ``where`` of θ, s = out·in: g (B, c, out), a (B, in)."""

    where: slice
    cotangent: Tensor
    activation: Tensor

    @property
    def width(self) -> int:
        """s, the number of columns."""
        return self.cotangent.shape[-1] * self.activation.shape[-1]

    @property
    def nbytes(self) -> int:
        """The bytes that its tensors take."""
        return self.cotangent.untyped_storage().nbytes() + self.activation.untyped_storage().nbytes()

    def examples(self, which: slice) -> OuterProductBlock:
        """Those of some examples (views)."""
        return replace(self, cotangent=self.cotangent[which], activation=self.activation[which])

    def first_rows(self, count: int) -> OuterProductBlock:
        """The first rows of every example (views)."""
        return replace(self, cotangent=self.cotangent[:, :count])

    def matmul(self, matrix: Tensor) -> Tensor:
        """J F, (B, c, L) for F (n, L), in F's precision."""
        activation, columns = self.activation.to(matrix), matrix[self.where].unbind(1)
        products = [activation @ self._table(column).mT for column in columns]  # (B, out) each
        return self.cotangent.to(matrix) @ torch.stack(products, -1)

    def rmatmul(self, weights: Tensor) -> Pieces:
        """Jᵀ w, (s, L) for w (B, c, L)."""
        for part, g in self._parts(weights.shape[-1]):
            sums = torch.einsum("bco,bcl->lbo", g, weights)
            yield part, (sums.mT @ self.activation).flatten(1).mT

    def gram(self, variance: Tensor) -> Tensor:
        """J diag(p) Jᵀ, (B·c, B·c), in float64: Σ_o g_bco g_b'c'o Q_obb', Q_o = Σ_i p_oi a_bi a_b'i."""
        size, c, _ = self.cotangent.shape
        activation = self.activation.double()
        pairs = activation.unsqueeze(0) * activation.unsqueeze(1)  # (B, B, in)
        total = pairs.new_zeros(size, c, size, c)
        for part, some in self._parts(size * size + size * c):
            g, inner = some.double(), pairs @ self._table(variance[self.where], part).double().mT  # (B, B, o)
            for b in range(size):
                total[b] += ((g[b] * inner[b].unsqueeze(1)) @ g.mT).transpose(0, 1)
        return total.view(size * c, size * c)

    def block_gram(self, variance: Tensor) -> Tensor:
        """J_b diag(p) J_bᵀ of every example, (B, c, c), in float64."""
        size, c, _ = self.cotangent.shape
        squares, total = self.activation.double().square(), self.activation.new_zeros(size, c, c, dtype=torch.float64)
        for part, some in self._parts(size * c):
            g, own = some.double(), squares @ self._table(variance[self.where], part).double().mT  # (B, o)
            total.baddbmm_(g * own.unsqueeze(1), g.mT)
        return total

    def column_squares(self, left: Tensor) -> Pieces:
        """Σ_q (Σ_bc A_qbc J_bc)² by column, (s,), for A (q, B, c)."""
        for part, g in self._parts(len(left) * len(self.activation)):
            sums = torch.einsum("qbc,bco->oqb", left, g)
            inner = sums.mT @ sums  # (o, B, B)
            yield part, (inner @ self.activation).mul_(self.activation).sum(1).flatten()

    def example_squares(self, left: Tensor | None) -> Pieces:
        """Σ_bq (Σ_c W_bqc J_bc)² by column, (s,), for W (B, q, c) or the identity."""
        squares = self.activation.square()
        for part, some in self._parts(self.cotangent.shape[0] * self.cotangent.shape[1]):
            g = some if left is None else left @ some
            yield part, (g.square().sum(1).mT @ squares).flatten()

    def dense(self) -> Tensor:
        """The rows, (B, c, s)."""
        return (self.cotangent.unsqueeze(-1) * self.activation[:, None, None, :]).flatten(2)

    def _table(self, values: Tensor, part: slice | None = None) -> Tensor:
        """Values by column as (out, in), or some of its rows (a view)."""
        width = self.activation.shape[-1]
        return (values if part is None else values[part]).view(-1, width)

    def _parts(self, numbers: int) -> Iterator[tuple[slice, Tensor]]:
        """Columns of some outputs at a time, with their cotangents, so that temporaries stay under ``PIECE`` numbers.

        Args:
            numbers: of a temporary, per output, beside the examples times the features.
        """
        width = self.activation.shape[-1]
        for outs in _pieces(self.cotangent.shape[-1], max(numbers, self.activation.numel())):
            yield slice(outs.start * width, outs.stop * width), self.cotangent[..., outs]


Block = DenseBlock | OuterProductBlock


def _pieces(width: int, rows: int) -> Iterator[slice]:
    """Ranges of columns whose temporaries stay under ``PIECE`` numbers."""
    step = max(1, CHUNK_NUMEL // rows)
    return (slice(start, min(start + step, width)) for start in range(0, width, step))
