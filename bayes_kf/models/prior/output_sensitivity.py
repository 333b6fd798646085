"""How much the tensors of one PEFT layer change its outputs, relative to the outputs without the adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bayes_kf.models.adapter import AdapterModel

NUM_INPUTS = 256  # random inputs
NUM_SIGNS = 32  # random sums of outputs; the mean square of a tensor with few numbers is known to some 10 %


def output_sensitivities(adapter: AdapterModel, layer: Any) -> dict[str, float]:
    """Tensor name -> variance of the layer's outputs under unit variance of the tensor, relative to their mean square.

    For inputs z of independent signs, to first order at the present tensors: the mean of Σₖ (∂yᵢ/∂θₖ)² over outputs yᵢ,
    by gradients of sums of outputs with random signs, divided by the mean of the frozen layer's (y − y(0))ᵢ². If the
    layer is linear in z, these are the mean squares of the change that θ makes to the weight, and of the weight.
    Tensors without effect have no entry. Empty if the layer is not a Linear, convolution or embedding, or cannot be
    called alone.
    """
    base = layer.get_base_layer()
    inputs = _random_inputs(base, adapter.device)
    if inputs is None:
        return {}
    places_of_layer = {(module, attribute) for module in layer.modules() for attribute in module._parameters}
    own = [name for name, places in adapter.owners.items() if not places_of_layer.isdisjoint(places)]
    leaves = {name: adapter.model.get_parameter(name).detach().clone().requires_grad_() for name in own}
    generator = torch.Generator(device=adapter.device).manual_seed(1)
    try:
        with adapter.eval_mode(), torch.enable_grad(), adapter.substituted(leaves):
            outputs, frozen = layer(inputs), _frozen_outputs(base, inputs)
            sums = [(outputs * _signs(outputs, generator)).sum() for _ in range(NUM_SIGNS)]
            gradients = [
                torch.autograd.grad(total, list(leaves.values()), retain_graph=True, allow_unused=True)
                for total in sums
            ]
    except Exception:  # a layer that needs more than its inputs
        return {}
    size = float(frozen.double().square().mean()) * NUM_SIGNS * outputs.numel()
    squares = {
        name: sum(float(g[number].double().square().sum()) for g in gradients if g[number] is not None)
        for number, name in enumerate(own)
    }
    return {name: square / size for name, square in squares.items() if square > 0.0 and size > 0.0}


def _frozen_outputs(base: nn.Module, inputs: Tensor) -> Tensor:
    """The base layer's outputs, without a bias."""
    with torch.no_grad():
        outputs = base(inputs)
        return outputs if isinstance(base, nn.Embedding) else outputs - base(torch.zeros_like(inputs))


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=generator, device=like.device).to(like.dtype) * 2.0 - 1.0


def _random_inputs(base: nn.Module, device: torch.device) -> Tensor | None:
    """Random inputs of a layer; for a convolution twice the size of its kernel in every direction."""
    generator = torch.Generator(device=device).manual_seed(0)
    weight = getattr(base, "weight", None)
    if isinstance(base, nn.Embedding):
        return torch.randint(0, base.num_embeddings, (NUM_INPUTS,), generator=generator, device=device)
    if isinstance(base, nn.Linear):
        shape: tuple[int, ...] = (NUM_INPUTS, base.in_features)
    elif isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        sizes = (2 * (k - 1) * d + 1 for k, d in zip(base.kernel_size, base.dilation, strict=True))
        shape = (NUM_INPUTS, base.in_channels, *sizes)
    elif type(base).__name__ == "Conv1D" and isinstance(weight, Tensor):  # of transformers' GPT-2
        shape = (NUM_INPUTS, weight.shape[0])
    else:
        return None
    dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else torch.float32
    return _signs(torch.empty(shape, dtype=dtype, device=device), generator)
