"""Whitened linear observations, on which every covariance structure is conditioned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.inference.linearization.jacobian import Jacobian


@dataclass(frozen=True)
class Observation:
    """A whitened linear observation u = M (θ − μ) + ε, ε ~ N(0, I).

    Attributes:
        jacobian: M as an operator with k = B·r rows.
        residual: u, (k,).
        degrees_of_freedom: of ``innovation`` if the filter is consistent: B·rank(V), V the variance of the outputs.
        innovation: the normalized innovation squared ν = uᵀS⁻¹u at the prior outputs.
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
        """M as a matrix, (k, n), for small problems and dense beliefs."""
        return self.jacobian.dense().flatten(0, 1)

    def scaled(self, precision: float) -> Observation:
        """The same observation with its precision multiplied by a number."""
        root = precision**0.5
        return replace(self, jacobian=self.jacobian.scaled(root), residual=self.residual * root)

    @classmethod
    def from_rows(cls, rows: Tensor, residual: Tensor) -> Observation:
        """From M as a matrix (k, n) and u (k,)."""
        return cls(Jacobian.from_rows(rows.unsqueeze(0)), residual)


class SolvedInnovation(NamedTuple):
    """The innovation covariance S = I + MPMᵀ, factorized and applied to u.

    Attributes:
        chol: lower Cholesky factor of S, (k, k), in float64.
        weights: S⁻¹u, (k,), in u's dtype.
        squared: uᵀS⁻¹u, a scalar, in u's dtype.
    """

    chol: Tensor
    weights: Tensor
    squared: Tensor


def solve_innovation(gram: Tensor, residual: Tensor) -> SolvedInnovation:
    """The Cholesky factor of S = I + G, S⁻¹u and uᵀS⁻¹u, solved in float64.

    Args:
        gram: G = MPMᵀ, (k, k).
        residual: u, (k,).
    """
    innovation_cov = gram.double() + torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    chol = torch.linalg.cholesky(innovation_cov)
    u = residual.double()
    weights = torch.cholesky_solve(u.unsqueeze(-1), chol).squeeze(-1)
    return SolvedInnovation(chol, weights.to(residual.dtype), (u @ weights).to(residual.dtype))


def whiten_observation(
    factor: Tensor, residual: Tensor, jacobian: Jacobian, degrees_of_freedom: int, innovation: float
) -> Observation:
    """The observation with M = W J, and u of all examples in one vector.

    Args:
        factor: W, (B, r, c).
        residual: u, (B, r).
        jacobian: J with c rows per example.
        degrees_of_freedom: see :class:`Observation`.
        innovation: see :class:`Observation`.
    """
    u = residual.to(jacobian.like.dtype).flatten()
    return Observation(jacobian.left_multiply(factor), u, degrees_of_freedom, innovation)
