"""Which tensors of a PEFT model belong to the base and which to the adapter; which PEFT models are not supported."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from bayes_kf.models.peft_adapters.in_use import is_peft

REPEATABLE = ("pissa", "olora")  # LoRA initializations that change the base, but in the same way every time
UNSUPPORTED = {  # types whose outputs are not a function of the trainable tensors and one example, and why
    "LILY": "its layers average over the examples of a batch",
    "CPT": "it changes its own tensors and masks their gradients as it runs",
    "XLORA": "it mixes several adapters, which are not saved with it",
}
CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")  # prefixes of all initializations that change the base


class TensorNames(NamedTuple):
    """Names in a model's state dict.

    Attributes:
        base: of the base's tensors, each with its name in the base without adapters.
        adapter: of the other tensors of the active adapter, trainable or not.
    """

    base: dict[str, str]
    adapter: list[str]


def tensor_names(model: nn.Module) -> TensorNames:
    """The tensors of the base and of the active adapter; without PEFT all belong to the base."""
    names = list(model.state_dict())
    if not is_peft(model):
        return TensorNames({name: name for name in names}, [])
    active, others = active_adapter(model), set(model.peft_config)
    others.discard(active)
    wrappers = {path: inner for path, module in model.named_modules() if (inner := _inner(module))}
    root = ["base_model"] if model.peft_config[active].is_prompt_learning else ["base_model", "model"]
    own = TensorNames({}, [])
    for name in names:
        inside, outside = _split(name.split("."), root, wrappers)
        if not outside:
            own.base[name] = ".".join(inside)
        elif len(outside) < 2 or outside[1] not in others:
            own.adapter.append(name)
    return own


def _split(steps: list[str], root: list[str], wrappers: dict[str, str]) -> tuple[list[str], list[str]]:
    """The path of a tensor in the base, and the rest of the path if the tensor belongs to an adapter layer."""
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
    """The attribute of a PEFT layer that holds the base layer; None for other modules."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper

    if isinstance(module, TrainableTokensWrapper):  # its state dict has the base's embedding in the inner layer
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


def base_changing_init(model: nn.Module) -> str:
    """LoRA's initialization, in lower case, if it changed the base; else an empty string."""
    if not is_peft(model):
        return ""
    given = str(getattr(model.peft_config[active_adapter(model)], "init_lora_weights", "")).lower()
    return given if given.startswith(CHANGING) else ""


def changed_base_weights(model: nn.Module) -> dict[str, str]:
    """The base's weights that LoRA's initialization changed, as in :class:`TensorNames`."""
    if not base_changing_init(model):
        return {}
    from peft.tuners.lora import LoraLayer

    active = active_adapter(model)
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and active in m.lora_A]
    changed = {id(getattr(layer.get_base_layer(), "weight", None)) for layer in layers}
    tensors = model.state_dict(keep_vars=True)
    return {name: base for name, base in tensor_names(model).base.items() if id(tensors[name]) in changed}


def check_name(name: object, what: str) -> None:
    """Raises ValueError if an adapter's name cannot name a folder, since PEFT saves each adapter in one."""
    if not isinstance(name, str) or not all(name.split("/")) or any(c in name for c in ".\\\0"):
        raise ValueError(f"{what} whose name can be a folder's, got {name!r}.")


def check_supported(model: nn.Module) -> None:
    """Raises ValueError if a PEFT model cannot be fitted, saved and loaded."""
    if not is_peft(model):
        return
    for config in model.peft_config.values():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind in UNSUPPORTED:
            raise ValueError(f"`model` must not have an adapter of PEFT's type {kind}: {UNSUPPORTED[kind]}.")
    active = list(model.active_adapters)
    if len(active) != 1:
        got = ", ".join(map(repr, active)) or "none"
        raise ValueError(
            f"`model` must have one active adapter, got {got}: merge the others into the base, or join them by PEFT's "
            "`add_weighted_adapter`."
        )
    check_name(active[0], "`model` must have an adapter")
    known = tensor_names(model)
    own = {*known.base, *known.adapter}
    tensors = model.state_dict(keep_vars=True)
    other = [name for name, tensor in tensors.items() if name not in own and tensor.requires_grad]
    if other:
        raise ValueError(f"`model` must have no trainable tensors of adapters that are not active, got {other[0]!r}.")
    start = base_changing_init(model)
    if start and start not in REPEATABLE:
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
