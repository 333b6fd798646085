"""How much the tensors of one PEFT layer move its outputs, beside the size that these have without the adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bayes_kf.models.adapter import AdapterModel

INPUTS = 256  # random ones
SIGNS = 32  # drawn sums of outputs: a mean square is known to some 10 % where a tensor has but a few numbers


def responses(adapter: AdapterModel, layer: Any) -> dict[str, float]:
    """Tensor name -> the variance of the layer's outputs under unit variance of the tensor, over their mean square.

    For inputs z of independent signs, to first order at the tensors as they are: the mean of Σₖ (∂yᵢ/∂θₖ)² over outputs
    yᵢ, by gradients of sums of them with random signs, over that of the frozen layer's (y − y(0))ᵢ². Where the layer is
    linear in z these are the mean squares of what θ does to the elements of its weight, and of the weight. Tensors
    without effect have no entry; empty where the layer is none of Linear, convolution, embedding, or cannot be called
    alone.
    """
    base = layer.get_base_layer()
    inputs = _random_inputs(base, adapter.device)
    if inputs is None:
        return {}
    owned = {(module, attribute) for module in layer.modules() for attribute in module._parameters}
    own = [name for name, places in adapter.owners.items() if any(place in owned for place in places)]
    present = {name: adapter.model.get_parameter(name).detach() for name in own}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in present.items()}
    generator = torch.Generator(device=adapter.device).manual_seed(1)
    try:
        with adapter.eval_mode(), torch.enable_grad(), adapter.substituted(leaves):
            outputs, frozen = layer(inputs), _frozen(base, inputs)
            sums = [(outputs * _signs(outputs, generator)).sum() for _ in range(SIGNS)]
            pulled = [torch.autograd.grad(s, list(leaves.values()), retain_graph=True, allow_unused=True) for s in sums]
    except Exception:  # a layer that needs more than its inputs
        return {}
    size = float(frozen.double().square().mean()) * SIGNS * outputs.numel()
    squares = {
        name: sum(float(g[place].double().square().sum()) for g in pulled if g[place] is not None)
        for place, name in enumerate(own)
    }
    return {name: square / size for name, square in squares.items() if square > 0.0 and size > 0.0}


def _frozen(base: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        outputs = base(inputs)
        return outputs if isinstance(base, nn.Embedding) else outputs - base(torch.zeros_like(inputs))


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=generator, device=like.device).to(like.dtype) * 2.0 - 1.0


def _random_inputs(base: nn.Module, device: torch.device) -> Tensor | None:
    """Inputs for a layer; a convolution gets as many places as its kernel takes, twice in every direction."""
    generator = torch.Generator(device=device).manual_seed(0)
    weight = getattr(base, "weight", None)
    if isinstance(base, nn.Embedding):
        return torch.randint(0, base.num_embeddings, (INPUTS,), generator=generator, device=device)
    if isinstance(base, nn.Linear):
        shape: tuple[int, ...] = (INPUTS, base.in_features)
    elif isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        places = (2 * (k - 1) * d + 1 for k, d in zip(base.kernel_size, base.dilation, strict=True))
        shape = (INPUTS, base.in_channels, *places)
    elif type(base).__name__ == "Conv1D" and isinstance(weight, Tensor):  # of transformers' GPT-2
        shape = (INPUTS, weight.shape[0])
    else:
        return None
    dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else torch.float32
    return _signs(torch.empty(shape, dtype=dtype, device=device), generator)
