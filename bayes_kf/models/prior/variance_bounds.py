"""Upper bounds on the prior variance of adapters, from the weights that they are added to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.peft_adapters.in_use import peft_in_use
from bayes_kf.models.prior.output_sensitivity import output_sensitivities
from bayes_kf.processes.divided_tensors import whole

LARGEST_CHANGE = 2.0  # prior sd of ΔW over the root mean square of W; chosen from 0.1 to 4 on four streams
NUM_PROBES = 256  # random inputs that measure a quantized weight: to 1 % for a layer with 100 outputs


def largest_variances(adapter: AdapterModel) -> dict[str, float]:
    """Tensor name -> the prior variance for which ΔW = s·BA has twice the size of the frozen W.

    If one factor has variance v and the other mean square a², an element of ΔW has variance s² r v a². The bound sets
    it to ``LARGEST_CHANGE``² times the mean square of W. A much wider prior means that pre-training is forgotten. The
    scale of the outputs alone does not prevent it: a new classifier passes little of the adapter's effect on. A factor
    has no bound while the other one is zero. A quantized or offloaded W is measured by its outputs for random inputs.
    This rule is our own.

    For LoRA on Linear, convolution, embedding, ``nn.MultiheadAttention`` and parameters (``target_parameters``) this is
    exact. In layers of other PEFT types (AdaLoRA, LoHa, LoKr, VeRA, IA3, OFT, ...) on Linear, convolution and embedding
    each tensor alone may change the layer's outputs for random inputs by twice their size, to first order
    (``output_sensitivity``). Not bounded: prompts, ``modules_to_save``, biases and norms of the base, and layers that
    cannot be called alone.

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
    bounds: dict[str, float] = {}
    for layer in adapter.model.modules():
        if isinstance(layer, LoraLayer) and type(layer.lora_A) is nn.ModuleDict:
            of_layer = _of_factors(adapter, layer, names)
        elif isinstance(layer, BaseTunerLayer):
            of_layer = {name: LARGEST_CHANGE**2 / share for name, share in output_sensitivities(adapter, layer).items()}
        else:
            continue
        bounds |= {name: min(bound, bounds.get(name, bound)) for name, bound in of_layer.items()}
    return bounds


def _of_factors(adapter: AdapterModel, layer: Any, names: Mapping[Any, str]) -> dict[str, float]:
    """The bounds of one LoRA layer, in closed form."""
    size = _size(adapter, layer)
    if size is None:
        return {}
    pairs = [(key, (layer.lora_A[key], "weight"), (layer.lora_B[key], "weight")) for key in layer.lora_A]
    pairs += [(key, (layer.lora_embedding_A, key), (layer.lora_embedding_B, key)) for key in layer.lora_embedding_A]
    bounds: dict[str, float] = {}
    for key, *factors in pairs:
        for own, (module, attribute) in (factors, factors[::-1]):
            square = _mean_square(module._parameters[attribute])
            if own in names and square > 0.0:
                bounds[names[own]] = LARGEST_CHANGE**2 * size / (layer.scaling[key] ** 2 * layer.r[key] * square)
    return bounds


def _size(adapter: AdapterModel, layer: Any) -> float | None:
    """The mean square of the weight that a LoRA layer changes; None if unknown."""
    base = layer.get_base_layer()
    if hasattr(layer, "get_param"):  # target_parameters
        weight = layer.get_param()
    else:
        weight = getattr(base, "in_proj_weight" if isinstance(base, nn.MultiheadAttention) else "weight", None)
    if not isinstance(weight, Tensor):
        return None
    if weight.is_floating_point() and not weight.is_meta:
        return _mean_square(whole(weight))
    with adapter.eval_mode():
        return _mean_square_by_probes(base, adapter.device)


def _mean_square(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().mean())


@torch.no_grad()
def _mean_square_by_probes(base: nn.Module, device: torch.device) -> float | None:
    """The mean square of weights that cannot be read, from outputs for random signs; None if the layer is not linear.

    For inputs z of independent signs E(Wz)ᵢ² = Σⱼ Wᵢⱼ², in whatever form W is stored.
    """
    if not isinstance(base, nn.Linear):
        return None
    generator = torch.Generator(device=device).manual_seed(0)
    z = torch.randint(0, 2, (NUM_PROBES, base.in_features), generator=generator, device=device).float() * 2.0 - 1.0
    products = base(z) - base(torch.zeros_like(z[:1]))
    return _mean_square(products) / base.in_features
