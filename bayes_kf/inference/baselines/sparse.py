"""Sparse Optimization: Adam on few entries. Gradients use random entries, moments the most important ones.

It follows the summary of the paper and its constants ("local sparsity and global density", "local randomness and global
importance"). The docstring below names the choices that are ours. There is no package.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kf.inference.baselines.kronecker_factors import statistics_dtype
from bayes_kf.inference.baselines.seeded_optimizer import (
    SeededOptimizer,
    check_betas,
    check_finite,
)
from bayes_kf.validation import check_positive, check_whole


class SparseOptimization(SeededOptimizer):
    """Adam with the gradient on a random mask and the moments on a support of the same size.

    The mask of a tensor has M = max(1, ⌊κ·size⌋) entries (the 1 is ours), drawn uniformly every ``refresh`` updates.
    Update t works on the union of mask and support. There g is the gradient inside the mask and zero outside, and

        m ← β₁ m + (1 − β₁) g
        v ← β₂ v + (1 − β₂) g²
        θ ← θ − lr · (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)

    The M entries with the largest magnitude of m become the new support, with their m and v. The other moments are
    dropped.

    A hook reduces the gradient of each tensor to the mask as soon as it is complete and frees it, so the dense
    gradients of two tensors never exist at once. ``step`` applies them, so a gradient that is not finite changes no
    parameter.

    Args:
        model: its trainable tensors are optimized; the paper's are the weight matrices of attention and MLPs.
        lr: step size, > 0.
        density: κ in (0, 1]; the paper says 5e-4, its code 5e-5.
        refresh: T >= 1, updates between two masks; the paper says 10, its code 5.
        betas: β₁ and β₂, each in [0, 1).
        eps: ε > 0.
        seed: seed of the masks.

    Example:
        >>> model = nn.Linear(30, 20)
        >>> optimizer = SparseOptimization(model, lr=0.1, density=0.01)
        >>> outputs = model(torch.eye(30))
        >>> loss = outputs.square().mean()
        >>> before = model.weight.detach().clone()
        >>> optimizer.zero_grad(); optimizer.backward(loss, outputs); optimizer.step()
        >>> int((model.weight != before).sum()), model.weight.grad is None
        (6, True)
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 2e-4,
        *,
        density: float = 5e-4,
        refresh: int = 10,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        seed: int = 0,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("density", density)):
            check_positive(name, value)
        if density > 1:
            raise ValueError(f"`density` must lie in (0, 1], got {density!r}.")
        check_whole("refresh", refresh)
        check_betas(betas)
        super().__init__(model, {"lr": lr, "betas": betas, "eps": eps, "density": density, "refresh": refresh}, seed)
        self._masked: dict[Tensor, Tensor] = {}
        self._extremes: dict[Tensor, Tensor] = {}
        self._recording = False
        self._add_hooks()

    def mask_size(self, parameter: Tensor) -> int:
        """M, the number of entries in the mask of a tensor."""
        return max(1, int(self.param_groups[0]["density"] * parameter.numel()))

    def backward(self, loss: Tensor, outputs: Tensor | None = None) -> None:
        """Compute the gradients of the loss on the masks. Replaces ``loss.backward()``.

        Args:
            loss: a scalar.
            outputs: ignored; the other optimizers need it.
        """
        self._check_open()
        if "mask" not in self.state[self._parameters()[0]]:
            self._draw_masks()
        self._recording = True
        try:
            loss.backward()
        finally:
            self._recording = False
        self._ready = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, masked ones included."""
        super().zero_grad(set_to_none)
        self._clear()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a state exactly."""
        super().load_state_dict(state_dict)
        self._clear()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move the parameters.

        Raises:
            RuntimeError: if :meth:`backward` did not run since the last step.
            FloatingPointError: if a gradient is not finite; the parameters do not change.
        """
        self._check_step(closure)
        check_finite("gradients", self._extremes.values())
        self._updates += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self._masked:
                    self._move(parameter, self._masked[parameter], group)
        self._clear()
        if self._updates % self.param_groups[0]["refresh"] == 0:
            self._draw_masks()

    def _add_hooks(self) -> None:
        reference = weakref.ref(self)  # a strong reference in a hook would keep the optimizer alive

        def reduce(parameter: Tensor) -> None:
            optimizer = reference()
            if optimizer is not None:
                optimizer._reduce(parameter)

        self._handles.extend(p.register_post_accumulate_grad_hook(reduce) for p in self._parameters())

    def _clear(self) -> None:
        self._masked, self._extremes, self._ready = {}, {}, False

    def _draw_masks(self) -> None:
        for parameter in self._parameters():
            mask = random_indices(parameter.numel(), self.mask_size(parameter), self._generator)
            self.state[parameter]["mask"] = mask.to(parameter.device)

    def _reduce(self, parameter: Tensor) -> None:
        """Store the masked entries of a complete gradient and its extremes, and free the gradient."""
        if self._recording and parameter.grad is not None:
            values = parameter.grad.take(self.state[parameter]["mask"]).to(statistics_dtype(parameter))
            extremes = torch.stack(torch.aminmax(parameter.grad))  # NaN if any entry is NaN
            previous = self._masked.get(parameter)
            self._masked[parameter] = values if previous is None else previous + values
            self._extremes[parameter] = extremes if previous is None else self._extremes[parameter] + extremes
            parameter.grad = None

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Update one tensor and its moments from its gradient on the mask, (M,)."""
        beta1, beta2 = group["betas"]
        state = self.state[parameter]
        mask, support = state["mask"], state.get("support", state["mask"][:0])
        union, places = torch.cat([support, mask]).unique(return_inverse=True)
        g, m, v = (torch.zeros(len(union), dtype=gradient.dtype, device=union.device) for _ in range(3))
        g[places[len(support) :]] = gradient
        if len(support):
            m[places[: len(support)]] = state["first"]
            v[places[: len(support)]] = state["second"]
        m = beta1 * m + (1.0 - beta1) * g
        v = beta2 * v + (1.0 - beta2) * g.square()
        direction = (m / (1.0 - beta1**self._updates)) / ((v / (1.0 - beta2**self._updates)).sqrt() + group["eps"])
        parameter.put_(union, (-group["lr"] * direction).to(parameter.dtype), accumulate=True)
        largest = m.abs().argsort(descending=True, stable=True)[: self.mask_size(parameter)]
        state["support"], state["first"], state["second"] = union[largest], m[largest], v[largest]


def random_indices(size: int, number: int, generator: torch.Generator) -> Tensor:
    """Distinct indices below ``size``, (number,), drawn uniformly. Small samples take memory of order ``number``.

    Example:
        >>> len(random_indices(1000, 10, torch.Generator().manual_seed(0)).unique())
        10
    """
    if 2 * number > size:
        return torch.randperm(size, generator=generator)[:number]
    indices = torch.empty(0, dtype=torch.long)
    while len(indices) < number:  # repeated indices are dropped
        indices = torch.cat([indices, torch.randint(size, (number - len(indices),), generator=generator)]).unique()
    return indices
