"""What all likelihoods in their canonical link have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class CanonicalLikelihood(ABC):
    """An exponential family in its canonical link: log p(y | η) is concave in η, and its gradient is y − h(η)."""

    @abstractmethod
    def mean(self, outputs: Tensor) -> Tensor:
        """π = h(η), (..., m)."""

    @abstractmethod
    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """e = y − π, (B, m)."""

    @abstractmethod
    def variance(self, outputs: Tensor) -> Tensor:
        """V = ∂π/∂η, (B, m, m)."""

    @abstractmethod
    def whiten(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """W (B, r, m) and u (B, r) with WᵀW = V and Wᵀu = e."""

    def divergence(self, outputs: Tensor, others: Tensor) -> Tensor:
        """Symmetric Kullback-Leibler divergence Σ (h(η) − h(η'))(η − η') of two predictions, (B,), in nats."""
        return ((self.mean(outputs) - self.mean(others)) * (outputs - others)).sum(-1)

    def output_unit(self, outputs: Tensor) -> Tensor:
        """The change of each output that counts as large: 1, of logits and log rates; broadcasts with (B, m)."""
        return outputs.new_ones(())
