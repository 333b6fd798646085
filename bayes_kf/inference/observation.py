"""Whitened linear observations: what every covariance structure is conditioned on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Observation:
    """Whitened linear observation u = M (θ − μ) + ε, ε ~ N(0, I): all that a belief is conditioned on.

    Attributes:
        rows: M, (k, n), k = B·r rows.
        residual: u, (k,).
        degrees_of_freedom: of ``innovation`` when the filter is consistent, B·rank(V).
        innovation: ν = uᵀS⁻¹u at the prior outputs.
    """

    rows: Tensor
    residual: Tensor
    degrees_of_freedom: int = 0
    innovation: float = 0.0

    def matvec(self, vector: Tensor) -> Tensor:
        """M v, (k,)."""
        return self.rows @ vector

    def rmatvec(self, weights: Tensor) -> Tensor:
        """Mᵀ w, (n,)."""
        return self.rows.mT @ weights

    def gram(self, variance: Tensor) -> Tensor:
        """M diag(p) Mᵀ, (k, k), in float64."""
        scaled = (self.rows * variance.sqrt()).double()
        return scaled @ scaled.mT

    def column_squares(self, left: Tensor | None = None) -> Tensor:
        """diag((A M)ᵀ A M), (n,): the column sums of squares of A M, with A = I when ``left`` is None."""
        rows = self.rows if left is None else left @ self.rows
        return rows.square().sum(0)

    def scaled(self, precision: float) -> Observation:
        """The same observation with its precision multiplied by a number."""
        root = precision**0.5
        return replace(self, rows=self.rows * root, residual=self.residual * root)


def whitened(
    factor: Tensor, residual: Tensor, jacobian: Tensor, degrees_of_freedom: int, innovation: float
) -> Observation:
    """M = W J and u, stacked over the batch.

    Args:
        factor: W, (B, r, m).
        residual: u, (B, r).
        jacobian: J, (B, m, n).
        degrees_of_freedom: see :class:`Observation`.
        innovation: see :class:`Observation`.
    """
    rows = (factor.to(jacobian.dtype) @ jacobian).flatten(0, 1)  # (B·r, n)
    return Observation(rows, residual.to(jacobian.dtype).flatten(), degrees_of_freedom, innovation)
