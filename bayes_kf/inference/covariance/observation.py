"""Whitened linear observations: what every covariance structure is conditioned on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from bayes_kf.inference.linearization.jacobian import Jacobian


@dataclass(frozen=True)
class Observation:
    """Whitened linear observation u = M (θ − μ) + ε, ε ~ N(0, I): all that a belief is conditioned on.

    Attributes:
        jacobian: M as an operator with k = B·r rows, see ``jacobian``.
        residual: u, (k,).
        degrees_of_freedom: of ``innovation`` when the filter is consistent, B·rank(V) for the outputs' V.
        innovation: ν = uᵀS⁻¹u at the prior outputs.
    """

    jacobian: Jacobian
    residual: Tensor
    degrees_of_freedom: int = 0
    innovation: float = 0.0

    @property
    def num_rows(self) -> int:
        """k, the number of rows of M."""
        return len(self.residual)

    @property
    def num_parameters(self) -> int:
        """n, the number of parameters."""
        return self.jacobian.num_parameters

    def matmul(self, matrix: Tensor) -> Tensor:
        """M F, (k, L) for F (n, L)."""
        return self.jacobian.matmul(matrix).flatten(0, 1)

    def matvec(self, vector: Tensor) -> Tensor:
        """M v, (k,)."""
        return self.jacobian.matvec(vector).flatten()

    def rmatmul(self, weights: Tensor) -> Tensor:
        """Mᵀ w, (n, L) for w (k, L)."""
        return self.jacobian.rmatmul(weights.view(self.jacobian.size, -1, weights.shape[1]))

    def rmatvec(self, weights: Tensor) -> Tensor:
        """Mᵀ w, (n,)."""
        return self.jacobian.rmatvec(weights.view(self.jacobian.size, -1))

    def gram(self, variance: Tensor) -> Tensor:
        """M diag(p) Mᵀ, (k, k), in float64."""
        return self.jacobian.gram(variance)

    def column_squares(self, left: Tensor | None = None) -> Tensor:
        """diag((A M)ᵀ A M), (n,): the column sums of squares of A M, with A = I when ``left`` is None."""
        return self.jacobian.column_squares(left)

    def dense(self) -> Tensor:
        """M as a matrix, (k, n); for small problems, and beliefs that are dense themselves."""
        return self.jacobian.dense().flatten(0, 1)

    def scaled(self, precision: float) -> Observation:
        """The same observation with its precision multiplied by a number."""
        root = precision**0.5
        return replace(self, jacobian=self.jacobian.scaled(root), residual=self.residual * root)

    @classmethod
    def from_rows(cls, rows: Tensor, residual: Tensor) -> Observation:
        """From M as a matrix (k, n) and u (k,)."""
        return cls(Jacobian.from_rows(rows.unsqueeze(0)), residual)


def whitened(
    factor: Tensor, residual: Tensor, jacobian: Jacobian, degrees_of_freedom: int, innovation: float
) -> Observation:
    """M = W J and u, stacked over the batch.

    Args:
        factor: W, (B, r, c).
        residual: u, (B, r).
        jacobian: J with c rows an example.
        degrees_of_freedom: see :class:`Observation`.
        innovation: see :class:`Observation`.
    """
    flat = residual.to(jacobian.like.dtype).flatten()
    return Observation(jacobian.left_multiply(factor), flat, degrees_of_freedom, innovation)
