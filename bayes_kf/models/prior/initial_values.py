"""The initial values of an adapter's tensors that PEFT does not draw at random."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.peft_adapters.in_use import is_peft, peft_in_use

ZERO_INITS = ("true", "false", "gaussian", "eva")  # of LoRA, after which one factor is zero
SWITCHES = ("init_weights", "init_ia3_weights")  # settings by which PEFT draws an adapter at random, for tests


def known_initial_values(adapter: AdapterModel) -> dict[str, Tensor | float] | None:
    """Tensor name -> its values when PEFT added the adapter; None for a model without PEFT layers.

    LoRA's B and its bias start at zero; for an embedding A does. A layer of ``modules_to_save`` or ``LN_TUNING`` starts
    as a copy of its original. For other PEFT types, tensors that PEFT fills with one number are known (IA3 with ones,
    one factor of LoHa with zeros). Tensors that are drawn or computed from the weights have no entry, nor have the
    base's own biases (``bias="all"``), whose old values are lost.
    """
    if not peft_in_use():
        return None
    from peft.tuners.ln_tuning.layer import LNTuningLayer
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    names = {place: name for name, places in adapter.owners.items() for place in places}
    values: dict[str, Tensor | float] = {}
    wrapped, tried = False, dict[Any, dict[str, float]]()
    for layer in adapter.model.modules():
        if isinstance(layer, ModulesToSaveWrapper):
            pairs = _copies(layer.modules_to_save.values(), layer.original_module, names)
        elif isinstance(layer, LNTuningLayer):
            pairs = _copies(layer.ln_tuning_layers.values(), layer.get_base_layer(), names)
        elif isinstance(layer, LoraLayer) and type(layer.lora_A) is nn.ModuleDict:
            pairs = _of_lora(layer, names, _initialization(adapter.model))
        elif isinstance(layer, BaseTunerLayer):
            pairs = _of_other(layer, names, adapter.model, tried)
        else:
            continue
        wrapped = True
        values |= dict(pairs)
    return values if wrapped or is_peft(adapter.model) else None


def _copies(modules: Any, original: nn.Module, names: dict[Any, str]) -> Iterator[tuple[str, Tensor | float]]:
    for module in modules:
        for path, start in original.named_parameters():
            inside, _, attribute = path.rpartition(".")
            name = names.get((module.get_submodule(inside), attribute))
            if name is not None:
                yield name, start.detach()


def _initialization(model: nn.Module) -> str:
    if not is_peft(model):
        return "true"
    return str(getattr(model.peft_config[model.active_adapters[0]], "init_lora_weights", True)).lower()


def _of_lora(layer: Any, names: dict[Any, str], initialization: str) -> Iterator[tuple[str, Tensor | float]]:
    if initialization not in ZERO_INITS:
        return
    places: list[Any] = [(factor, part) for factor in layer.lora_B.values() for part in ("weight", "bias")]
    places += [(layer.lora_embedding_A, key) for key in layer.lora_embedding_A]
    yield from ((names[place], 0.0) for place in places if place in names)


def _of_other(
    layer: Any, names: dict[Any, str], model: nn.Module, tried: dict[Any, dict[str, float]]
) -> Iterator[tuple[str, Tensor | float]]:
    """The tensors that hold one number in a new layer, which PEFT makes on a copy of this layer's base."""
    if not is_peft(model):
        return
    active, base = model.active_adapters[0], layer.get_base_layer()
    kind = (type(layer), type(base))
    if kind not in tried:
        tried[kind] = _constants(model.peft_config[active], base, active)
    for inside, module in layer.named_modules():
        for attribute in module._parameters:
            name = names.get((module, attribute))
            path = f"{inside}.{attribute}"
            if name is not None and path in tried[kind]:
                yield name, tried[kind][path]


def _constants(config: Any, base: nn.Module, name: str) -> dict[str, float]:
    """Path in the layer -> the number that PEFT fills the tensor with."""
    from peft import inject_adapter_in_model

    config = copy.copy(config)
    config.target_modules, config.inference_mode = ["layer"], False
    for setting in ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"):
        if hasattr(config, setting):
            setattr(config, setting, None)
    for switch in SWITCHES:
        if hasattr(config, switch):
            setattr(config, switch, type(config).__dataclass_fields__[switch].default)
    if getattr(config, "feedforward_modules", None):
        config.feedforward_modules = []
    try:
        holder = nn.ModuleDict({"layer": copy.deepcopy(base)})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer = inject_adapter_in_model(config, holder, name).get_submodule("layer")
    except Exception:  # a layer that PEFT cannot make alone
        return {}
    initial = {path: p.detach() for path, p in layer.named_parameters() if p.requires_grad and p.numel()}
    return {path: float(p.flatten()[0]) for path, p in initial.items() if bool((p == p.flatten()[0]).all())}
