"""Whose the tensors of a PEFT model are: the base's or an adapter's; and which PEFT models cannot be fitted."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from bayes_kf.models.peft_adapters.in_use import is_peft

REPEATED = ("pissa", "olora")  # LoRA initializations that change the base, the same way every time
REFUSED = {  # types whose outputs are no function of the trainable tensors and one example, and why
    "LILY": "its layers average over the examples of a batch",
    "CPT": "it changes its own tensors and masks their gradients as it runs",
    "XLORA": "it mixes several adapters, which are not saved with it",
}
CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")  # all that change it, by how their names begin


class Parts(NamedTuple):
    """Names in a model's state dict.

    Attributes:
        base: of the base's tensors, each with its name in the base alone.
        adapter: of what else belongs to the active adapter, trainable or not.
    """

    base: dict[str, str]
    adapter: list[str]


def parts(model: nn.Module) -> Parts:
    """The tensors of a model; those of adapters that are not active are left out. All are the base's without PEFT."""
    names = list(model.state_dict())
    if not is_peft(model):
        return Parts({name: name for name in names}, [])
    active, others = active_adapter(model), set(model.peft_config)
    others.discard(active)
    wrappers = {path: inner for path, module in model.named_modules() if (inner := _inner(module))}
    root = ["base_model"] if model.peft_config[active].is_prompt_learning else ["base_model", "model"]
    found = Parts({}, [])
    for name in names:
        inside, outside = _split(name.split("."), root, wrappers)
        if not outside:
            found.base[name] = ".".join(inside)
        elif len(outside) < 2 or outside[1] not in others:
            found.adapter.append(name)
    return found


def _split(steps: list[str], root: list[str], wrappers: dict[str, str]) -> tuple[list[str], list[str]]:
    """The way to a tensor of the base, or where it leaves the base: the steps within the layer of the adapter."""
    if steps[: len(root)] != root:
        return [], steps[1:] if steps[0] == "base_model" else steps
    inside: list[str] = []
    for place in range(len(root), len(steps)):
        inner = wrappers.get(".".join(steps[:place]))
        if inner is not None and steps[place] != inner:
            return inside, steps[place:]
        if inner is None:
            inside.append(steps[place])
    return inside, []


def _inner(module: nn.Module) -> str | None:
    """The attribute under which a PEFT layer has the layer of the base that it stands for."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper

    if isinstance(module, TrainableTokensWrapper):  # whose state dict has the base's embedding in the inner layer
        return "token_adapter"
    if isinstance(module, AuxiliaryTrainingWrapper):
        return "original_module"
    if type(module).__module__ == "peft.tuners.adaption_prompt.layer":
        return "model"
    if isinstance(module, BaseTunerLayer) and "base_layer" in module._modules:
        return "base_layer"
    return None


def active_adapter(model: nn.Module) -> str:
    """The name of the adapter that a PEFT model uses; empty without PEFT."""
    return str(model.active_adapters[0]) if is_peft(model) else ""


def initialization(model: nn.Module) -> str:
    """How LoRA's weights started where that changed the base, in lower case; else empty."""
    if not is_peft(model):
        return ""
    given = str(getattr(model.peft_config[active_adapter(model)], "init_lora_weights", "")).lower()
    return given if given.startswith(CHANGING) else ""


def initialized(model: nn.Module) -> dict[str, str]:
    """The base's weights that LoRA's initialization changed, as in :class:`Parts`."""
    if not initialization(model):
        return {}
    from peft.tuners.lora import LoraLayer

    active = active_adapter(model)
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and active in m.lora_A]
    changed = {id(getattr(layer.get_base_layer(), "weight", None)) for layer in layers}
    tensors = model.state_dict(keep_vars=True)
    return {name: base for name, base in parts(model).base.items() if id(tensors[name]) in changed}


def check_name(name: object, what: str) -> None:
    """Raises ValueError where an adapter's name cannot be that of a folder; PEFT saves adapters under their names."""
    if not isinstance(name, str) or not all(name.split("/")) or any(c in name for c in ".\\\0"):
        raise ValueError(f"{what} whose name can be a folder's, got {name!r}.")


def check(model: nn.Module) -> None:
    """Raises ValueError where a PEFT model cannot be fitted, saved and read again, before anything is done with it."""
    if not is_peft(model):
        return
    for config in model.peft_config.values():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind in REFUSED:
            raise ValueError(f"`model` must not have an adapter of PEFT's type {kind}: {REFUSED[kind]}.")
    active = list(model.active_adapters)
    if len(active) != 1:
        got = ", ".join(map(repr, active)) or "none"
        raise ValueError(
            f"`model` must have one active adapter, got {got}: merge the others into the base, or join them by PEFT's "
            "`add_weighted_adapter`."
        )
    check_name(active[0], "`model` must have an adapter")
    known = parts(model)
    own = {*known.base, *known.adapter}
    tensors = model.state_dict(keep_vars=True)
    other = [name for name, tensor in tensors.items() if name not in own and tensor.requires_grad]
    if other:
        raise ValueError(f"`model` must have no trainable tensors of adapters that are not active, got {other[0]!r}.")
    start = initialization(model)
    if start and start not in REPEATED:
        raise ValueError(
            f"`model` must not have `init_lora_weights` {start!r}, which changes the base in a way that loading cannot "
            "repeat: save the base as it is now, set `init_lora_weights` of `peft_config` to True, and load with that "
            "base."
        )
    _check_attention(model)


def _check_attention(model: nn.Module) -> None:
    from peft.tuners.lora.layer import MultiheadAttention

    for name, module in nn.Module.named_modules(model):
        if isinstance(module, MultiheadAttention) and "out_proj" in module._modules:
            raise ValueError(
                "`model` must not have LoRA on `out_proj` of a MultiheadAttention by itself, which PEFT does not apply "
                f"(LoRA on the attention holds it already), got it in {name!r}: take it out of `target_modules`."
            )
