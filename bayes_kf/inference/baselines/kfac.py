"""K-FAC: natural gradient descent with Kronecker-factored layers. Martens and Grosse 2015.

The code is our own: curvlinops computes the curvature of a fixed data set, not a moving average; kfac-pytorch does not
balance the damping; and RING and RENG change the damping and the gradient inside a step. The tests compare the factors
with curvlinops and the steps with dense float64 solves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayes_kf.inference.baselines.kronecker_factors import Layer, kronecker_layers, statistics_dtype
from bayes_kf.inference.baselines.newton_inverse import newton_inverse, shift_error, shifted
from bayes_kf.inference.baselines.seeded_optimizer import (
    SeededOptimizer,
    check_finite,
    check_outputs,
)
from bayes_kf.validation import check_not_negative, check_one_of, check_positive, check_share, check_whole

INVERSES = ("cholesky", "newton", "eigen")
MAX_SHIFT_ERROR = 0.01  # largest relative error of a corrected inverse; beyond it the inverse is computed again


class KFAC(SeededOptimizer):
    """Natural gradient descent with Kronecker factors A and G of the Fisher information of every Linear and Conv2d.

    With V the gradient of the loss in the weight and bias of a layer and λ the damping,

        D = (G + (√λ/π) I)⁻¹ V (A + π√λ I)⁻¹,    π² = (tr A / dim A) / (tr G / dim G)
        W ← W − lr · ν · D,                      ν = min(1, √(κ / (lr² Σ D·V)))

    π balances the damping of the factors, and ν keeps the KL divergence of a step near κ = ``kl_clip``. A and G are
    moving averages over batches, with labels drawn from the model. Other trained tensors (norms, embeddings, the
    magnitudes of DoRA) have D = V / (h + λ), with h the moving average of B ĝ∘ĝ, the diagonal estimate of Sophia-G.
    Gradients accumulate over calls of ``backward`` before a step; the curvature is that of the last call.

    Args:
        model: its trainable tensors are optimized; hooks record its Linear and Conv2d layers.
        lr: step size, > 0.
        damping: λ > 0, added to the Fisher information of the mean loss.
        decay: decay of the moving averages, in [0, 1).
        kl_clip: κ > 0, or None for full steps.
        momentum: momentum of the directions, in [0, 1).
        weight_decay: decoupled weight decay, >= 0.
        refresh: updates between two inversions, >= 1.
        inverse: "cholesky"; "newton", which needs matrix products only; "eigen", which inverts G ⊗ A + λI exactly.
        seed: seed of the drawn labels.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> optimizer = KFAC(model, lr=0.1)
        >>> outputs = model(torch.eye(3))
        >>> loss = F.cross_entropy(outputs, torch.tensor([0, 1, 0]))
        >>> optimizer.zero_grad(); optimizer.backward(loss, outputs); optimizer.step()
        >>> bool(F.cross_entropy(model(torch.eye(3)), torch.tensor([0, 1, 0])) < loss)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        *,
        damping: float = 1e-3,
        decay: float = 0.95,
        kl_clip: float | None = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        refresh: int = 10,
        inverse: str = "cholesky",
        seed: int = 0,
    ) -> None:
        check_positive("lr", lr)
        check_positive("damping", damping)
        if kl_clip is not None:
            check_positive("kl_clip", kl_clip)
        check_share("decay", decay)
        check_share("momentum", momentum)
        check_not_negative("weight_decay", weight_decay)
        check_whole("refresh", refresh)
        check_one_of("inverse", inverse, INVERSES)
        super().__init__(model, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, seed)
        self.damping, self.decay, self.kl_clip = damping, decay, kl_clip
        self.refresh, self.inverse = refresh, inverse
        self._layers = kronecker_layers(model)
        self._handles.extend(layer.handle for layer in self._layers)
        self._new_statistics: dict[tuple[Tensor, str], Tensor] = {}

    def backward(self, loss: Tensor, outputs: Tensor) -> None:
        """Compute the gradients of the loss, and the curvature from drawn labels. Replaces ``loss.backward()``.

        Args:
            loss: mean over the batch, a scalar.
            outputs: logits of the batch, (B, m).

        Raises:
            ValueError: if the outputs are not a batch of logits.
            FloatingPointError: if the outputs are not finite.
        """
        self._check_open()
        check_outputs(outputs)
        self._new_statistics = self._curvature(outputs)
        for parameter, gradient in zip(self._parameters(), self._gradients(loss), strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self._ready = True

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move the parameters.

        Raises:
            RuntimeError: if :meth:`backward` did not run since the last step.
            FloatingPointError: if a gradient is not finite; the parameters do not change.
        """
        self._check_step(closure)
        squared_norms = [float(p.grad.double().square().sum()) for p in self._parameters() if p.grad is not None]
        check_finite("gradients", [torch.tensor(sum(squared_norms))])
        check_finite("curvature's factors", self._new_statistics.values())
        for (parameter, name), new in self._new_statistics.items():
            state = self.state[parameter]
            state[name] = torch.lerp(new, state[name], self.decay) if name in state else new
        self._new_statistics = {}
        directions = self._directions(self._damping(sum(squared_norms)))
        self._ready = False
        self._updates += 1
        scale = self._step_scale(directions)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in directions:
                    self._move(parameter, directions[parameter] * scale, group)

    def _damping(self, squared_norm: float) -> float:
        """λ of this step, given ‖g‖²."""
        return self.damping

    def _gradients(self, loss: Tensor) -> Iterable[Tensor | None]:
        """The gradient to precondition, by parameter; frees the graph."""
        return torch.autograd.grad(loss, self._parameters(), allow_unused=True)

    def _curvature(self, outputs: Tensor) -> dict[tuple[Tensor, str], Tensor]:
        """A, G and B ĝ∘ĝ of this batch by parameter and name, with labels drawn from the model."""
        statistics: dict[tuple[Tensor, str], Tensor] = {}
        loss = F.cross_entropy(outputs, self._draw_labels(outputs), reduction="sum")
        for layer in self._layers:
            layer.clear()
            layer.recording = True
        gradients = torch.autograd.grad(loss, self._parameters(), retain_graph=True, allow_unused=True)
        layer_tensors = set()
        for layer in self._layers:
            factors = layer.factors(len(outputs))
            layer.clear()
            if factors is not None:
                layer_tensors |= {layer.weight, layer.bias}
                statistics[layer.weight, "output_factor"] = factors[0]
                statistics[layer.weight, "input_factor"] = factors[1]
        for parameter, gradient in zip(self._parameters(), gradients, strict=True):
            if gradient is not None and parameter not in layer_tensors:
                statistics[parameter, "diagonal"] = gradient.to(statistics_dtype(parameter)).square() / len(outputs)
        return statistics

    def _directions(self, damping: float) -> dict[Tensor, Tensor]:
        """The preconditioned gradient D of every parameter that has a gradient."""
        directions: dict[Tensor, Tensor] = {}
        for layer in self._layers:
            weight, bias = layer.weight, layer.bias
            if weight.grad is None or "input_factor" not in self.state[weight]:
                continue
            dtype = statistics_dtype(weight)
            gradient = layer.join(weight.grad.to(dtype), None if bias is None else _gradient(bias).to(dtype))
            weight_direction, bias_direction = layer.split(self._precondition(layer, gradient, damping))
            directions[weight] = weight_direction
            if bias is not None and bias_direction is not None:
                directions[bias] = bias_direction
        for parameter in self._parameters():
            if parameter.grad is not None and parameter not in directions:
                diagonal = self.state[parameter].get("diagonal")
                scale = damping if diagonal is None else diagonal + damping
                directions[parameter] = parameter.grad.to(statistics_dtype(parameter)) / scale
        return directions

    def _precondition(self, layer: Layer, gradient: Tensor, damping: float) -> Tensor:
        """D of a layer.

        The inverses are computed every ``refresh`` updates, and whenever their correction is not accurate enough.
        """
        state = self.state[layer.weight]
        if self._updates % self.refresh == 0 or "output_inverse" not in state:
            self._invert(state, damping)
        if self.inverse == "eigen":
            left, right = state["output_inverse"], state["input_inverse"]
            values = torch.outer(state["output_values"], state["input_values"]) + damping
            return left @ ((left.mT @ gradient @ right) / values) @ right.mT
        shift = math.sqrt(damping) - state["root_damping"]
        if shift == 0.0:
            return state["output_inverse"] @ gradient @ state["input_inverse"]
        output_shift, input_shift = shift / state["balance"], shift * state["balance"]
        errors = (shift_error(state["output_inverse"], output_shift), shift_error(state["input_inverse"], input_shift))
        if max(errors) > MAX_SHIFT_ERROR:
            self._invert(state, damping)
            return state["output_inverse"] @ gradient @ state["input_inverse"]
        return shifted(state["output_inverse"], output_shift) @ gradient @ shifted(state["input_inverse"], input_shift)

    def _invert(self, state: dict[str, Any], damping: float) -> None:
        """Compute the inverses, or eigenvectors and eigenvalues, of G and A in float64."""
        G, A = state["output_factor"].double(), state["input_factor"].double()
        if self.inverse == "eigen":
            for name, factor in (("output", G), ("input", A)):
                values, vectors = torch.linalg.eigh(factor)
                state[f"{name}_values"] = values.clamp_min(0.0).to(state["input_factor"])
                state[f"{name}_inverse"] = vectors.to(state["input_factor"])
            return
        means = [float(factor.diagonal().mean()) for factor in (A, G)]
        balance = math.sqrt(means[0] / means[1]) if min(means) > 0 else 1.0  # π
        root = math.sqrt(damping)
        for name, factor, added in (("output", G, root / balance), ("input", A, root * balance)):
            damped = factor + added * torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
            if self.inverse == "newton":
                inverse = newton_inverse(damped).matrix
            else:
                inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
            state[f"{name}_inverse"] = inverse.to(state["input_factor"])
        state["root_damping"], state["balance"] = root, balance

    def _step_scale(self, directions: Mapping[Tensor, Tensor]) -> float:
        """ν, which bounds the KL divergence of the step."""
        if self.kl_clip is None:
            return 1.0
        divergence = 0.0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in directions:
                    product = (directions[parameter].double() * _gradient(parameter).double()).sum()
                    divergence += group["lr"] ** 2 * float(product)
        return min(1.0, math.sqrt(self.kl_clip / divergence)) if divergence > 0 else 1.0

    def _move(self, parameter: Tensor, direction: Tensor, group: Mapping[str, Any]) -> None:
        if group["momentum"] > 0:
            state = self.state[parameter]
            direction = direction + group["momentum"] * state["momentum"] if "momentum" in state else direction
            state["momentum"] = direction
        parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
        parameter.sub_((group["lr"] * direction).to(parameter.dtype))


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
