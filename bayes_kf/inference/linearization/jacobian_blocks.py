"""Blocks of columns of the Jacobian, one for a tensor or for several consecutive ones, and their products.

A ``DenseBlock`` stores its rows (LoRA's A and B, norms, convolutions): a row is as long as the tensor, which is short
for adapters. An ``OuterProductBlock`` belongs to a Linear that is applied to one vector per example (a classifier). Its
row is g ⊗ a, and only g and a are stored: m + d numbers for a head of m classes on d features instead of m·d.

Letters: B examples, c rows per example, s columns of the block, n parameters, J the block's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CHUNK_NUMEL = 2**19  # numbers in a temporary tensor


@dataclass(frozen=True)
class DenseBlock:
    """Stored rows of some columns.

    Attributes:
        columns: of the block in θ, s of them.
        rows: J, (B, c, s).
    """

    columns: slice | Tensor
    rows: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.rows.untyped_storage().nbytes()

    def examples(self, which: slice) -> DenseBlock:
        """The rows of some examples (views)."""
        return replace(self, rows=self.rows[which])

    def first_rows(self, count: int) -> DenseBlock:
        """The first rows of every example (views)."""
        return replace(self, rows=self.rows[:, :count])

    def gram(self, variance: Tensor) -> Tensor:
        """J diag(p) Jᵀ, (B·c, B·c), in float64."""
        rows, root = self.rows.flatten(0, 1), variance[self.columns].sqrt()
        gram = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
        step = max(1, CHUNK_NUMEL // len(rows))
        for start in range(0, rows.shape[1], step):
            scaled = rows[:, start : start + step].double() * root[start : start + step]  # J diag(√p)
            gram.addmm_(scaled, scaled.mT)
        return gram

    def block_gram(self, variance: Tensor) -> Tensor:
        """J_b diag(p) J_bᵀ of every example b, (B, c, c), in float64."""
        size, count, width = self.rows.shape
        root = variance[self.columns].sqrt()
        gram = self.rows.new_zeros(size, count, count, dtype=torch.float64)
        step = max(1, CHUNK_NUMEL // (size * count))
        for start in range(0, width, step):
            scaled = self.rows[..., start : start + step].double() * root[start : start + step]  # J_b diag(√p)
            gram.baddbmm_(scaled, scaled.mT)
        return gram

    def column_squares(self, factor: Tensor, result: Tensor) -> None:
        """Writes Σ_q (Σ_bc A_qbc J_bcs)² into its part of ``result`` (n,), for A (q, B, c)."""
        rows, flat = self.rows.flatten(0, 1), factor.flatten(1)
        step = max(1, CHUNK_NUMEL // len(flat))
        for start in range(0, rows.shape[1], step):
            self._write(result, start, (flat @ rows[:, start : start + step]).square_().sum(0))

    def example_squares(self, factor: Tensor | None, result: Tensor) -> None:
        """Writes Σ_bq (Σ_c W_bqc J_bcs)² into its part of ``result`` (n,), for W (B, q, c) or the identity."""
        num_rows = self.rows.shape[0] * (self.rows.shape[1] if factor is None else factor.shape[1])
        step = max(1, CHUNK_NUMEL // num_rows)
        for start in range(0, self.rows.shape[-1], step):
            rows = self.rows[..., start : start + step]
            rows = rows if factor is None else factor @ rows
            self._write(result, start, rows.square().sum((0, 1)))

    def _write(self, result: Tensor, start: int, values: Tensor) -> None:
        """Writes values of the block's columns from ``start`` on."""
        if isinstance(self.columns, slice):
            result[self.columns][start : start + len(values)] = values
        else:
            result[self.columns[start : start + len(values)]] = values

    def dense(self) -> Tensor:
        """J, (B, c, s)."""
        return self.rows


