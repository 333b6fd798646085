"""How far a prior may let low-rank adapters change the weights that they are added to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bayes_kf.models.adapter import AdapterModel, peft_in_use

LARGEST_CHANGE = 2.0  # of a weight by its adapter, prior sd over root mean square; of 0.1 to 4, tried on four streams
PROBES = 256  # random inputs that a quantized layer's size is measured with: to 1 % where it has 100 outputs


def largest_variances(adapter: AdapterModel) -> dict[str, float]:
    """Tensor name -> the prior variance under which ΔW = s·BA has twice the size of the frozen W.

    An element of ΔW has variance s² r v a² for variance v in one factor and mean square a² in the other; here that is
    ``LARGEST_CHANGE``² times the mean square of W's elements. Far beyond it a prior says that pre-training is
    forgotten; behind a new classifier, which hardly sees the adapter yet, the outputs alone would allow that. Only
    tensors of PEFT's LoRA layers, and not those whose other factor is zero, which cannot change anything yet. A
    quantized or offloaded W is measured by what it does to random inputs. Ours.

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

    names = {id(module): (name, attribute) for name, places in adapter.owners.items() for module, attribute in places}
    found: dict[str, float] = {}
    for layer in adapter.model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        base = layer.get_base_layer()
        weight = getattr(base, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        size: float | None
        if weight.is_floating_point() and not weight.is_meta:
            size = _mean_square(weight)
        else:
            with adapter.evaluating():
                size = _acting(base, adapter.device)
        if size is None:
            continue
        for key in set(layer.lora_A) & set(layer.lora_B):
            factors = (layer.lora_A[key], layer.lora_B[key])
            for own, other in (factors, factors[::-1]):
                square = _mean_square(other.get_parameter("weight"))
                name, attribute = names.get(id(own), ("", ""))
                if attribute == "weight" and square > 0.0:
                    found[name] = LARGEST_CHANGE**2 * size / (layer.scaling[key] ** 2 * layer.r[key] * square)
    return found


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
