"""Sophia-G: steps clipped by a diagonal curvature from drawn labels. Liu et al. 2023 (arXiv:2305.14342).

The code is our own: pytorch-optimizer has only Hutchinson's estimate, and the authors publish no package.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayes_kf.inference.baselines.kronecker_factors import statistics_dtype
from bayes_kf.inference.baselines.seeded_optimizer import (
    SeededOptimizer,
    check_betas,
    check_finite,
    check_outputs,
)
from bayes_kf.validation import check_not_negative, check_positive, check_whole

TINY = 1e-15  # added to ρh, as in the authors' code


class SophiaG(SeededOptimizer):
    """Gradient descent with momentum, whose steps are divided by a diagonal curvature and clipped.

    With g the gradient of the mean loss over a batch of B examples, and ĝ the same for labels drawn from the model,

        m ← β₁ m + (1 − β₁) g
        h ← β₂ h + (1 − β₂) B ĝ∘ĝ        (every ``refresh`` updates; the Gauss-Newton-Bartlett estimate)
        θ ← θ − lr · clip(m / (ρ h), −1, 1)

    There is no bias correction, as in the authors' code. Where h is zero, a step has length lr. The authors' code
    averages ĝ∘ĝ and multiplies by a constant B in the step; for batches of equal size the result is the same.

    Args:
        model: its trainable tensors are optimized.
        lr: the longest step, > 0.
        betas: β₁ and β₂, each in [0, 1).
        rho: ρ > 0, the curvature scale of the clipping.
        refresh: updates between two estimates of the curvature, >= 1.
        weight_decay: decoupled, >= 0.
        seed: seed of the drawn labels.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> optimizer = SophiaG(model, lr=0.1)
        >>> outputs = model(torch.eye(3))
        >>> loss = F.cross_entropy(outputs, torch.tensor([0, 1, 0]))
        >>> optimizer.zero_grad(); optimizer.backward(loss, outputs); optimizer.step()
        >>> bool(F.cross_entropy(model(torch.eye(3)), torch.tensor([0, 1, 0])) < loss)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        refresh: int = 10,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        check_positive("lr", lr)
        check_positive("rho", rho)
        check_betas(betas)
        check_whole("refresh", refresh)
        check_not_negative("weight_decay", weight_decay)
        super().__init__(model, {"lr": lr, "betas": betas, "rho": rho, "weight_decay": weight_decay}, seed)
        self.refresh = refresh
        self._curvatures: dict[Tensor, Tensor] = {}

    def backward(self, loss: Tensor, outputs: Tensor) -> None:
        """Compute the gradients of the loss, and every ``refresh`` updates the curvature. Replaces ``loss.backward()``.

        Args:
            loss: mean over the batch, a scalar.
            outputs: logits of the batch, (B, m).

        Raises:
            ValueError: if the outputs are not a batch of logits.
            FloatingPointError: if the outputs are not finite.
        """
        self._check_open()
        check_outputs(outputs)
        if self._updates % self.refresh == 0:
            self._curvatures = self._curvature(outputs)
        loss.backward()
        self._ready = True

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move the parameters.

        Raises:
            RuntimeError: if :meth:`backward` did not run since the last step.
            FloatingPointError: if a gradient is not finite; the parameters do not change.
        """
        self._check_step(closure)
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        check_finite("gradients", [*gradients, *self._curvatures.values()])
        self._ready = False
        self._average()
        self._updates += 1
        for group in self.param_groups:
            beta1 = group["betas"][0]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, g = self.state[parameter], parameter.grad.to(statistics_dtype(parameter))
                m = state.get("mean", torch.zeros_like(g))
                state["mean"] = m = beta1 * m + (1.0 - beta1) * g
                h = state.get("curvature", torch.zeros_like(g))
                direction = (m / (group["rho"] * h + TINY)).clamp(-1.0, 1.0)
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                parameter.sub_((group["lr"] * direction).to(parameter.dtype))

    def _curvature(self, outputs: Tensor) -> dict[Tensor, Tensor]:
        """The estimate B ĝ∘ĝ of the diagonal of the curvature, by parameter."""
        loss = F.cross_entropy(outputs, self._draw_labels(outputs))
        gradients = torch.autograd.grad(loss, self._parameters(), retain_graph=True, allow_unused=True)
        return {
            parameter: len(outputs) * gradient.to(statistics_dtype(parameter)).square()
            for parameter, gradient in zip(self._parameters(), gradients, strict=True)
            if gradient is not None
        }

    def _average(self) -> None:
        """h ← β₂ h + (1 − β₂) B ĝ∘ĝ for every parameter with a new estimate."""
        for group in self.param_groups:
            beta2 = group["betas"][1]
            for parameter in group["params"]:
                if parameter in self._curvatures:
                    estimate, state = self._curvatures[parameter], self.state[parameter]
                    h = state.get("curvature", torch.zeros_like(estimate))
                    state["curvature"] = beta2 * h + (1.0 - beta2) * estimate
        self._curvatures = {}
