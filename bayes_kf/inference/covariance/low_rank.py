"""Beliefs whose precision is a diagonal plus a low-rank part: P⁻¹ = Λ = D + W Wᵀ, D = diag(d), W (n, L).

An update appends the k columns Mᵀ to W, which is exact. Then W is truncated to its L leading directions in units of the
diagonal, and d grows so that each parameter keeps its marginal variance (ours). An update costs n (L + k)². The scheme
is that of the low-rank filter of Chang et al. (2023, arXiv:2305.19535), truncated here relative to the diagonal. Theirs
adds the diagonal of the truncated part to d, which is over-confident with more parameters than data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from bayes_kf.inference.covariance.diagonal import DiagonalGaussian
from bayes_kf.inference.covariance.observation import Observation
from bayes_kf.inference.linearization.jacobian import Jacobian
from bayes_kf.processes import parameter_sums

COLUMNS = 16  # of the truncated part, computed at once

Truncation = Callable[[Tensor, Tensor, Tensor, int, Callable[[Tensor], Tensor]], tuple[Tensor, Tensor]]
"""From d (n,), squared lengths (K,), V (K, K), L and V ↦ FV to the truncated W (n, L) and the new d."""


class LowRankGaussian(NamedTuple):
    """A Gaussian: mean μ (n,), diagonal precision d (n,), low-rank factor W (n, L), and WᵀD⁻¹W (L, L) in float64."""

    mean: Tensor
    diagonal: Tensor
    factor: Tensor
    gram: Tensor

    @classmethod
    def from_variance(
        cls, mean: Tensor, variance: Tensor, *, rank: int = 10, block_sizes: Sequence[int] | None = None
    ) -> Self:
        """The belief N(mean, diag(variance)), both (n,), with L = ``rank`` columns of zeros. There are no blocks."""
        gram = mean.new_zeros(rank, rank, dtype=torch.float64)
        return cls(mean, 1.0 / variance, mean.new_zeros(len(mean), rank), gram)

    @classmethod
    def from_precision(cls, mean: Tensor, diagonal: Tensor, factor: Tensor) -> Self:
        """The belief with precision D + WWᵀ; computes WᵀD⁻¹W, which every use of the belief needs."""
        scaled = factor.double() / diagonal.double().sqrt().unsqueeze(-1)
        return cls(mean, diagonal, factor, parameter_sums.sum_over_shards(scaled.mT @ scaled))

    def with_mean(self, mean: Tensor) -> Self:
        """The belief with another mean, (n,)."""
        return self._replace(mean=mean)

    def predict(self, forgetting: float, drift_variance: float | Tensor) -> Self:
        """P⁻ = P/λ + Q, Q diagonal, which keeps the form: d⁻ = λd/(1 + qλd), W⁻ = (d⁻/λd)∘√λW R.

        RRᵀ = (I + λWᵀ(E − E d⁻ E)W)⁻¹ with E = 1/(λd), by Woodbury's identity; q is a number or (n,).
        """
        if not isinstance(drift_variance, Tensor) and drift_variance == 0.0:  # λ cancels in WᵀD⁻¹W
            return self._replace(diagonal=self.diagonal * forgetting, factor=self.factor * forgetting**0.5)
        d, factor = self.diagonal.double() * forgetting, self.factor.double() * forgetting**0.5
        shrink = 1.0 / (1.0 + drift_variance * d)  # d⁻/(λd)
        inner = parameter_sums.sum_over_shards(
            factor.mT @ ((drift_variance * shrink).unsqueeze(-1) * factor)
        )  # E − E d⁻ E = q d⁻/(λd), without cancellation
        root = torch.linalg.cholesky(inner + torch.eye(len(inner), dtype=inner.dtype, device=inner.device))
        rotated = torch.linalg.solve_triangular(root, (shrink.unsqueeze(-1) * factor).mT, upper=False).mT
        return self.from_precision(self.mean, (d * shrink).to(self.diagonal), rotated.to(self.factor))

    def condition(self, observation: Observation, curvature: Observation | None = None) -> Self:
        """Λ + MᵀM and μ + Λ_new⁻¹Mᵀu, exact; then W is truncated to L columns with the marginal variances unchanged.

        With A = [Wᵀ; M], Λ_new = D + AᵀA, and the step is D⁻¹Aᵀ(I + AD⁻¹Aᵀ)⁻¹[0; u]: one small system, in float64. The
        equal difference D⁻¹Mᵀu − D⁻¹A(…)Mᵀu cancels in float32 if MD⁻¹Mᵀ is much larger than one.
        """
        return self._condition(observation, curvature, truncate)

    def accumulate(self, observation: Observation, curvature: Observation | None = None) -> Self:
        """As :meth:`condition`, but the diagonal of Λ + MᵀM is unchanged, so that data add the same under any prior.

        With more parameters than data the result is over-confident.
        """
        return self._condition(observation, curvature, truncate_in_precision)

    def add_precision(self, added: Tensor) -> Self:
        """The belief with precision Λ + diag(added) and the same mean; added (n,) may be negative."""
        return self.from_precision(self.mean, self.diagonal + added, self.factor)

    def merge(self, others: Sequence[Self], prior: DiagonalGaussian) -> Self:
        """The product of this belief and K − 1 others from one prior, over that prior to the power K − 1.

        Diagonals, factors side by side, and P⁻¹μ add up exactly; then W is truncated to L columns as after an update.
        """
        beliefs, rank, prior_prec = [self, *others], self.factor.shape[1], 1.0 / prior.variance
        diagonal = prior_prec + torch.stack([b.diagonal - prior_prec for b in beliefs]).sum(0)
        joint = self.from_precision(prior.mean, diagonal, torch.cat([b.factor for b in beliefs], 1))
        steps = [b.mean - prior.mean for b in beliefs]
        pulls = [b.diagonal * step + b.factor @ (b.factor.mT @ step) for b, step in zip(beliefs, steps, strict=True)]
        mean = prior.mean + joint.product(torch.stack(pulls).sum(0))
        values, vectors = torch.linalg.eigh(joint.gram)  # ascending
        values = values.clamp_min(0.0)  # negative only by rounding
        factor, diagonal = truncate(diagonal, values, vectors.to(mean), rank, lambda some: joint.factor @ some)
        return self.from_precision(mean, diagonal, factor)

    def root(self) -> Callable[[Tensor], Tensor]:
        """The map z → D^(−1/2) (I + FFᵀ)^(−1/2) z, F = D^(−1/2) W; takes (..., n)."""
        scale = self.diagonal.rsqrt()
        scaled = self.factor * scale.unsqueeze(-1)
        values, vectors = torch.linalg.eigh(self.gram)
        values = values.clamp_min(0.0)  # negative only by rounding
        weights = 1.0 / ((1.0 + values) + (1.0 + values).sqrt())  # (1 − (1 + v)^(−1/2)) / v
        inner = ((vectors * weights) @ vectors.mT).to(scaled.dtype)
        return lambda noise: scale * (noise - ((noise @ scaled) @ inner) @ scaled.mT)

    def product(self, vector: Tensor) -> Tensor:
        """P v, (n,)."""
        return self._solve(vector.unsqueeze(-1)).squeeze(-1)

    def marginal_variance(self) -> Tensor:
        """diag(P), (n,)."""
        half = torch.linalg.solve_triangular(_inner_chol(self.gram), self._scaled_factor().mT, upper=False)
        exact = (1.0 / self.diagonal.double() - half.square().sum(0)).to(self.mean)
        return torch.maximum(exact, 1.0 / (self.diagonal + self.factor.square().sum(1)))  # a bound, if rounding wins

    def covariance_matrix(self) -> Tensor:
        """P, (n, n)."""
        return self._solve(torch.eye(len(self.mean), dtype=self.mean.dtype, device=self.mean.device))

    def output_covariance(self, jacobian: Jacobian) -> Tensor:
        """J P Jᵀ of every example, (B, c, c), in float64."""
        cross = jacobian.matmul(self._scaled_factor())  # JD⁻¹W (B, c, L)
        half = torch.linalg.solve_triangular(_inner_chol(self.gram), cross.mT, upper=False)
        return jacobian.block_gram(1.0 / self.diagonal.double()) - half.mT @ half

    def joint_output_covariance(self, jacobian: Jacobian) -> Tensor:
        """J P Jᵀ over the whole batch, (B·c, B·c), in float64."""
        cross = jacobian.matmul(self._scaled_factor()).flatten(0, 1)
        half = torch.linalg.solve_triangular(_inner_chol(self.gram), cross.mT, upper=False)
        return jacobian.gram(1.0 / self.diagonal.double()) - half.mT @ half

    def quadratic(self, vector: Tensor) -> Tensor:
        """vᵀ P⁻¹ v = vᵀDv + ‖Wᵀv‖², a scalar."""
        of_diagonal = parameter_sums.sum_over_shards((self.diagonal * vector.square()).sum())
        return of_diagonal + parameter_sums.sum_over_shards(vector @ self.factor).square().sum()

    def log_determinant(self) -> Tensor:
        """log det P = −log det D − log det(I + WᵀD⁻¹W), a scalar in float64."""
        chol = _inner_chol(self.gram)
        return -(
            parameter_sums.sum_over_shards(self.diagonal.double().log().sum())
            + 2.0 * chol.diagonal().double().log().sum()
        )

    def scales(self) -> Tensor:
        """d, (n,), which is positive and finite in a proper belief."""
        return self.diagonal

    def _condition(self, observation: Observation, curvature: Observation | None, truncation: Truncation) -> Self:
        gram = self._joint_gram(observation)
        step = self._step(observation, gram)
        if curvature is not None:  # another M for the precision
            observation, gram = curvature, self._joint_gram(curvature)
        rank = self.factor.shape[1]
        values, vectors = torch.linalg.eigh(gram)  # ascending
        factor, diagonal = truncation(
            self.diagonal,
            values.clamp_min(0.0),  # negative only by rounding
            vectors.to(step),
            rank,
            lambda some: self.factor @ some[:rank] + observation.rmatmul(some[rank:]),  # AᵀV
        )
        return self.from_precision(self.mean + step, diagonal, factor)

    def _joint_gram(self, observation: Observation) -> Tensor:
        """A D⁻¹ Aᵀ for A = [Wᵀ; M], (L + k, L + k)."""
        cross = observation.matmul(self._scaled_factor())  # MD⁻¹W (k, L)
        return torch.cat([
            torch.cat([self.gram, cross.mT], 1),
            torch.cat([cross, observation.gram(1.0 / self.diagonal.double())], 1),
        ])  # fmt: skip

    def _step(self, observation: Observation, gram: Tensor) -> Tensor:
        """Δ = D⁻¹Aᵀ(I + G)⁻¹[0; u], (n,), with one step of iterative refinement.

        If the rows of M lie in the span of W, the two parts of Aᵀw cancel, and the rest is rounding of the larger one.
        The residual [0; u] − w − AΔ shows the part of it that lies where the belief is precise.
        """
        rank, target = self.factor.shape[1], gram.new_zeros(len(gram))
        target[rank:] = observation.residual
        chol = _inner_chol(gram)
        w = torch.cholesky_solve(target.unsqueeze(-1), chol).squeeze(-1)
        step = self._scaled_pullback(observation, w)
        applied = torch.cat(
            [parameter_sums.sum_over_shards(self.factor.mT @ step), observation.matvec(step)]
        ).double()  # AΔ
        correction = torch.cholesky_solve((target - w - applied).unsqueeze(-1), chol).squeeze(-1)
        return step + self._scaled_pullback(observation, correction)

    def _scaled_pullback(self, observation: Observation, w: Tensor) -> Tensor:
        """D⁻¹Aᵀw, (n,)."""
        rank, weights = self.factor.shape[1], w.to(self.mean)
        return (self.factor @ weights[:rank] + observation.rmatvec(weights[rank:])) / self.diagonal

    def _scaled_factor(self) -> Tensor:
        """D⁻¹W in float64, (n, L)."""
        return self.factor.double() / self.diagonal.double().unsqueeze(-1)

    def _solve(self, right: Tensor) -> Tensor:
        """(D + WWᵀ)⁻¹ B, (n, c), by Woodbury's identity; in float64, since the difference cancels for B in span(W)."""
        scaled, factor = right.double() / self.diagonal.double().unsqueeze(-1), self._scaled_factor()
        weights = torch.cholesky_solve(
            parameter_sums.sum_over_shards(factor.mT @ right.double()), _inner_chol(self.gram)
        )
        return (scaled - factor @ weights).to(right)