@dataclass(frozen=True)
class OuterProductBlock:
    """Rows g ⊗ a of some columns, s = out·in.

    Attributes:
        columns: of the block in θ, s of them.
        cotangent: g, (B, c, out), the gradient of the module's output.
        activation: a, (B, in), the module's input; ones for a bias, with in = 1.
    """

    columns: slice
    cotangent: Tensor
    activation: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.cotangent.untyped_storage().nbytes() + self.activation.untyped_storage().nbytes()

    def examples(self, which: slice) -> OuterProductBlock:
        """The rows of some examples (views)."""
        return replace(self, cotangent=self.cotangent[which], activation=self.activation[which])

    def first_rows(self, count: int) -> OuterProductBlock:
        """The first rows of every example (views)."""
        return replace(self, cotangent=self.cotangent[:, :count])

    def gram(self, variance: Tensor) -> Tensor:
        """J diag(p) Jᵀ, (B·c, B·c), in float64: Σ_o g_bco g_b'c'o Q_obb', Q_obb' = Σ_i p_oi a_bi a_b'i."""
        size, count, num_outputs = self.cotangent.shape
        a, p = self.activation.double(), variance[self.columns].view(num_outputs, -1)  # (out, in)
        pairs = a.unsqueeze(0) * a.unsqueeze(1)  # (B, B, in)
        gram = pairs.new_zeros(size, count, size, count)
        step = max(1, CHUNK_NUMEL // max(size * size + size * count, a.numel()))
        for start in range(0, num_outputs, step):
            g = self.cotangent[..., start : start + step].double()
            inner = pairs @ p[start : start + step].double().mT  # Q, (B, B, out)
            for b in range(size):
                gram[b] += ((g[b] * inner[b].unsqueeze(1)) @ g.mT).transpose(0, 1)
        return gram.view(size * count, size * count)

    def block_gram(self, variance: Tensor) -> Tensor:
        """J_b diag(p) J_bᵀ of every example b, (B, c, c), in float64."""
        size, count, num_outputs = self.cotangent.shape
        squares, p = self.activation.double().square(), variance[self.columns].view(num_outputs, -1)  # (out, in)
        gram = self.activation.new_zeros(size, count, count, dtype=torch.float64)
        step = max(1, CHUNK_NUMEL // max(size * count, self.activation.numel()))
        for start in range(0, num_outputs, step):
            g = self.cotangent[..., start : start + step].double()
            own = squares @ p[start : start + step].double().mT  # Σ_i p_oi a_bi², (B, out)
            gram.baddbmm_(g * own.unsqueeze(1), g.mT)
        return gram

    def column_squares(self, factor: Tensor, result: Tensor) -> None:
        """Writes Σ_q (Σ_bc A_qbc J_bcs)² into its part of ``result`` (n,), for A (q, B, c)."""
        own, a, width = result[self.columns], self.activation, self.activation.shape[-1]
        step = max(1, CHUNK_NUMEL // max(len(factor) * len(a), a.numel()))
        for start in range(0, self.cotangent.shape[-1], step):
            sums = torch.einsum("qbc,bco->oqb", factor, self.cotangent[..., start : start + step])
            inner = sums.mT @ sums  # (out, B, B)
            own[start * width : (start + step) * width] = (inner @ a).mul_(a).sum(1).flatten()

    def example_squares(self, factor: Tensor | None, result: Tensor) -> None:
        """Writes Σ_bq (Σ_c W_bqc J_bcs)² into its part of ``result`` (n,), for W (B, q, c) or the identity."""
        own, squares, width = result[self.columns], self.activation.square(), self.activation.shape[-1]
        size, count, num_outputs = self.cotangent.shape
        step = max(1, CHUNK_NUMEL // max(size * count, self.activation.numel()))
        for start in range(0, num_outputs, step):
            g = self.cotangent[..., start : start + step]
            g = g if factor is None else factor @ g
            own[start * width : (start + step) * width] = (g.square().sum(1).mT @ squares).flatten()

    def dense(self) -> Tensor:
        """J, (B, c, s)."""
        return (self.cotangent.unsqueeze(-1) * self.activation[:, None, None, :]).flatten(2)


Block = DenseBlock | OuterProductBlock


def multiply_blocks(blocks: Sequence[Block], matrix: Tensor) -> list[Tensor]:
    """J F of each block, (B, c, L), for F (n, L), in the dtype of F. One call serves all blocks, for speed.

    Outer products: Σ_oi g_bco a_bi F_oiℓ.
    """
    products = []
    for block in blocks:
        own = matrix[block.columns]  # (s, L)
        if isinstance(block, OuterProductBlock):
            activation, inner = block.activation.to(matrix), []
            for column in own.unbind(1):
                inner.append(activation @ column.view(-1, activation.shape[-1]).mT)  # (B, out)
            products.append(block.cotangent.to(matrix) @ torch.stack(inner, -1))
        elif matrix.dtype == block.rows.dtype:
            products.append(block.rows @ own)
        else:
            size, count, width = block.rows.shape
            product = matrix.new_zeros(size, count, matrix.shape[1])
            step = max(1, CHUNK_NUMEL // (size * count))
            for start in range(0, width, step):
                product += block.rows[..., start : start + step].to(matrix) @ own[start : start + step]
            products.append(product)
    return products


def multiply_transposed_blocks(blocks: Sequence[Block], weights: Tensor, result: Tensor) -> None:
    """Writes Jᵀw of each block into its rows of ``result`` (n, L), for w (B, c, L).

    Outer products: Σ_bc g_bco w_bcℓ a_bi.
    """
    for block in blocks:
        if isinstance(block, DenseBlock):
            result[block.columns] = block.rows.flatten(0, 1).mT @ weights.flatten(0, 1)
            continue
        own, width = result[block.columns], block.activation.shape[-1]
        step = max(1, CHUNK_NUMEL // max(weights.shape[-1], block.activation.numel()))
        for start in range(0, block.cotangent.shape[-1], step):
            g = block.cotangent[..., start : start + step]
            sums = torch.einsum("bco,bcl->lbo", g, weights)
            own[start * width : (start + step) * width] = (sums.mT @ block.activation).flatten(1).mT
