"""Beliefs with a diagonal covariance, N(μ, diag(p)), in three forms that differ in how they stay diagonal.

- gain form: the marginal *variances* of the exact posterior (equation 11 of LoKO);
- information form: the marginal *precisions* of the exact posterior (natural gradient, mean-field optimum);
- mixed form: the mean of the gain form with the variances of the information form.

All three are projections of the exact posterior; they are equal for one parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from bayes_kf.inference.covariance.observation import Observation, SolvedInnovation, solve_innovation
from bayes_kf.inference.linearization.jacobian import Jacobian
from bayes_kf.inference.linearization.jacobian_blocks import CHUNK_NUMEL
from bayes_kf.processes import parameter_sums

MAX_SHRINKAGE = 0.999  # relative loss of a variance above which the difference p − p²(...) is mostly rounding


class DiagonalGaussian(NamedTuple):
    """A diagonal Gaussian, conditioned in gain form: mean μ (n,), variance p (n,)."""

    mean: Tensor
    variance: Tensor

    @classmethod
    def from_variance(
        cls, mean: Tensor, variance: Tensor, *, rank: int = 10, block_sizes: Sequence[int] | None = None
    ) -> Self:
        """The belief N(mean, diag(variance)); both (n,). A diagonal has no rank and no blocks."""
        return cls(mean, variance)

    def with_mean(self, mean: Tensor) -> Self:
        """The belief with another mean, (n,)."""
        return self._replace(mean=mean)

    def predict(self, forgetting: float, drift_variance: float | Tensor) -> Self:
        """μ⁻ = μ, p⁻ = p/λ + q; q a number or (n,)."""
        return self._replace(variance=self.variance / forgetting + drift_variance)

    def condition(self, observation: Observation, curvature: Observation | None = None) -> Self:
        """μ + p∘MᵀS⁻¹u and p − p²∘diag(MᵀS⁻¹M), S = I + M diag(p) Mᵀ.

        If the difference is mostly rounding, its exact lower bound 1/(p⁻¹ + diag(MᵀM)) replaces it. With fewer
        parameters than rows the same system is solved in the n parameters.

        Args:
            observation: M and u.
            curvature: another M for the variance.
        """
        solved = self._solve(observation)
        if curvature is None:
            return self._replace(
                mean=self._gain_mean(observation, solved), variance=self._gain_variance(observation, solved)
            )
        variance = self._gain_variance(curvature, self._solve(curvature))
        return self._replace(mean=self._gain_mean(observation, solved), variance=variance)

    def accumulate(self, observation: Observation, curvature: Observation | None = None) -> Self:
        """The mixed form: the mean of the gain form, and p⁻¹ + diag(MᵀM), which does not depend on the prior."""
        return self._condition_mixed(observation, curvature)

    def add_precision(self, added: Tensor) -> Self:
        """The belief with precision P⁻¹ + diag(added) and the same mean; added (n,) may be negative."""
        return self._replace(variance=self.variance / (1.0 + added * self.variance))

    def merge(self, others: Sequence[Self], prior: DiagonalGaussian) -> Self:
        """The product of this belief and K − 1 others from one prior, over that prior to the power K − 1.

        Precisions and P⁻¹μ add up.
        """
        beliefs, prior_prec = [self, *others], 1.0 / prior.variance.double()
        prec = prior_prec + torch.stack([1.0 / b.variance.double() - prior_prec for b in beliefs]).sum(0)
        pull = torch.stack([(b.mean - prior.mean).double() / b.variance.double() for b in beliefs]).sum(0)
        return self._replace(mean=prior.mean + (pull / prec).to(prior.mean), variance=(1.0 / prec).to(prior.variance))

    def root(self) -> Callable[[Tensor], Tensor]:
        """The map z → √p∘z; takes (..., n)."""
        sd = self.variance.sqrt()
        return lambda noise: sd * noise

    def product(self, vector: Tensor) -> Tensor:
        """P v, (n,)."""
        return self.variance * vector

    def marginal_variance(self) -> Tensor:
        """p, (n,)."""
        return self.variance

    def covariance_matrix(self) -> Tensor:
        """diag(p), (n, n)."""
        return torch.diag(self.variance)

    def output_covariance(self, jacobian: Jacobian) -> Tensor:
        """J P Jᵀ of every example, (B, c, c), in float64."""
        return jacobian.block_gram(self.variance)

    def joint_output_covariance(self, jacobian: Jacobian) -> Tensor:
        """J P Jᵀ over the whole batch, (B·c, B·c), in float64."""
        return jacobian.gram(self.variance)

    def quadratic(self, vector: Tensor) -> Tensor:
        """vᵀ P⁻¹ v, a scalar."""
        pieces = zip(vector.split(CHUNK_NUMEL), self.variance.split(CHUNK_NUMEL), strict=True)
        return parameter_sums.sum_over_shards(torch.stack([(v.square() / p).sum() for v, p in pieces]).sum())

    def log_determinant(self) -> Tensor:
        """log det P, a scalar in float64, since a float32 sum over millions of numbers is wrong by several nats."""
        logs = [p.double().log().sum() for p in self.variance.split(CHUNK_NUMEL)]
        return parameter_sums.sum_over_shards(torch.stack(logs).sum())

    def scales(self) -> Tensor:
        """p, (n,), which is positive and finite in a proper belief."""
        return self.variance

    def _solve(self, observation: Observation) -> SolvedInnovation:
        """S and S⁻¹u; or, with fewer parameters than rows, A = I + √P MᵀM √P and A⁻¹√P Mᵀu."""
        if observation.num_parameters >= observation.num_rows or parameter_sums.is_sharded():
            return solve_innovation(observation.gram(self.variance), observation.residual)
        sd = self.variance.sqrt()
        scaled = (observation.dense() * sd).double()  # M√P (k, n)
        return solve_innovation(scaled.mT @ scaled, sd * observation.rmatvec(observation.residual))

    def _gain_mean(self, observation: Observation, solved: SolvedInnovation) -> Tensor:
        """μ + p∘MᵀS⁻¹u."""
        if len(solved.weights) < len(observation.residual):
            return self.mean + self.variance.sqrt() * solved.weights
        return observation.rmatvec(solved.weights).mul_(self.variance).add_(self.mean)

    def _gain_variance(self, observation: Observation, solved: SolvedInnovation) -> Tensor:
        """p − p²∘diag(MᵀS⁻¹M)."""
        chol = solved.chol
        if len(chol) < len(observation.residual):
            return self.variance * torch.cholesky_inverse(chol).diagonal().to(self.variance)
        eye = torch.eye(len(chol), dtype=chol.dtype, device=chol.device)
        inverse = torch.linalg.solve_triangular(chol, eye, upper=False).to(self.mean.dtype)  # C⁻¹, CCᵀ = S
        shrinkage = observation.column_squares(inverse).mul_(self.variance)
        largest = float(shrinkage.max())
        variance = shrinkage.neg_().add_(1.0).mul_(self.variance)
        if largest < MAX_SHRINKAGE:
            return variance
        return torch.maximum(variance, self._information_variance(observation))

    def _information_variance(self, observation: Observation) -> Tensor:
        """1 / (p⁻¹ + diag(MᵀM))."""
        return observation.column_squares().mul_(self.variance).add_(1.0).reciprocal_().mul_(self.variance)

    def _condition_mixed(self, observation: Observation, curvature: Observation | None) -> Self:
        """The mean of the gain form with the variance of the information form."""
        mean = self._gain_mean(observation, self._solve(observation))
        return self._replace(mean=mean, variance=self._information_variance(curvature or observation))


class DiagonalInformationGaussian(DiagonalGaussian):
    """A diagonal Gaussian, conditioned in information form."""

    __slots__ = ()

    def condition(self, observation: Observation, curvature: Observation | None = None) -> Self:
        """p⁻¹ + diag(MᵀM) and μ + p_new∘Mᵀu."""
        variance = self._information_variance(curvature or observation)
        mean = observation.rmatvec(observation.residual).mul_(variance).add_(self.mean)
        return self._replace(mean=mean, variance=variance)

    def accumulate(self, observation: Observation, curvature: Observation | None = None) -> Self:
        """As :meth:`condition`, whose added precision does not depend on the prior."""
        return self.condition(observation, curvature)


class DiagonalMixedGaussian(DiagonalGaussian):
    """A diagonal Gaussian, conditioned in mixed form."""

    __slots__ = ()

    def condition(self, observation: Observation, curvature: Observation | None = None) -> Self:
        """μ + p∘MᵀS⁻¹u and p⁻¹ + diag(MᵀM)."""
        return self._condition_mixed(observation, curvature)