def truncate(
    diagonal: Tensor, values: Tensor, vectors: Tensor, rank: int, columns: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The L leading columns of F V, and a diagonal that keeps the marginal variances of the untruncated precision.

    The columns of F V are orthogonal under D⁻¹. With e their squared lengths there, the leading ones leave parameter i
    the variance v = 1/d − Σ (F V)² / (d²(1 + e)), and the others lower it to v − q; d grows by 1/(v − q) − 1/v, as in
    the diagonal gain form.

    Args:
        diagonal: d, (n,).
        values: e, (K,), ascending.
        vectors: V, (K, K).
        rank: the number of columns, L.
        columns: from columns of V (K, c) to those of F V, (n, c).
    """
    rounding = len(values) * torch.finfo(diagonal.dtype).eps ** 2 * values[-1]  # squared length of a sum that cancels
    vectors = vectors * (values > rounding).to(vectors)
    factor, shrink = columns(vectors[:, -rank:]), (1.0 / (1.0 + values)).to(diagonal)
    scaled = (factor / diagonal.unsqueeze(-1)).square()
    least = diagonal + factor.square().sum(1)  # a bound of 1/v, if rounding wins
    variance = torch.maximum(1.0 / diagonal - scaled @ shrink[-rank:], 1.0 / least)
    lost, added = torch.zeros_like(diagonal), torch.zeros_like(diagonal)
    for some, weights in zip(vectors[:, :-rank].split(COLUMNS, 1), shrink[:-rank].split(COLUMNS), strict=True):
        squares = columns(some).square()
        lost += squares @ weights
        added += squares.sum(1)
    left = torch.maximum(variance - lost / diagonal.square(), 1.0 / (least + added))
    return factor, diagonal + (1.0 / left - 1.0 / variance).clamp_min(0.0)


def truncate_in_precision(
    diagonal: Tensor, values: Tensor, vectors: Tensor, rank: int, columns: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """As :func:`truncate`, but the diagonal of the truncated part is added to d."""
    added = diagonal.clone()
    for some in vectors[:, :-rank].split(COLUMNS, 1):
        added += columns(some).square().sum(1)
    return columns(vectors[:, -rank:]), added


def _inner_chol(gram: Tensor) -> Tensor:
    """Cholesky factor of I + WᵀD⁻¹W, (L, L)."""
    return torch.linalg.cholesky(gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
