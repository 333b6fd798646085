"""Beliefs with a full covariance, N(μ, P): exact on linear-Gaussian models, and the oracle for the other structures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from bayes_kf.inference.covariance.diagonal import DiagonalGaussian
from bayes_kf.inference.covariance.observation import Observation, solve_innovation
from bayes_kf.inference.linearization.jacobian import Jacobian

MAX_PARAMETERS = 20_000  # P takes 1.6 GB in float32 there


class FullGaussian(NamedTuple):
    """A Gaussian: mean μ (n,), covariance P (n, n)."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def from_variance(
        cls, mean: Tensor, variance: Tensor, *, rank: int = 10, block_sizes: Sequence[int] | None = None
    ) -> Self:
        """The belief N(mean, diag(variance)); both (n,). A full covariance has no rank and no blocks.

        Raises:
            ValueError: above 20,000 parameters.
        """
        if len(mean) > MAX_PARAMETERS:
            raise ValueError(f"`covariance` 'full' takes at most {MAX_PARAMETERS:,} parameters, got {len(mean):,}.")
        return cls(mean, torch.diag(variance))

    def with_mean(self, mean: Tensor) -> Self:
        """The belief with another mean, (n,)."""
        return self._replace(mean=mean)

    def predict(self, forgetting: float, drift_variance: float | Tensor) -> Self:
        """μ⁻ = μ, P⁻ = P/λ + Q; Q = qI for a number q, diag(q) for (n,)."""
        covariance = self.covariance / forgetting
        covariance.diagonal().add_(drift_variance)
        return self._replace(covariance=covariance)

    def condition(self, observation: Observation, curvature: Observation | None = None) -> Self:
        """μ + PMᵀS⁻¹u and P in Joseph form (I − KM)P(I − KM)ᵀ + KKᵀ, K = PMᵀS⁻¹.

        With fewer parameters than rows the same system is solved in the n parameters: L (I + LᵀMᵀML)⁻¹ Lᵀ, LLᵀ = P.
        """
        if curvature is not None:  # another M for the covariance
            return self.condition(curvature).with_mean(self.condition(observation).mean)
        M, P = observation.dense(), self.covariance
        if observation.num_parameters < observation.num_rows:
            return self._condition_in_parameters(M, observation.residual)
        cross = P @ M.mT  # PMᵀ (n, k)
        S = solve_innovation(M.double() @ cross.double(), observation.residual)
        K = torch.cholesky_solve(cross.mT.double(), S.chol).mT.to(cross.dtype)
        left = P - K @ cross.mT  # (I − KM)P
        covariance = left - (left @ M.mT) @ K.mT + K @ K.mT
        return self._replace(mean=self.mean + cross @ S.weights, covariance=0.5 * (covariance + covariance.mT))

    def accumulate(self, observation: Observation, curvature: Observation | None = None) -> Self:
        """As :meth:`condition`, which is exact: data add MᵀM whatever the prior."""
        return self.condition(observation, curvature)

    def add_precision(self, added: Tensor) -> Self:
        """The belief with precision P⁻¹ + diag(added) and the same mean; added (n,) may be negative."""
        return self._replace(covariance=add_to_inverse(self.covariance, added))

    def merge(self, others: Sequence[Self], prior: DiagonalGaussian) -> Self:
        """The product of this belief and K − 1 others from one prior, over that prior to the power K − 1."""
        beliefs = [self, *others]
        means, covariances = [b.mean for b in beliefs], [b.covariance for b in beliefs]
        mean, covariance = merge_moments(means, covariances, prior.mean, prior.variance)
        return self._replace(mean=mean, covariance=covariance)

    def root(self) -> Callable[[Tensor], Tensor]:
        """The map z → Lz, LLᵀ = P; takes (..., n)."""
        chol = torch.linalg.cholesky(self.covariance)
        return lambda noise: noise @ chol.mT

    def product(self, vector: Tensor) -> Tensor:
        """P v, (n,)."""
        return self.covariance @ vector

    def marginal_variance(self) -> Tensor:
        """diag(P), (n,)."""
        return self.covariance.diagonal()

    def covariance_matrix(self) -> Tensor:
        """P, (n, n)."""
        return self.covariance

    def output_covariance(self, jacobian: Jacobian) -> Tensor:
        """J P Jᵀ of every example, (B, c, c), in float64."""
        J = jacobian.dense()
        return (J @ self.covariance @ J.mT).double()

    def joint_output_covariance(self, jacobian: Jacobian) -> Tensor:
        """J P Jᵀ over the whole batch, (B·c, B·c), in float64."""
        J = jacobian.dense().flatten(0, 1)
        return (J @ self.covariance @ J.mT).double()

    def quadratic(self, vector: Tensor) -> Tensor:
        """vᵀ P⁻¹ v, a scalar."""
        return vector @ torch.linalg.solve(self.covariance, vector)

    def log_determinant(self) -> Tensor:
        """log det P, a scalar in float64."""
        return torch.linalg.slogdet(self.covariance.double()).logabsdet

    def scales(self) -> Tensor:
        """diag(P), (n,), which is positive and finite in a proper belief."""
        return self.covariance.diagonal()

    def _condition_in_parameters(self, M: Tensor, residual: Tensor) -> Self:
        """μ + L A⁻¹LᵀMᵀu and L A⁻¹ Lᵀ, A = I + LᵀMᵀML."""
        L = torch.linalg.cholesky(self.covariance.double())
        scaled = M.double() @ L  # ML (k, n)
        A = solve_innovation(scaled.mT @ scaled, scaled.mT @ residual.double())
        half = torch.linalg.solve_triangular(A.chol, L.mT, upper=False)  # C⁻¹Lᵀ, CCᵀ = A
        return self._replace(
            mean=self.mean + (L @ A.weights).to(self.mean), covariance=(half.mT @ half).to(self.covariance)
        )


def add_to_inverse(covariance: Tensor, added: Tensor) -> Tensor:
    """(P⁻¹ + diag(added))⁻¹ = (I + P diag(added))⁻¹P, (n, n)."""
    mixed = covariance.double() * added.double()
    mixed.diagonal().add_(1.0)
    solution = torch.linalg.solve(mixed, covariance.double()).to(covariance)
    return 0.5 * (solution + solution.mT)


def merge_moments(
    means: Sequence[Tensor], covariances: Sequence[Tensor], prior_mean: Tensor, prior_variance: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean (n,) and covariance (n, n) of a product of K Gaussians over their prior to the power K − 1, in float64."""
    prec = torch.diag((1.0 - len(means)) / prior_variance.double())
    pull = torch.zeros_like(prior_mean, dtype=torch.float64)
    for mean, covariance in zip(means, covariances, strict=True):
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance.double()))
        prec += inverse
        pull += inverse @ (mean - prior_mean).double()
    chol = torch.linalg.cholesky(prec)
    step = torch.cholesky_solve(pull.unsqueeze(-1), chol).squeeze(-1)
    return prior_mean + step.to(prior_mean), torch.cholesky_inverse(chol).to(covariances[0])
