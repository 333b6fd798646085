"""Beliefs with a full covariance inside each tensor or module and none between them: N(μ, diag(P₁, P₂, ...)).

All blocks share S = I + Σ_b M_b P_b M_bᵀ, so the mean is that of the whole model under this belief; each block keeps
its own block of the exact posterior covariance. An update costs Σ n_b² k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple, Self

import torch
from torch import Tensor

from bayes_kf.inference.covariance.diagonal import DiagonalGaussian
from bayes_kf.inference.covariance.full import add_to_inverse, merge_moments
from bayes_kf.inference.covariance.observation import Observation, solve_innovation
from bayes_kf.inference.linearization.jacobian import Jacobian
from bayes_kf.models.adapter import AdapterModel

MAX_NUMBERS = 400_000_000  # in all blocks; 1.6 GB in float32


def block_sizes(adapter: AdapterModel, blocks: str) -> list[int]:
    """Parameters of each block: one block per tensor, or per module or adapted layer.

    Args:
        adapter: the model; the tensors of a module are neighbours in it.
        blocks: "tensors" or "modules".
    """
    if blocks == "tensors":
        return list(adapter.sizes)
    owners = [name.partition(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0] for name in adapter.names]
    modules = groupby(zip(owners, adapter.sizes, strict=True), key=lambda item: item[0])
    return [sum(size for _, size in group) for _, group in modules]


class BlockDiagonalGaussian(NamedTuple):
    """A Gaussian: mean μ (n,), the blocks of P one after the other, (Σ n_b²,), and their sizes n_b, int64."""

    mean: Tensor
    covariance: Tensor
    sizes: Tensor

    @classmethod
    def from_variance(
        cls, mean: Tensor, variance: Tensor, *, rank: int = 10, block_sizes: Sequence[int] | None = None
    ) -> Self:
        """The belief N(mean, diag(variance)); both (n,). One block by default; there is no rank.

        Raises:
            ValueError: if the blocks would hold more than 400 million numbers.
        """
        sizes = [len(mean)] if block_sizes is None else list(block_sizes)
        numbers = sum(size**2 for size in sizes)
        if numbers > MAX_NUMBERS:
            raise ValueError(
                f"`covariance` 'block_diagonal' takes at most {MAX_NUMBERS:,} numbers in all blocks, got {numbers:,} "
                f"(largest block: {max(sizes):,} parameters); `blocks` 'tensors' or `covariance` 'low_rank' take fewer."
            )
        covariance = torch.cat([torch.diag(part).flatten() for part in variance.split(sizes)])
        return cls(mean, covariance, torch.tensor(sizes))

    def with_mean(self, mean: Tensor) -> Self:
        """The belief with another mean, (n,)."""
        return self._replace(mean=mean)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The place of each block in θ, and its covariance P_b, (n_b, n_b), a view."""
        start = offset = 0
        for size in self.sizes.tolist():
            yield slice(start, start + size), self.covariance[offset : offset + size**2].view(size, size)
            start, offset = start + size, offset + size**2

    def predict(self, forgetting: float, drift_variance: float | Tensor) -> Self:
        """μ⁻ = μ, P⁻ = P/λ + Q; Q = qI for a number q, diag(q) for (n,)."""
        after = self._replace(covariance=self.covariance / forgetting)
        for where, P in after.blocks():
            P.diagonal().add_(drift_variance[where] if isinstance(drift_variance, Tensor) else drift_variance)
        return after

    def condition(self, observation: Observation, curvature: Observation | None = None) -> Self:
        """μ + PMᵀS⁻¹u, and of each block P_b − P_bM_bᵀS⁻¹M_bP_b.

        In Joseph form (I − KM_b)P_b(I − KM_b)ᵀ + KRKᵀ, K = P_bM_bᵀS⁻¹, R = S − M_bP_bM_bᵀ: for one block, the other
        blocks are noise.
        """
        if curvature is not None:  # another M for the covariance
            return self.condition(curvature).with_mean(self.condition(observation).mean)
        M = observation.dense()
        crosses = [(where, P @ M[:, where].mT) for where, P in self.blocks()]  # P_bM_bᵀ (n_b, k)
        gram = sum(M[:, where].double() @ cross.double() for where, cross in crosses)
        S = solve_innovation(gram, observation.residual)  # type: ignore[arg-type]
        after = self._replace(mean=self.mean.clone(), covariance=torch.empty_like(self.covariance))
        for (where, cross), (_, old), (_, new) in zip(crosses, self.blocks(), after.blocks(), strict=True):
            own = M[:, where]
            K = torch.cholesky_solve(cross.mT.double(), S.chol).mT.to(cross)  # P_bM_bᵀS⁻¹ (n_b, k)
            R = S.chol @ S.chol.mT - own.double() @ cross.double()
            left = old - K @ cross.mT  # (I − KM_b)P_b
            joseph = left - (left @ own.mT) @ K.mT + K @ R.to(K) @ K.mT
            new.copy_(0.5 * (joseph + joseph.mT))
            after.mean[where] += cross @ S.weights
        return after

    def accumulate(self, observation: Observation, curvature: Observation | None = None) -> Self:
        """The mean of :meth:`condition`, and P_b⁻¹ + M_bᵀM_b, which does not depend on the prior."""
        M, after = (curvature or observation).dense(), self.condition(observation)
        for (where, old), (_, new) in zip(self.blocks(), after.blocks(), strict=True):
            own = M[:, where]
            cross = old @ own.mT
            S = solve_innovation(own.double() @ cross.double(), own.new_zeros(len(own)))
            K = torch.cholesky_solve(cross.mT.double(), S.chol).mT.to(cross)
            left = old - K @ cross.mT
            joseph = left - (left @ own.mT) @ K.mT + K @ K.mT
            new.copy_(0.5 * (joseph + joseph.mT))
        return after

    def add_precision(self, added: Tensor) -> Self:
        """The belief with precision P⁻¹ + diag(added) and the same mean; added (n,) may be negative."""
        after = self._replace(covariance=torch.empty_like(self.covariance))
        for (where, old), (_, new) in zip(self.blocks(), after.blocks(), strict=True):
            new.copy_(add_to_inverse(old, added[where]))
        return after

    def merge(self, others: Sequence[Self], prior: DiagonalGaussian) -> Self:
        """The product of this belief and K − 1 others from one prior, over the prior to the power K − 1, by block."""
        beliefs = [self, *others]
        after = self._replace(mean=prior.mean.clone(), covariance=torch.empty_like(self.covariance))
        together = zip(*[belief.blocks() for belief in beliefs], strict=True)
        for blocks, (where, new) in zip(together, after.blocks(), strict=True):
            means, covariances = [belief.mean[where] for belief in beliefs], [P for _, P in blocks]
            mean, covariance = merge_moments(means, covariances, prior.mean[where], prior.variance[where])
            after.mean[where] = mean
            new.copy_(covariance)
        return after

    def root(self) -> Callable[[Tensor], Tensor]:
        """The map z → Lz, LLᵀ = P; takes (..., n)."""
        chols = [torch.linalg.cholesky(P) for _, P in self.blocks()]
        sizes = self.sizes.tolist()

        def apply(noise: Tensor) -> Tensor:
            return torch.cat([z @ chol.mT for z, chol in zip(noise.split(sizes, -1), chols, strict=True)], -1)

        return apply

    def product(self, vector: Tensor) -> Tensor:
        """P v, (n,)."""
        return torch.cat([P @ vector[where] for where, P in self.blocks()])

    def marginal_variance(self) -> Tensor:
        """diag(P), (n,)."""
        return torch.cat([P.diagonal() for _, P in self.blocks()])

    def covariance_matrix(self) -> Tensor:
        """P, (n, n)."""
        return torch.block_diag(*[P for _, P in self.blocks()])

    def output_covariance(self, jacobian: Jacobian) -> Tensor:
        """J P Jᵀ = Σ_b J_b P_b J_bᵀ of every example, (B, c, c), in float64."""
        return self._sum_over_blocks(jacobian.dense())

    def joint_output_covariance(self, jacobian: Jacobian) -> Tensor:
        """J P Jᵀ over the whole batch, (B·c, B·c), in float64."""
        return self._sum_over_blocks(jacobian.dense().flatten(0, 1))

    def quadratic(self, vector: Tensor) -> Tensor:
        """vᵀ P⁻¹ v, a scalar."""
        terms = [vector[where] @ torch.linalg.solve(P, vector[where]) for where, P in self.blocks()]
        return torch.stack(terms).sum()

    def log_determinant(self) -> Tensor:
        """log det P, a scalar in float64."""
        return torch.stack([torch.linalg.slogdet(P.double()).logabsdet for _, P in self.blocks()]).sum()

    def scales(self) -> Tensor:
        """diag(P), (n,), which is positive and finite in a proper belief."""
        return self.marginal_variance()

    def _sum_over_blocks(self, J: Tensor) -> Tensor:
        """Σ_b J_b P_b J_bᵀ, (..., c, c), for J (..., c, n)."""
        return torch.stack([(J[..., where] @ P @ J[..., where].mT).double() for where, P in self.blocks()]).sum(0)
