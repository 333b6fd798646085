"""RING: natural gradients regularized through the damping. Ours, after the idea of an abstract.

We know only the abstract of "Gradient Regularized Natural Gradients", not its algorithms. The penalty (ρ/2)‖∇L‖²
shortens a step where the gradient is large. RING does this without a second backward pass: the damping of K-FAC grows
with the gradient.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from bayes_kf.inference.baselines.kfac import KFAC
from bayes_kf.validation import check_not_negative


class RING(KFAC):
    """K-FAC with damping λ_t = λ₀ + ρ‖g_t‖², with g_t the gradient of the mean loss over all trained tensors.

    The damping changes at every step by d. Between two inversions, X − dX² corrects an inverse X if its error bound is
    below one per cent; otherwise the inverse is computed again. With ρ = 0 the steps equal those of K-FAC bit for bit.

    Args:
        model: its trainable tensors are optimized.
        lr: step size, > 0.
        penalty: ρ >= 0.
        **options: other arguments of :class:`KFAC`.

    Example:
        >>> RING(nn.Linear(2, 2), lr=0.1, penalty=0.1).penalty
        0.1
    """

    def __init__(self, model: nn.Module, lr: float = 1e-2, *, penalty: float = 1e-2, **options: Any) -> None:
        check_not_negative("penalty", penalty)
        super().__init__(model, lr, **options)
        self.penalty = penalty

    def _damping(self, squared_norm: float) -> float:
        return self.damping + self.penalty * squared_norm
