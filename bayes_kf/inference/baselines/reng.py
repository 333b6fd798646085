"""RENG: gradient-regularized natural gradients by double backward. Ours, in the spirit of an abstract.

The gradient of L + (ρ/2)‖∇L‖² is g + ρHg, H the Hessian; it takes a second backward pass through the first. K-FAC then
preconditions it.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bayes_kf.inference.baselines.kfac import KFAC
from bayes_kf.inference.baselines.seeded import check_not_negative


class RENG(KFAC):
    """K-FAC on the gradient g + ρHg of the penalized loss L + (ρ/2)‖∇L‖².

    Fused attention kernels have no second derivative: run the model in ``with optimizer.forward():``, which takes the
    plain ones. With ρ = 0 nothing is differentiated twice, and it is K-FAC, bit for bit.

    Args:
        model: as :class:`KFAC`'s, like all the rest.
        lr: step size, > 0.
        penalty: ρ >= 0.
        **options: of :class:`KFAC`.

    Example:
        >>> optimizer = RENG(nn.Linear(2, 2), lr=0.1, penalty=0.1)
        >>> with optimizer.forward():
        ...     pass  # outputs and loss
    """

    def __init__(self, model: nn.Module, lr: float = 1e-2, *, penalty: float = 1e-2, **options: Any) -> None:
        check_not_negative(penalty=penalty)
        super().__init__(model, lr, **options)
        self.penalty = penalty

    def forward(self) -> AbstractContextManager[Any]:
        """Where forward passes are run that are differentiated twice."""
        return sdpa_kernel(SDPBackend.MATH)

    def _gradients(self, loss: Tensor) -> Iterable[Tensor | None]:
        if self.penalty == 0:
            return super()._gradients(loss)
        parameters = self._parameters()
        first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        half = 0.5 * torch.stack([g.square().sum() for g in first if g is not None]).sum()
        try:
            second = torch.autograd.grad(half, parameters, allow_unused=True)
        except RuntimeError as error:
            error.add_note("run the model in `with optimizer.forward():`, whose kernels can be differentiated twice")
            raise
        return [
            None if g is None else g.detach() + (0.0 if h is None else self.penalty * h)
            for g, h in zip(first, second, strict=True)
        ]
