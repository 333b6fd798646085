"""Sophia-G: steps clipped by a diagonal curvature from drawn labels. Liu et al. 2023 (arXiv:2305.14342).

Own code: pytorch-optimizer has Sophia with Hutchinson's estimate alone, and the authors' release is no package.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayes_kf.inference.baselines.kronecker_factors import precision
from bayes_kf.inference.baselines.seeded_optimizer import (
    SeededOptimizer,
    check_betas,
    check_finite,
    check_outputs,
)
from bayes_kf.validation import check_not_negative, check_positive, check_whole

TINY = 1e-15  # added to ρh, as in the release


class SophiaG(SeededOptimizer):
    """θ ← θ − lr·sign(m)·min(|m|/(ρh), 1), m and h moving averages of the gradient and of the curvature's diagonal.

    The curvature is the Gauss-Newton-Bartlett estimate B ĝ∘ĝ, ĝ the gradient of the mean loss on labels drawn from the
    model, taken every ``refresh`` updates. The authors' release keeps ĝ∘ĝ and multiplies by a constant B in the step;
    with batches of one size that is the same. No bias is corrected, as there; where h is zero a step is lr.

    Args:
        model: its trainable tensors are optimized.
        lr: the longest step, > 0.
        betas: of m and h, each in [0, 1).
        rho: ρ > 0.
        refresh: updates between two estimates of the curvature, >= 1.
        weight_decay: decoupled, >= 0.
        seed: of the drawn labels.

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
        self._drawn: dict[Tensor, Tensor] = {}

    def backward(self, loss: Tensor, outputs: Tensor) -> None:
        """Instead of ``loss.backward()``: every ``refresh`` updates the curvature too.

        Args:
            loss: mean over the batch, a scalar.
            outputs: logits that it came from, (B, m).

        Raises:
            ValueError: for outputs that are not a batch of logits.
            FloatingPointError: for outputs that are not finite.
        """
        self._check_open()
        check_outputs(outputs)
        if self._updates % self.refresh == 0:
            self._drawn = self._curvature(outputs)
        loss.backward()
        self._ready = True

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move the parameters.

        Raises:
            RuntimeError: without a :meth:`backward` since the last step.
            FloatingPointError: for gradients that are not finite; the parameters are as they were.
        """
        self._check_step(closure)
        found = [p.grad for p in self._parameters() if p.grad is not None]
        check_finite("gradients", [*found, *self._drawn.values()])
        self._ready = False
        self._average()
        self._updates += 1
        for group in self.param_groups:
            decay = group["betas"][0]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, gradient = self.state[parameter], parameter.grad.to(precision(parameter))
                before = state.get("mean", torch.zeros_like(gradient))
                state["mean"] = mean = decay * before + (1.0 - decay) * gradient
                curvature = state.get("curvature", torch.zeros_like(gradient))
                share = (mean / (group["rho"] * curvature + TINY)).clamp(-1.0, 1.0)
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                parameter.sub_((group["lr"] * share).to(parameter.dtype))

    def _curvature(self, outputs: Tensor) -> dict[Tensor, Tensor]:
        """The estimated diagonal of the curvature, B ĝ∘ĝ, of every parameter."""
        drawn = F.cross_entropy(outputs, self._drawn_labels(outputs))
        gradients = torch.autograd.grad(drawn, self._parameters(), retain_graph=True, allow_unused=True)
        return {
            parameter: len(outputs) * gradient.to(precision(parameter)).square()
            for parameter, gradient in zip(self._parameters(), gradients, strict=True)
            if gradient is not None
        }

    def _average(self) -> None:
        """Take what was drawn into the moving average."""
        for group in self.param_groups:
            decay = group["betas"][1]
            for parameter in group["params"]:
                if parameter in self._drawn:
                    estimate, state = self._drawn[parameter], self.state[parameter]
                    before = state.get("curvature", torch.zeros_like(estimate))
                    state["curvature"] = decay * before + (1.0 - decay) * estimate
        self._drawn = {}
