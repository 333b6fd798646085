"""Kronecker factors of the Fisher information of Linear and Conv2d layers, from hooks.

A layer's weight W (o, i), with the bias as one more column of it, has gradients Σ_t g_t a_tᵀ over the places t where
it is used (tokens, pixels): a its input, g the cotangent of its output. Its block of the Fisher information is taken
to be Γ ⊗ Λ,

    Λ = mean over examples and places of a aᵀ,    Γ = mean over examples, summed over places, of g gᵀ,

with g of −log p(ỹ) for labels ỹ drawn from the model. That is exact for the mean of one place's products where a and g
do not depend on each other. Martens and Grosse 2015; convolutions: Grosse and Martens 2016; many places: Eschenhagen
et al. 2023.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Layer:
    """A Linear or Conv2d whose weight is trained, and what went through it since the last :meth:`forget`."""

    def __init__(self, name: str, module: nn.Linear | nn.Conv2d) -> None:
        self.name, self.module, self.weight = name, module, module.weight
        self.bias = module.bias if module.bias is not None and module.bias.requires_grad else None
        self.recording = False
        self._inputs: list[Tensor] = []
        self._cotangents: list[Tensor] = []
        self.handle: RemovableHandle = module.register_forward_hook(self._forward, with_kwargs=True)

    def forget(self) -> None:
        """Drop what was recorded."""
        self._inputs, self._cotangents, self.recording = [], [], False

    def factors(self, num_examples: int) -> tuple[Tensor, Tensor] | None:
        """Γ (o, o) and Λ (i, i), or (i + 1, i + 1) with a bias; None where no gradient came through the layer.

        Args:
            num_examples: of the batch whose gradients were recorded.
        """
        if not self._inputs:
            return None
        inputs = torch.cat([self._places(x) for x in self._inputs])
        cotangents = torch.cat([self._rows(g) for g in self._cotangents])
        if self.bias is not None:
            inputs = F.pad(inputs, (0, 1), value=1.0)
        return cotangents.mT @ cotangents / num_examples, inputs.mT @ inputs / len(inputs)

    def joined(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A weight and its bias as one matrix, (o, i) or (o, i + 1)."""
        flat = weight.flatten(1)
        return flat if bias is None else torch.cat([flat, bias[:, None]], 1)

    def parted(self, joined: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weight, in its own shape, and the bias of a joined matrix."""
        if self.bias is None:
            return joined.view_as(self.weight), None
        return joined[:, :-1].reshape(self.weight.shape), joined[:, -1]

    def _forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if not (torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad):
            return
        inputs = (args[0] if args else kwargs["input"]).detach()

        def cotangent(gradient: Tensor) -> None:
            if self.recording:
                self._inputs.append(inputs)
                self._cotangents.append(gradient.detach())

        output.register_hook(cotangent)

    def _places(self, inputs: Tensor) -> Tensor:
        """Inputs of every place, (N·T, i), in the factors' precision."""
        inputs = inputs.to(precision(self.weight))
        if isinstance(self.module, nn.Linear):
            return inputs.reshape(-1, inputs.shape[-1])
        layer = self.module
        assert not isinstance(layer.padding, str)  # such layers are not watched
        patches = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return patches.mT.reshape(-1, patches.shape[1])

    def _rows(self, cotangents: Tensor) -> Tensor:
        """Cotangents of every place, (N·T, o)."""
        cotangents = cotangents.to(precision(self.weight))
        if isinstance(self.module, nn.Linear):
            return cotangents.reshape(-1, cotangents.shape[-1])
        return cotangents.flatten(2).mT.reshape(-1, cotangents.shape[1])


def precision(parameter: Tensor) -> torch.dtype:
    """The dtype of a parameter's statistics: its own, but float32 at least."""
    return torch.promote_types(parameter.dtype, torch.float32)


def layers(model: nn.Module) -> list[Layer]:
    """The layers whose trained weights have Kronecker factors; all other trained tensors are somebody else's.

    Left out are grouped convolutions, those whose padding is not zeros of a given width, weights that more than one
    module holds, and biases whose weight is frozen. A layer that is never called, its weight read by another module
    (``nn.MultiheadAttention``), is watched in vain: :meth:`Layer.factors` is None.
    """
    return [Layer(name, module) for name, module in _watched(model)]


def _watched(model: nn.Module) -> Iterator[tuple[str, Any]]:
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d) or not module.weight.requires_grad:
            continue
        tensors = [module.weight] if module.bias is None else [module.weight, module.bias]
        shared = any(holders[id(tensor)] > 1 for tensor in tensors)
        plain = isinstance(module, nn.Linear) or (
            module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        )
        if plain and not shared:
            yield name, module
