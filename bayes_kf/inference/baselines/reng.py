"""RENG: natural gradients of a gradient-penalized loss by double backward. Ours, after the idea of an abstract.

The gradient of L + (ρ/2)‖∇L‖² is g + ρHg, with H the Hessian. It needs a second backward pass through the first. K-FAC
then preconditions it.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bayes_kf.inference.baselines.kfac import KFAC
from bayes_kf.validation import check_not_negative


class RENG(KFAC):
    """K-FAC on the gradient g + ρHg of the penalized loss L + (ρ/2)‖∇L‖².

    Fused attention kernels have no second derivative, so calls of the model use the math kernel while gradients are
    recorded. If you call parts of the model directly, do so inside ``with optimizer.forward():``. With ρ = 0 there is
    no second backward pass and no change of kernels, and the steps equal those of K-FAC bit for bit.

    Args:
        model: its trainable tensors are optimized.
        lr: step size, > 0.
        penalty: ρ >= 0.
        **options: other arguments of :class:`KFAC`.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> optimizer = RENG(model, lr=0.1, penalty=0.1)
        >>> outputs = model(torch.eye(3))
        >>> loss = nn.functional.cross_entropy(outputs, torch.tensor([0, 1, 0]))
        >>> optimizer.zero_grad(); optimizer.backward(loss, outputs); optimizer.step()
        >>> bool(nn.functional.cross_entropy(model(torch.eye(3)), torch.tensor([0, 1, 0])) < loss)
        True
    """

    def __init__(self, model: nn.Module, lr: float = 1e-2, *, penalty: float = 1e-2, **options: Any) -> None:
        check_not_negative("penalty", penalty)
        super().__init__(model, lr, **options)
        self.penalty = penalty
        if penalty > 0:
            attention = _PlainAttention()
            self._handles.append(model.register_forward_pre_hook(attention.enter))
            self._handles.append(model.register_forward_hook(attention.leave, always_call=True))

    def forward(self) -> AbstractContextManager[Any]:
        """A context for direct calls of parts of the model, whose outputs can then be differentiated twice."""
        return sdpa_kernel(SDPBackend.MATH) if self.penalty > 0 else nullcontext()

    def _gradients(self, loss: Tensor) -> Iterable[Tensor | None]:
        if self.penalty == 0:
            return super()._gradients(loss)
        parameters = self._parameters()
        first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        half = 0.5 * torch.stack([g.square().sum() for g in first if g is not None]).sum()
        try:
            second = torch.autograd.grad(half, parameters, allow_unused=True)
        except RuntimeError as error:
            error.add_note("call parts of the model directly only inside `with optimizer.forward():`")
            raise
        return [
            None if g is None else g.detach() + (0.0 if h is None else self.penalty * h)
            for g, h in zip(first, second, strict=True)
        ]


class _PlainAttention:
    """Hooks around the forward pass of a model that select an attention kernel with second derivatives."""

    def __init__(self) -> None:
        self._entered: list[AbstractContextManager[Any]] = []  # calls may be nested

    def enter(self, *_: object) -> None:
        """Before a forward pass."""
        context = sdpa_kernel(SDPBackend.MATH) if torch.is_grad_enabled() else nullcontext()
        context.__enter__()
        self._entered.append(context)

    def leave(self, *_: object) -> None:
        """After a forward pass, also one that raised."""
        if self._entered:
            self._entered.pop().__exit__(None, None, None)
