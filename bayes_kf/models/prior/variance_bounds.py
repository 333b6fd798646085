"""How far a prior may let low-rank adapters change the weights that they are added to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.peft_adapters.in_use import peft_in_use
from bayes_kf.models.prior.weight_responses import responses

LARGEST_CHANGE = 2.0  # of a weight by its adapter, prior sd over root mean square; of 0.1 to 4, tried on four streams
PROBES = 256  # random inputs that a quantized layer's size is measured with: to 1 % where it has 100 outputs


def largest_variances(adapter: AdapterModel) -> dict[str, float]:
    """Tensor name -> the prior variance under which ΔW = s·BA has twice the size of the frozen W.

    An element of ΔW has variance s² r v a² for variance v in one factor and mean square a² in the other; here that is
    ``LARGEST_CHANGE``² times the mean square of W's elements. Far beyond it a prior says that pre-training is
    forgotten; behind a new classifier, which hardly sees the adapter yet, the outputs alone would allow that. Not for
    factors whose other one is zero, which cannot change anything yet. A quantized or offloaded W is measured by what it
    does to random inputs. Ours.

    For LoRA on Linear, convolution, embedding, ``nn.MultiheadAttention`` and parameters (``target_parameters``) this is
    exact. In layers of other PEFT types (AdaLoRA, LoHa, LoKr, VeRA, IA3, OFT, ...) on Linear, convolution and embedding
    each tensor alone may change the layer's outputs for random inputs by twice their size, to first order
    (``responses``). Not bounded: prompts, ``modules_to_save``, biases and norms of the base, and layers that cannot be
    called alone.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> sorted(name.split(".")[-3] for name in largest_variances(AdapterModel(model)))
        ['lora_B']
    """
    if not peft_in_use():
        return {}
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = {place: name for name, places in adapter.owners.items() for place in places}
    found: dict[str, float] = {}
    for layer in adapter.model.modules():
        if isinstance(layer, LoraLayer) and type(layer.lora_A) is nn.ModuleDict:
            bounds = _of_factors(adapter, layer, names)
        elif isinstance(layer, BaseTunerLayer):
            bounds = {name: LARGEST_CHANGE**2 / share for name, share in responses(adapter, layer).items()}
        else:
            continue
        found |= {name: min(bound, found.get(name, bound)) for name, bound in bounds.items()}
    return found


def _of_factors(adapter: AdapterModel, layer: Any, names: Mapping[Any, str]) -> dict[str, float]:
    """Of one LoRA layer, in closed form."""
    size = _size(adapter, layer)
    if size is None:
        return {}
    pairs = [(key, (layer.lora_A[key], "weight"), (layer.lora_B[key], "weight")) for key in layer.lora_A]
    pairs += [(key, (layer.lora_embedding_A, key), (layer.lora_embedding_B, key)) for key in layer.lora_embedding_A]
    found: dict[str, float] = {}
    for key, *factors in pairs:
        for own, (module, attribute) in (factors, factors[::-1]):
            square = _mean_square(module._parameters[attribute])
            if own in names and square > 0.0:
                found[names[own]] = LARGEST_CHANGE**2 * size / (layer.scaling[key] ** 2 * layer.r[key] * square)
    return found


def _size(adapter: AdapterModel, layer: Any) -> float | None:
    """The mean square of the elements of the weight that a LoRA layer changes; None where it is not known."""
    base = layer.get_base_layer()
    if hasattr(layer, "get_param"):  # target_parameters
        weight = layer.get_param()
    else:
        weight = getattr(base, "in_proj_weight" if isinstance(base, nn.MultiheadAttention) else "weight", None)
    if not isinstance(weight, Tensor):
        return None
    if weight.is_floating_point() and not weight.is_meta:
        return _mean_square(weight)
    with adapter.eval_mode():
        return _acting(base, adapter.device)


def _mean_square(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().mean())


@torch.no_grad()
def _acting(base: nn.Module, device: torch.device) -> float | None:
    """The mean square of weights that cannot be read, from what the layer does to random signs; None if not linear.

    For inputs z of independent signs E(Wz)ᵢ² = Σⱼ Wᵢⱼ², whichever library keeps W and however.
    """
    if not isinstance(base, nn.Linear):
        return None
    generator = torch.Generator(device=device).manual_seed(0)
    z = torch.randint(0, 2, (PROBES, base.in_features), generator=generator, device=device).float() * 2.0 - 1.0
    moved = base(z) - base(torch.zeros_like(z[:1]))
    return _mean_square(moved) / base.in_features
