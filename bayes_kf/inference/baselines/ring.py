"""RING: gradient-regularized natural gradients by damping alone. Ours, in the spirit of an abstract.

"Gradient Regularized Natural Gradients" is known to us by its abstract; its algorithms are not. Penalizing (ρ/2)‖∇L‖²
makes a step shorter where the gradient is large. Here that is done inside the Kronecker-factored solve, without a
second backward pass: the damping grows with the gradient.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from bayes_kf.inference.baselines.kfac import KFAC
from bayes_kf.validation import check_not_negative


class RING(KFAC):
    """K-FAC with damping λ_t = λ₀ + ρ‖g_t‖², g the gradient of the mean loss over all trained tensors.

    The damping moves at every step; between two inversions the inverses follow it by X − dX² where that is good to one
    per cent, and are computed anew elsewhere. With ρ = 0 it is K-FAC, bit for bit.

    Args:
        model: as :class:`KFAC`'s, like all the rest.
        lr: step size, > 0.
        penalty: ρ >= 0.
        **options: of :class:`KFAC`.

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
