"""Sparse Optimization: Adam on a few entries, drawn at random for the gradient and kept by importance for its moments.

From the paper's summary and its constants ("local sparsity and global density", "local randomness and global
importance"); where they leave a choice, it is said below. Own code: there is no package.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kf.inference.baselines.kronecker_factors import precision
from bayes_kf.inference.baselines.seeded_optimizer import (
    SeededOptimizer,
    check_betas,
    check_finite,
)
from bayes_kf.validation import check_positive, check_whole


class SparseOptimization(SeededOptimizer):
    """Adam whose gradient is seen through a random mask, and whose moments live on a support of the same size.

    Of every tensor, M = ⌊κ·size⌋ entries (one at least: ours) are drawn uniformly as a mask, which is kept for
    ``refresh`` updates. An update moves the moments on the union of mask and support, where entries of the support
    outside the mask see no gradient and decay; steps on that union, the bias corrected by the count of all updates; and
    keeps as the new support the M entries of the largest first moments, with their second moments.

    Gradients are reduced to the mask inside hooks, as each tensor's is complete, and freed: dense gradients of two
    tensors never exist at once. ``step`` then applies them, so that a gradient that is not finite changes nothing.

    Args:
        model: its trainable tensors are optimized; the paper's are the weight matrices of attention and MLPs.
        lr: step size, > 0.
        density: κ in (0, 1]; the paper says 5e-4, its code 5e-5.
        refresh: T >= 1, updates that a mask is kept for; the paper says 10, its code 5.
        betas: of the moments, each in [0, 1).
        eps: added to the root of the second moment, > 0.
        seed: of the masks.

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
        self._seen: dict[Tensor, Tensor] = {}
        self._extremes: dict[Tensor, Tensor] = {}
        self._watching = False
        self._watch()

    def kept(self, parameter: Tensor) -> int:
        """The number of entries of a tensor that the mask keeps."""
        return max(1, int(self.param_groups[0]["density"] * parameter.numel()))

    def backward(self, loss: Tensor, outputs: Tensor | None = None) -> None:
        """Instead of ``loss.backward()``: gradients are reduced to the masks as they come.

        Args:
            loss: a scalar.
            outputs: not looked at; taken as the other optimizers take it.
        """
        self._check_open()
        if "mask" not in self.state[self._parameters()[0]]:
            self._draw_masks()
        self._watching = True
        try:
            loss.backward()
        finally:
            self._watching = False
        self._ready = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, masked ones too."""
        super().zero_grad(set_to_none)
        self._forget()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on exactly where ``state_dict`` was taken."""
        super().load_state_dict(state_dict)
        self._forget()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move the parameters.

        Raises:
            RuntimeError: without a :meth:`backward` since the last step.
            FloatingPointError: for gradients that are not finite; the parameters are as they were.
        """
        self._check_step(closure)
        check_finite("gradients", self._extremes.values())
        self._updates += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self._seen:
                    self._move(parameter, self._seen[parameter], group)
        self._forget()
        if self._updates % self.param_groups[0]["refresh"] == 0:
            self._draw_masks()

    def _watch(self) -> None:
        held = weakref.ref(self)  # a hook that held the optimizer itself would keep it alive

        def reduce(parameter: Tensor) -> None:
            optimizer = held()
            if optimizer is not None:
                optimizer._reduce(parameter)

        self._handles.extend(p.register_post_accumulate_grad_hook(reduce) for p in self._parameters())

    def _forget(self) -> None:
        self._seen, self._extremes, self._ready = {}, {}, False

    def _draw_masks(self) -> None:
        for parameter in self._parameters():
            mask = subset(parameter.numel(), self.kept(parameter), self._generator)
            self.state[parameter]["mask"] = mask.to(parameter.device)

    def _reduce(self, parameter: Tensor) -> None:
        """Keep of a gradient that is complete what the mask shows, and its extremes, and free the rest."""
        if self._watching and parameter.grad is not None:
            values = parameter.grad.take(self.state[parameter]["mask"]).to(precision(parameter))
            extremes = torch.stack(torch.aminmax(parameter.grad))  # not a number where one is none
            before = self._seen.get(parameter)
            self._seen[parameter] = values if before is None else before + values
            self._extremes[parameter] = extremes if before is None else self._extremes[parameter] + extremes
            parameter.grad = None

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """An update of one tensor, from its gradient on the mask, (M,)."""
        first_decay, second_decay = group["betas"]
        state = self.state[parameter]
        mask, support = state["mask"], state.get("support", state["mask"][:0])
        union, places = torch.cat([support, mask]).unique(return_inverse=True)
        seen, first, second = (torch.zeros(len(union), dtype=gradient.dtype, device=union.device) for _ in range(3))
        seen[places[len(support) :]] = gradient
        if len(support):
            first[places[: len(support)]] = state["first"]
            second[places[: len(support)]] = state["second"]
        first = first_decay * first + (1.0 - first_decay) * seen
        second = second_decay * second + (1.0 - second_decay) * seen.square()
        moved = (first / (1.0 - first_decay**self._updates)) / (
            (second / (1.0 - second_decay**self._updates)).sqrt() + group["eps"]
        )
        parameter.put_(union, (-group["lr"] * moved).to(parameter.dtype), accumulate=True)
        largest = first.abs().argsort(descending=True, stable=True)[: self.kept(parameter)]
        state["support"], state["first"], state["second"] = union[largest], first[largest], second[largest]


def subset(size: int, number: int, generator: torch.Generator) -> Tensor:
    """Distinct indices below ``size``, (number,), every set as likely; where few, in memory that goes with ``number``.

    Example:
        >>> len(subset(1000, 10, torch.Generator().manual_seed(0)).unique())
        10
    """
    if 2 * number > size:
        return torch.randperm(size, generator=generator)[:number]
    found = torch.empty(0, dtype=torch.long)
    while len(found) < number:  # what is drawn again is drawn in vain
        found = torch.cat([found, torch.randint(size, (number - len(found),), generator=generator)]).unique()
    return found
