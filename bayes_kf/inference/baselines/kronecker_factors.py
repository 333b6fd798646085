"""Kronecker factors of the Fisher information of Linear and Conv2d layers, from hooks.

The weight W (o, i) of a layer, with the bias as its last column, has the gradient Σ_t g_t a_tᵀ over the positions t
(tokens, pixels) that share it: a is the input of the layer and g the gradient of the loss in its output. K-FAC
approximates the block of the Fisher information by G ⊗ A,

    A = mean over examples and positions of a aᵀ,    G = mean over examples of Σ_t g_t g_tᵀ,

where the loss is −log p(ỹ) for labels ỹ drawn from the model. The block is exact if there is one position and a and g
are independent. Martens and Grosse 2015; convolutions: Grosse and Martens 2016; shared weights: Eschenhagen et al.
2023.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Layer:
    """A Linear or Conv2d layer with a trained weight, and its inputs and output gradients since the last clear."""

    def __init__(self, name: str, module: nn.Linear | nn.Conv2d) -> None:
        self.name, self.module, self.weight = name, module, module.weight
        self.bias = module.bias if module.bias is not None and module.bias.requires_grad else None
        self.recording = False
        self._inputs: list[Tensor] = []
        self._output_gradients: list[Tensor] = []
        self.handle: RemovableHandle = module.register_forward_hook(self._forward, with_kwargs=True)

    def clear(self) -> None:
        """Drop the recorded inputs and output gradients, and stop recording."""
        self._inputs, self._output_gradients, self.recording = [], [], False

    def factors(self, num_examples: int) -> tuple[Tensor, Tensor] | None:
        """G (o, o) and A (i, i), or (i + 1, i + 1) with a bias; None if no gradient passed through the layer.

        Args:
            num_examples: number of examples in the recorded batch.
        """
        if not self._inputs:
            return None
        a = torch.cat([self._input_rows(inputs) for inputs in self._inputs])  # (N·T, i)
        g = torch.cat([self._output_gradient_rows(gradients) for gradients in self._output_gradients])  # (N·T, o)
        if self.bias is not None:
            a = F.pad(a, (0, 1), value=1.0)
        return g.mT @ g / num_examples, a.mT @ a / len(a)

    def join(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A weight and its bias as one matrix, (o, i) or (o, i + 1)."""
        flat = weight.flatten(1)
        return flat if bias is None else torch.cat([flat, bias[:, None]], 1)

    def split(self, joined: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weight, in its own shape, and the bias from the matrix of :meth:`join`."""
        if self.bias is None:
            return joined.view_as(self.weight), None
        return joined[:, :-1].reshape(self.weight.shape), joined[:, -1]

    def _forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if not (torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad):
            return
        inputs = (args[0] if args else kwargs["input"]).detach()

        def record(gradient: Tensor) -> None:
            if self.recording:
                self._inputs.append(inputs)
                self._output_gradients.append(gradient.detach())

        output.register_hook(record)

    def _input_rows(self, inputs: Tensor) -> Tensor:
        """The inputs at every position, (N·T, i), in the dtype of the factors."""
        inputs = inputs.to(statistics_dtype(self.weight))
        if isinstance(self.module, nn.Linear):
            return inputs.reshape(-1, inputs.shape[-1])
        layer = self.module
        assert not isinstance(layer.padding, str)  # kronecker_layers skips such layers
        patches = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return patches.mT.reshape(-1, patches.shape[1])

    def _output_gradient_rows(self, gradients: Tensor) -> Tensor:
        """The output gradients at every position, (N·T, o)."""
        gradients = gradients.to(statistics_dtype(self.weight))
        if isinstance(self.module, nn.Linear):
            return gradients.reshape(-1, gradients.shape[-1])
        return gradients.flatten(2).mT.reshape(-1, gradients.shape[1])


def statistics_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of the statistics of a parameter: its own dtype, at least float32."""
    return torch.promote_types(parameter.dtype, torch.float32)


def kronecker_layers(model: nn.Module) -> list[Layer]:
    """The layers whose trained weights have Kronecker factors.

    Grouped convolutions, convolutions whose padding is not zeros of a given width, weights that several modules share,
    and biases with a frozen weight have none. :meth:`Layer.factors` is None for a layer that is never called because
    another module reads its weight (``nn.MultiheadAttention``).
    """
    return [Layer(name, module) for name, module in _supported_modules(model)]


def _supported_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    num_holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            num_holders[id(parameter)] = num_holders.get(id(parameter), 0) + 1
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d) or not module.weight.requires_grad:
            continue
        tensors = [module.weight] if module.bias is None else [module.weight, module.bias]
        shared = any(num_holders[id(tensor)] > 1 for tensor in tensors)
        plain = isinstance(module, nn.Linear) or (
            module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        )
        if plain and not shared:
            yield name, module
