"""What a belief is about besides its own tensors: the frozen weights of the base, and those of the adapter.

A fingerprint is a SHA-256 over shapes, dtypes and up to 4,096 evenly spaced elements of every tensor. The base's leaves
out what is trained, and goes by the names that its tensors have without the adapter, so that it is the same on the
base alone and on a PEFT model around it. The adapter's is over its frozen tensors: projections (VeRA), buffers of
``modules_to_save`` (batch norm), masks.

LoRA's "pissa" and "olora" change the weights that they are put on. PEFT does so again when it adds the adapter to the
base, up to rounding; so up to 4,096 elements of each such weight are saved, and compared after the adapter was added.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.module_restoring import restore, take_snapshot
from bayes_kf.models.peft_adapters import adapter_tensors

SAMPLED = 4096  # elements of a tensor that its fingerprint reads
PREFIX = "initialized."  # of the saved elements of weights that LoRA's initialization changed
ROUNDING = 1e-3  # of a weight's root mean square, within which an initialization counts as repeated


def fingerprint(model: nn.Module, skip: set[str]) -> str:
    """Over every tensor but those in ``skip``, in the order of the model and without names.

    Folders of version 0.x have it alone; of a model with an adapter it holds the adapter's frozen tensors too.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if name not in skip:
            _add(digest, "", tensor)
    return digest.hexdigest()


def noted(adapter: AdapterModel) -> dict[str, Any]:
    """What is saved of a model, as JSON."""
    trainable, model = set(adapter.names), adapter.model
    changed = adapter_tensors.changed_base_weights(model)
    return {
        "base_fingerprint": fingerprint(model, trainable),
        "base": of_base(model, trainable),
        "base_unchanged": of_base(model, trainable | set(changed)) if changed else "",
        "initialized": sorted(changed.values()),
        "frozen_adapter": of_adapter(model, trainable),
    }


def samples(adapter: AdapterModel) -> dict[str, Tensor]:
    """Elements of the weights that LoRA's initialization changed, under their names in the base."""
    tensors = adapter.model.state_dict()
    return {
        PREFIX + base: _picked(tensors[name])
        for name, base in adapter_tensors.changed_base_weights(adapter.model).items()
    }


def of_base(model: nn.Module, skip: set[str]) -> str:
    """Of the base's tensors but those in ``skip``, by their names in the base; replicated layers once."""
    tensors = model.state_dict(keep_vars=True)
    skipped = {id(tensors[name]) for name in skip if name in tensors}  # under all the names that they have
    named = {base: tensors[name] for name, base in adapter_tensors.tensor_names(model).base.items()}
    return _of({base: tensor for base, tensor in named.items() if id(tensor) not in skipped})


def of_adapter(model: nn.Module, trainable: set[str]) -> str:
    """Of the active adapter's tensors that are not trained, whatever its name."""
    tensors, name = model.state_dict(keep_vars=True), adapter_tensors.active_adapter(model)
    skipped = {id(tensors[path]) for path in trainable if path in tensors}  # under all the names that they have
    own = [path for path in adapter_tensors.tensor_names(model).adapter if id(tensors[path]) not in skipped]
    return _of({".".join("" if step == name else step for step in path.split(".")): tensors[path] for path in own})


def recognized(model: nn.Module, metadata: Mapping[str, Any], complete: bool) -> bool | None:
    """Whether a model has the frozen weights that a belief was fitted on; None before LoRA's initialization.

    Args:
        model: with the adapter or without.
        metadata: of the belief's folder.
        complete: whether the adapter is on it.
    """
    names = metadata["names"]
    skip = set(names) if complete else {base_name(name) for name in names}
    if "base" not in metadata:
        return fingerprint(model, skip) == metadata["base_fingerprint"]
    if of_base(model, skip) == metadata["base"]:
        return True
    changed = set(metadata["initialized"])
    if complete:
        changed = {name for name, base in adapter_tensors.tensor_names(model).base.items() if base in changed}
    return None if changed and of_base(model, skip | changed) == metadata["base_unchanged"] else False


def check(model: nn.Module, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError where a model with its adapter on has other frozen tensors than the belief was fitted with."""
    names = set(metadata["names"])
    if "frozen_adapter" not in metadata:
        if fingerprint(model, names) != metadata["base_fingerprint"]:
            raise ValueError("`base_model` must have the adapter's frozen tensors as they were fitted, got others.")
        return
    if of_adapter(model, names) != metadata["frozen_adapter"]:
        raise ValueError("`base_model` must have the adapter's frozen tensors as they were fitted, got others.")
    own = model.state_dict()
    for name, base in adapter_tensors.changed_base_weights(model).items():
        saved = tensors.get(PREFIX + base)
        if saved is None or not _close(_picked(own[name]), saved):
            raise ValueError(
                "`base_model` must be the base before LoRA's initialization or after it, got one whose "
                f"{base} becomes another."
            )


class Before:
    """A base as it is before PEFT adds an adapter: modules, values, and which tensors are trainable.

    Args:
        base: the model.
    """

    def __init__(self, base: nn.Module) -> None:
        self._base, self._modules = base, take_snapshot(base.modules())
        self._values = [(parameter, parameter.data, parameter.requires_grad) for parameter in base.parameters()]
        self._held: list[tuple[Tensor, Tensor]] = []

    def hold(self, names: Iterable[str]) -> None:
        """Keep copies of these weights, which PEFT will change in place."""
        found = [self._base.get_parameter(name) for name in names]
        self._held = [(parameter, parameter.detach().clone()) for parameter in found]

    def restore(self) -> None:
        """Put it all back."""
        restore(self._modules)
        for parameter, data, trainable in self._values:
            parameter.data = data
            parameter.requires_grad_(trainable)
        for weight, values in self._held:
            weight.data.copy_(values)


def base_name(name: str) -> str:
    """A tensor's name in the model before PEFT wrapped it."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")


def _of(named: Mapping[str, Tensor]) -> str:
    digest, seen = hashlib.sha256(), set()
    for name, tensor in sorted(named.items()):
        if id(tensor) not in seen:  # a replicated layer has the tensors of the first
            _add(digest, name, tensor)
        seen.add(id(tensor))
    return digest.hexdigest()


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
    picked = _picked(tensor)
    digest.update(picked.view(torch.uint8).numpy().tobytes() if len(picked) else b"")


def _picked(tensor: Tensor) -> Tensor:
    """Evenly spaced elements, on the CPU; of a sparse tensor the values behind the places."""
    tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.coalesce()
        tensor = torch.cat([tensor.indices().flatten().to(tensor.dtype), tensor.values().flatten()])
    flat = tensor.reshape(-1)
    return flat[:: max(1, -(-len(flat) // SAMPLED))].cpu().contiguous().clone()


def _close(found: Tensor, saved: Tensor) -> bool:
    if found.shape != saved.shape:
        return False
    one, two = found.double(), saved.double()
    return bool((one - two).abs().max() <= ROUNDING * two.square().mean().sqrt())
