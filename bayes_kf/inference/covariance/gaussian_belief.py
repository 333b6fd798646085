"""The interface of a Gaussian belief N(μ, P) over the n parameters, whatever structure P has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

from torch import Tensor

from bayes_kf.inference.covariance.diagonal import DiagonalGaussian
from bayes_kf.inference.covariance.observation import Observation
from bayes_kf.inference.linearization.jacobian import Jacobian


class GaussianBelief(Protocol):
    """A Gaussian N(μ, P) over θ, stored as a NamedTuple of tensors; no method changes it.

    Each covariance structure is one class with these methods. A subclass of an existing structure overrides only what
    differs. The names of the tensors are the keys of the state's file.
    """

    @property
    def mean(self) -> Tensor:
        """μ, (n,)."""
        ...

    @classmethod
    def from_variance(
        cls, mean: Tensor, variance: Tensor, *, rank: int = 10, block_sizes: Sequence[int] | None = None
    ) -> Self:
        """The belief N(mean, diag(variance)).

        Args:
            mean: μ, (n,).
            variance: p, (n,).
            rank: L, columns of a low-rank factor; structures without one ignore it.
            block_sizes: sizes n_b of diagonal blocks, whose sum is n; one block by default. Structures without blocks
                ignore them.

        Raises:
            ValueError: if the structure cannot store a covariance of this size.
        """
        ...

    def with_mean(self, mean: Tensor) -> Self:
        """The belief with another mean, (n,), and the same covariance."""
        ...

    def predict(self, forgetting: float, drift_variance: float | Tensor) -> Self:
        """The prediction step μ⁻ = μ, P⁻ = P/λ + Q; Q = qI for a number q, diag(q) for (n,)."""
        ...

    def condition(self, observation: Observation, curvature: Observation | None = None) -> Self:
        """The measurement update: the belief given u = M(θ − μ) + ε, in the form of this structure.

        Args:
            observation: M and u.
            curvature: another M, from which the covariance is updated instead.
        """
        ...

    def accumulate(self, observation: Observation, curvature: Observation | None = None) -> Self:
        """As :meth:`condition`, but the precision that data add does not depend on the prior.

        The filter calls it when the mean is held, since the prior variance or σ² may be chosen afterwards.
        """
        ...

    def add_precision(self, added: Tensor) -> Self:
        """The belief with precision P⁻¹ + diag(added) and the same mean; added (n,) may be negative."""
        ...

    def merge(self, others: Sequence[Self], prior: DiagonalGaussian) -> Self:
        """The product of this belief and K − 1 others from the same prior, divided by the prior to the power K − 1."""
        ...

    def root(self) -> Callable[[Tensor], Tensor]:
        """A map z → Lz with LLᵀ = P, so that Lz has covariance P for z ~ N(0, I); takes (..., n)."""
        ...

    def product(self, vector: Tensor) -> Tensor:
        """P v, (n,)."""
        ...

    def marginal_variance(self) -> Tensor:
        """diag(P), (n,)."""
        ...

    def covariance_matrix(self) -> Tensor:
        """P, (n, n)."""
        ...

    def output_covariance(self, jacobian: Jacobian) -> Tensor:
        """J P Jᵀ of every example, (B, c, c), in float64."""
        ...

    def joint_output_covariance(self, jacobian: Jacobian) -> Tensor:
        """J P Jᵀ over the whole batch, (B·c, B·c), in float64."""
        ...

    def quadratic(self, vector: Tensor) -> Tensor:
        """vᵀ P⁻¹ v, a scalar."""
        ...

    def log_determinant(self) -> Tensor:
        """log det P, a scalar in float64."""
        ...

    def scales(self) -> Tensor:
        """Numbers, (n,), that are all positive and finite if P is positive definite."""
        ...

    def _asdict(self) -> dict[str, Any]:
        """The tensors by name."""
        ...
