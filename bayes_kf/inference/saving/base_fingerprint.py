"""Fingerprints of the frozen weights that a posterior was fitted with: those of the base and of the adapter.

A fingerprint is a SHA-256 over shapes, dtypes and up to 4,096 evenly spaced elements of every tensor. The fingerprint
of the base leaves out the trained tensors and uses the names that tensors have without the adapter, so it is the same
for the base alone and for a PEFT model around it. The fingerprint of the adapter is over its frozen tensors:
projections (VeRA), buffers of ``modules_to_save`` (batch norm), masks.

LoRA's initializations "pissa" and "olora" change the weights of the base. PEFT repeats the change when it adds the
adapter to the base, up to rounding. So up to 4,096 elements of each such weight are saved, and compared after the
adapter has been added.
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
from bayes_kf.processes.divided_tensors import whole, whole_shape

MAX_ELEMENTS = 4096  # of a tensor that its fingerprint reads
PREFIX = "initialized."  # of the names of saved elements of weights that LoRA's initialization changed
TOLERANCE = 1e-3  # of a weight's root mean square, within which PEFT has repeated an initialization


def fingerprint(model: nn.Module, skip: set[str]) -> str:
    """Fingerprint of all tensors but those in ``skip``, in the order of the model and without names.

    Folders of version 0.x have only this one. It includes the frozen tensors of an adapter.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if name not in skip:
            _add(digest, "", tensor)
    return digest.hexdigest()


def fingerprints(adapter: AdapterModel) -> dict[str, Any]:
    """All fingerprints of a model, as the metadata of the state file holds them."""
    trainable, model = set(adapter.names), adapter.model
    changed = adapter_tensors.changed_base_weights(model)
    return {
        "base_fingerprint": fingerprint(model, trainable),
        "base": base_of(model, trainable),
        "base_unchanged": base_of(model, trainable | set(changed)) if changed else "",
        "initialized": sorted(changed.values()),
        "frozen_adapter": frozen_adapter_of(model, trainable),
    }


def initialized_samples(adapter: AdapterModel) -> dict[str, Tensor]:
    """Elements of the weights that LoRA's initialization changed, under the weights' names in the base."""
    tensors = adapter.model.state_dict()
    return {
        PREFIX + base: _elements(tensors[name])
        for name, base in adapter_tensors.changed_base_weights(adapter.model).items()
    }


def base_of(model: nn.Module, skip: set[str]) -> str:
    """Fingerprint of the base's tensors but those in ``skip``; replicated layers count once."""
    tensors = model.state_dict(keep_vars=True)
    skipped = {id(tensors[name]) for name in skip if name in tensors}  # shared tensors have several names
    named = {base: tensors[name] for name, base in adapter_tensors.tensor_names(model).base.items()}
    return _fingerprint({base: tensor for base, tensor in named.items() if id(tensor) not in skipped})


def frozen_adapter_of(model: nn.Module, trainable: set[str]) -> str:
    """Fingerprint of the active adapter's frozen tensors; it does not depend on the adapter's name."""
    tensors, name = model.state_dict(keep_vars=True), adapter_tensors.active_adapter(model)
    skipped = {id(tensors[path]) for path in trainable if path in tensors}  # shared tensors have several names
    own = [path for path in adapter_tensors.tensor_names(model).adapter if id(tensors[path]) not in skipped]
    return _fingerprint(
        {".".join("" if step == name else step for step in path.split(".")): tensors[path] for path in own}
    )


def recognize(model: nn.Module, metadata: Mapping[str, Any], has_adapter: bool) -> bool | None:
    """Whether a model has the frozen weights of a fit; None if it has them before LoRA's initialization.

    Args:
        model: with the adapter or without.
        metadata: of the state file.
        has_adapter: whether the adapter is on the model.
    """
    names = metadata["names"]
    skip = set(names) if has_adapter else {base_name(name) for name in names}
    if "base" not in metadata:
        return fingerprint(model, skip) == metadata["base_fingerprint"]
    if base_of(model, skip) == metadata["base"]:
        return True
    changed = set(metadata["initialized"])
    if has_adapter:
        changed = {name for name, base in adapter_tensors.tensor_names(model).base.items() if base in changed}
    return None if changed and base_of(model, skip | changed) == metadata["base_unchanged"] else False


def check_frozen_tensors(model: nn.Module, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a model with its adapter has other frozen tensors than in the fit.

    Args:
        model: with the adapter.
        metadata: of the state file.
        tensors: of the state file.
    """
    names = set(metadata["names"])
    if "frozen_adapter" not in metadata:
        if fingerprint(model, names) != metadata["base_fingerprint"]:
            raise ValueError("`base_model` must have the adapter's frozen tensors as they were fitted, got others.")
        return
    if frozen_adapter_of(model, names) != metadata["frozen_adapter"]:
        raise ValueError("`base_model` must have the adapter's frozen tensors as they were fitted, got others.")
    own = model.state_dict()
    for name, base in adapter_tensors.changed_base_weights(model).items():
        saved = tensors.get(PREFIX + base)
        if saved is None or not _is_close(_elements(own[name]), saved):
            raise ValueError(
                "`base_model` must be the base before or after LoRA's initialization, got one that gets "
                f"another {base} by it."
            )


class BaseSnapshot:
    """A base model before PEFT adds an adapter: its modules, its values, and which tensors are trainable.

    Args:
        base: the model.
    """

    def __init__(self, base: nn.Module) -> None:
        self._base, self._modules = base, take_snapshot(base.modules())
        self._values = [(parameter, parameter.data, parameter.requires_grad) for parameter in base.parameters()]
        self._copies: list[tuple[Tensor, Tensor]] = []

    def copy_weights(self, names: Iterable[str]) -> None:
        """Copy these weights, which PEFT will change in place."""
        parameters = [self._base.get_parameter(name) for name in names]
        self._copies = [(parameter, parameter.detach().clone()) for parameter in parameters]

    def restore(self) -> None:
        """Restore the base model, in place."""
        restore(self._modules)
        for parameter, data, trainable in self._values:
            parameter.data = data
            parameter.requires_grad_(trainable)
        for weight, values in self._copies:
            weight.data.copy_(values)


def base_name(name: str) -> str:
    """The name of a tensor in the model before PEFT wrapped it."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")


def _fingerprint(named: Mapping[str, Tensor]) -> str:
    digest, added = hashlib.sha256(), set()
    for name, tensor in sorted(named.items()):
        if id(tensor) not in added:  # replicated layers share their tensors
            _add(digest, name, tensor)
        added.add(id(tensor))
    return digest.hexdigest()


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name}{whole_shape(tensor)}{tensor.dtype}".encode())
    elements = _elements(tensor)
    digest.update(elements.view(torch.uint8).numpy().tobytes() if len(elements) else b"")


def _elements(tensor: Tensor) -> Tensor:
    """Evenly spaced elements, on the CPU; for a sparse tensor, of its indices followed by its values.

    Of a tensor that processes divide, all of them must ask.
    """
    tensor = whole(tensor).detach()
    if tensor.is_sparse:
        tensor = tensor.coalesce()
        tensor = torch.cat([tensor.indices().flatten().to(tensor.dtype), tensor.values().flatten()])
    flat = tensor.reshape(-1)
    return flat[:: max(1, -(-len(flat) // MAX_ELEMENTS))].cpu().contiguous().clone()


def _is_close(elements: Tensor, saved: Tensor) -> bool:
    if elements.shape != saved.shape:
        return False
    one, two = elements.double(), saved.double()
    return bool((one - two).abs().max() <= TOLERANCE * two.square().mean().sqrt())
