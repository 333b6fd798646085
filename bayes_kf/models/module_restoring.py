"""Snapshots of a model's modules, which undo what a forward pass changed in them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from bayes_kf.processes.divided_tensors import BY_FSDP

CONTAINERS = (dict, list, set)  # ordered dictionaries included
LARGEST = 256  # entries; longer containers are a model's data, not its registrations

_is_container: dict[type, bool] = {}  # by class; faster than isinstance, which every attribute would take


class ModuleState(NamedTuple):
    """A module's class, its attributes and parameters, and the entries of its other containers (buffers, hooks, ...).

    Containers that were empty have no entry.
    """

    module: nn.Module
    kind: type[nn.Module]
    attributes: dict[str, Any]
    parameters: dict[str, Any]
    contents: dict[str, Any]


def take_snapshot(modules: Iterable[nn.Module]) -> list[ModuleState]:
    """The present state of modules. Values that a forward pass changes in place are not copied."""
    states = []
    for module in modules:
        attributes = module.__dict__.copy()
        if "_parameters" not in attributes:  # a scripted module
            continue
        contents = {}
        for name, value in attributes.items():
            kind = type(value)
            known = _is_container.get(kind)
            if known is None:
                known = _is_container[kind] = issubclass(kind, CONTAINERS)
            if known and value:
                if len(value) > LARGEST:
                    contents[name] = value
                else:  # the copy() of DeepSpeed's parameters fails
                    contents[name] = dict(value) if isinstance(value, dict) else value.copy()
        states.append(ModuleState(module, type(module), attributes, dict(attributes["_parameters"]), contents))
    return states


def restore(states: Iterable[ModuleState]) -> None:
    """Gives modules their classes, attributes, tensors and hooks back."""
    for state in states:
        state.module.__class__ = state.kind
        own = state.module.__dict__
        own.clear()
        own.update(state.attributes)
        for name, container in state.attributes.items():
            content = state.contents.get(name, ())
            if not isinstance(container, CONTAINERS) or content is container:
                continue
            container.clear()
            if isinstance(container, list):
                container.extend(content)
            else:
                container.update(content)


def restore_parameters(states: Iterable[ModuleState]) -> None:
    """Gives modules their own parameters back, after a forward pass that raised nothing.

    PEFT's LoRA layers of ``nn.MultiheadAttention`` and of parameters (``target_parameters``) take weights out of their
    modules during a forward pass, and put back copies that are off by rounding. Parameters that FSDP divides stay as it
    leaves them.
    """
    for state in states:
        now, saved = state.module._parameters, state.parameters
        changed, divided = len(now) != len(saved), dict[str, Any]()
        for name, value in saved.items():
            present = now.get(name)
            if present is not value:
                changed = True
                if hasattr(value, BY_FSDP) or hasattr(present, BY_FSDP):  # without a call, which counts here
                    divided[name] = present
        if changed:
            for name in saved:
                state.module.__dict__.pop(name, None)  # a plain tensor that PEFT put in its place
            now.clear()
            now.update(saved | divided)
