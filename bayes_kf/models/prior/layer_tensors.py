"""Which trainable tensors belong to PEFT's adapter layers, and new draws of LoRA factors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.peft_adapters.in_use import is_peft, peft_in_use

RANDOM_INITS = ("true", "gaussian")  # of LoRA, which draw one factor at random and set the other to zero


def layer_tensors(adapter: AdapterModel) -> frozenset[str]:
    """The names of the trainable tensors that PEFT's adapter layers add to the layers of the base.

    Not among them: the base's own tensors, such as biases, copies of layers (``modules_to_save``) and prompts.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> layers = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
        >>> model = get_peft_model(layers, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
        >>> sorted(name.split(".")[-3] for name in layer_tensors(AdapterModel(model)))
        ['lora_A', 'lora_B']
    """
    if not peft_in_use():
        return frozenset()
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = {place: name for name, places in adapter.owners.items() for place in places}
    found = set[str]()
    for layer in adapter.model.modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        of_base = {id(module) for module in layer.get_base_layer().modules()}
        places = [
            (module, attribute)
            for module in layer.modules()
            if id(module) not in of_base
            for attribute in module._parameters
        ]
        found |= {names[place] for place in places if place in names}
    return frozenset(found)


def redrawn_factors(adapter: AdapterModel, generator: torch.Generator) -> Tensor:
    """The model's trainable tensors with other random values in the LoRA factors that have no effect yet, (n,).

    A factor is drawn anew, from a Gaussian with the mean square that it has, if PEFT drew it at random and the other
    factor is still zero. So the model's outputs are the same. All other tensors keep their values.

    Args:
        adapter: the model.
        generator: on the CPU.
    """
    vector = adapter.vector()
    if not is_peft(adapter.model):
        return vector
    config = adapter.model.peft_config[adapter.model.active_adapters[0]]
    if str(getattr(config, "init_lora_weights", "")).lower() not in RANDOM_INITS:
        return vector
    slices = adapter.slices()
    for name, _, _ in factors_without_effect(adapter, vector):
        where = slices[name]
        scale = vector[where].double().square().mean().sqrt().to(vector)
        noise = torch.randn(where.stop - where.start, generator=generator, dtype=torch.float64)
        vector[where] = scale * noise.to(vector)
    return vector


def factors_without_effect(adapter: AdapterModel, vector: Tensor) -> Iterator[tuple[str, Any, nn.Module]]:
    """Every trainable LoRA factor whose other factor is zero in ``vector`` (n,): its name, its layer and its module.

    The factor is A, but B for an embedding.
    """
    if not peft_in_use():
        return
    from peft.tuners.lora import LoraLayer

    names = {place: name for name, places in adapter.owners.items() for place in places}
    tensors = adapter.unflatten(vector)
    for layer in adapter.model.modules():
        if not isinstance(layer, LoraLayer) or type(layer.lora_A) is not nn.ModuleDict:
            continue
        for drawn, other in _factors(layer):
            values = tensors[names[other]] if other in names else _values(other)
            if drawn in names and not values.any():
                yield names[drawn], layer, drawn[0]


def _factors(layer: Any) -> list[tuple[Any, Any]]:
    """Pairs (factor, the other factor) of a LoRA layer, each a module and the name of its parameter."""
    pairs = [((layer.lora_A[key], "weight"), (layer.lora_B[key], "weight")) for key in layer.lora_A]
    pairs += [((layer.lora_embedding_B, key), (layer.lora_embedding_A, key)) for key in layer.lora_embedding_A]
    return pairs


def _values(place: tuple[nn.Module, str]) -> Tensor:
    module, attribute = place
    values = module._parameters[attribute]
    assert values is not None
    return values.detach()
