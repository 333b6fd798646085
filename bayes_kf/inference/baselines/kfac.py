"""K-FAC: natural gradient descent with Kronecker-factored layers. Martens and Grosse 2015.

Own code: curvlinops (MIT, active) has the curvature of a fixed data set, not a moving average, kfac-pytorch (MIT) no
balance of the damping, and RING and RENG need to get inside damping and gradient. Factors are tested against
curvlinops', steps against dense float64 solves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayes_kf.inference.baselines.kronecker_factors import Layer, layers, precision
from bayes_kf.inference.baselines.newton_inverse import newton_inverse, shift_error, shifted
from bayes_kf.inference.baselines.seeded_optimizer import (
    SeededOptimizer,
    check_finite,
    check_outputs,
)
from bayes_kf.validation import check_not_negative, check_one_of, check_positive, check_share, check_whole

INVERSES = ("cholesky", "newton", "eigen")
LAZY = 0.01  # relative error of an inverse that is corrected instead of computed again


class KFAC(SeededOptimizer):
    """θ ← θ − lr·ν·D with D = (Γ + s/π̂ I)⁻¹ G (Λ + sπ̂ I)⁻¹ for the gradient G of every Linear and Conv2d.

    s² is the damping, and π̂² = (tr Λ/dim Λ)/(tr Γ/dim Γ) balances that of both factors. ν = min(1, √(κ/(lr² ΣD·G)))
    keeps the KL divergence of a step near κ = ``kl_clip``. Factors are moving averages, from labels the model draws.
    Trained tensors of other kinds (norms, embeddings, DoRA's magnitudes) are divided by the diagonal h + damping, h the
    moving average of the squared gradient on the drawn labels, times the batch size (the estimate of Sophia-G).
    Gradients add up over calls of ``backward`` before a step; the curvature is that of the last one.

    Args:
        model: its trainable tensors are optimized, its Linear and Conv2d layers watched by hooks.
        lr: step size, > 0.
        damping: λ > 0, on the Fisher information of the mean loss.
        decay: of the moving averages, in [0, 1).
        kl_clip: κ > 0, or None for full steps.
        momentum: of the directions, in [0, 1).
        weight_decay: decoupled, >= 0.
        refresh: updates between two inversions, >= 1.
        inverse: "cholesky"; "newton", by products of matrices alone; "eigen", which inverts Γ ⊗ Λ + λI itself.
        seed: of the drawn labels.

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
        self._layers = layers(model)
        self._handles.extend(layer.handle for layer in self._layers)
        self._drawn: dict[tuple[Tensor, str], Tensor] = {}

    def backward(self, loss: Tensor, outputs: Tensor) -> None:
        """Instead of ``loss.backward()``: gradients of the loss, and the curvature from labels drawn from the outputs.

        Args:
            loss: mean over the batch, a scalar.
            outputs: logits that it came from, (B, m).

        Raises:
            ValueError: for outputs that are not a batch of logits.
            FloatingPointError: for outputs that are not finite.
        """
        self._check_open()
        check_outputs(outputs)
        self._drawn = self._curvature(outputs)
        for parameter, gradient in zip(self._parameters(), self._gradients(loss), strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self._ready = True

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move the parameters.

        Raises:
            RuntimeError: without a :meth:`backward` since the last step.
            FloatingPointError: for gradients that are not finite; nothing is changed.
        """
        self._check_step(closure)
        norms = [float(p.grad.double().square().sum()) for p in self._parameters() if p.grad is not None]
        check_finite("gradients", [torch.tensor(sum(norms))])
        check_finite("curvature's factors", self._drawn.values())
        for (parameter, name), new in self._drawn.items():
            state = self.state[parameter]
            state[name] = torch.lerp(new, state[name], self.decay) if name in state else new
        self._drawn = {}
        directions = self._directions(self._damping(sum(norms)))
        self._ready = False
        self._updates += 1
        scale = self._clipped(directions)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in directions:
                    self._move(parameter, directions[parameter] * scale, group)

    def _damping(self, squared_norm: float) -> float:
        """λ of this step, from the gradient's squared norm."""
        return self.damping

    def _gradients(self, loss: Tensor) -> Iterable[Tensor | None]:
        """What is preconditioned, a tensor for each parameter; frees the graph."""
        return torch.autograd.grad(loss, self._parameters(), allow_unused=True)

    def _curvature(self, outputs: Tensor) -> dict[tuple[Tensor, str], Tensor]:
        """Factors and squared gradients on labels drawn from the model: what a step takes into the moving averages."""
        drawn_factors: dict[tuple[Tensor, str], Tensor] = {}
        drawn = F.cross_entropy(outputs, self._drawn_labels(outputs), reduction="sum")
        for layer in self._layers:
            layer.forget()
            layer.recording = True
        gradients = torch.autograd.grad(drawn, self._parameters(), retain_graph=True, allow_unused=True)
        by_layer = set()
        for layer in self._layers:
            found = layer.factors(len(outputs))
            layer.forget()
            if found is not None:
                by_layer |= {layer.weight, layer.bias}
                drawn_factors[layer.weight, "output_factor"] = found[0]
                drawn_factors[layer.weight, "input_factor"] = found[1]
        for parameter, gradient in zip(self._parameters(), gradients, strict=True):
            if gradient is not None and parameter not in by_layer:
                drawn_factors[parameter, "diagonal"] = gradient.to(precision(parameter)).square() / len(outputs)
        return drawn_factors

    def _directions(self, damping: float) -> dict[Tensor, Tensor]:
        """The preconditioned gradient D of every parameter that has a gradient."""
        found: dict[Tensor, Tensor] = {}
        for layer in self._layers:
            weight, bias = layer.weight, layer.bias
            if weight.grad is None or "input_factor" not in self.state[weight]:
                continue
            kept = precision(weight)
            gradient = layer.joined(weight.grad.to(kept), None if bias is None else _gradient(bias).to(kept))
            moved = layer.parted(self._solved(layer, gradient, damping))
            found[weight] = moved[0]
            if bias is not None and moved[1] is not None:
                found[bias] = moved[1]
        for parameter in self._parameters():
            if parameter.grad is not None and parameter not in found:
                diagonal = self.state[parameter].get("diagonal")
                scale = damping if diagonal is None else diagonal + damping
                found[parameter] = parameter.grad.to(precision(parameter)) / scale
        return found

    def _solved(self, layer: Layer, gradient: Tensor, damping: float) -> Tensor:
        """D, the preconditioned gradient, of a layer.

        Inverses are computed anew every ``refresh`` updates, and where a correction is too coarse.
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
        by_output, by_input = shift / state["balance"], shift * state["balance"]
        missed = max(shift_error(state["output_inverse"], by_output), shift_error(state["input_inverse"], by_input))
        if missed > LAZY:
            self._invert(state, damping)
            return state["output_inverse"] @ gradient @ state["input_inverse"]
        return shifted(state["output_inverse"], by_output) @ gradient @ shifted(state["input_inverse"], by_input)

    def _invert(self, state: dict[str, Any], damping: float) -> None:
        """Inverses, or eigenvectors and eigenvalues, of a layer's factors, in float64."""
        output, inputs = state["output_factor"].double(), state["input_factor"].double()
        if self.inverse == "eigen":
            for name, factor in (("output", output), ("input", inputs)):
                values, vectors = torch.linalg.eigh(factor)
                state[f"{name}_values"] = values.clamp_min(0.0).to(state["input_factor"])
                state[f"{name}_inverse"] = vectors.to(state["input_factor"])
            return
        means = [float(factor.diagonal().mean()) for factor in (inputs, output)]
        balance = math.sqrt(means[0] / means[1]) if min(means) > 0 else 1.0
        root = math.sqrt(damping)
        for name, factor, added in (("output", output, root / balance), ("input", inputs, root * balance)):
            damped = factor + added * torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
            if self.inverse == "newton":
                inverse = newton_inverse(damped).matrix
            else:
                inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
            state[f"{name}_inverse"] = inverse.to(state["input_factor"])
        state["root_damping"], state["balance"] = root, balance

    def _clipped(self, directions: Mapping[Tensor, Tensor]) -> float:
        """ν, by which the step is shortened to bound its KL divergence."""
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
