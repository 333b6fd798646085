"""A model's modules as they were, after forward passes that replace parts of them, and after ones that raised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

CONTAINERS = (dict, list, set)  # ordered dictionaries included
LARGEST = 256  # entries; longer containers are a model's data, not its registrations


class Before(NamedTuple):
    """A module's class, its attributes and parameters, and what its other containers (buffers, hooks, ...) held.

    Containers that were empty have no entry.
    """

    module: nn.Module
    kind: type[nn.Module]
    attributes: dict[str, Any]
    parameters: dict[str, Any]
    contents: dict[str, Any]


@contextmanager
def restored(before: Sequence[Before]) -> Iterator[None]:
    """Modules as they were afterwards: classes, attributes, tensors and hooks if an error left, parameters always.

    PEFT's LoRA layers of ``nn.MultiheadAttention`` and of parameters (``target_parameters``) take weights out of their
    modules for the length of a forward pass. After one that raised, as vmap may inside them, the weights are missing or
    hold what vmap left; after one that did not, PEFT has put copies in their place that are off by rounding. Values
    that a forward pass changed in place are not restored.

    Args:
        before: from :func:`remembered`.
    """
    try:
        yield
    except BaseException:
        for one in before:
            _restore(one)
        raise
    for one in before:
        _restore_parameters(one)


def snapshot(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """What puts modules back as they are now: classes, attributes, tensors and hooks."""
    before = remembered(modules)

    def restore() -> None:
        for one in before:
            _restore(one)

    return restore


def remembered(modules: Iterable[nn.Module]) -> list[Before]:
    """What modules are like now."""
    return [_seen(module) for module in modules if "_parameters" in vars(module)]  # scripted ones have none


def _seen(module: nn.Module) -> Before:
    attributes = vars(module).copy()
    parameters = attributes["_parameters"].copy()
    contents = {
        name: value.copy() if len(value) <= LARGEST else value
        for name, value in attributes.items()
        if isinstance(value, CONTAINERS) and value
    }
    return Before(module, type(module), attributes, parameters, contents)


def _restore(before: Before) -> None:
    before.module.__class__ = before.kind
    own = vars(before.module)
    own.clear()
    own.update(before.attributes)
    for name, container in before.attributes.items():
        content = before.contents.get(name, ())
        if not isinstance(container, CONTAINERS) or content is container:
            continue
        container.clear()
        if isinstance(container, list):
            container.extend(content)
        else:
            container.update(content)


def _restore_parameters(before: Before) -> None:
    """The module's own parameters, where a forward pass put others in their places."""
    now, held = before.module._parameters, before.parameters
    if len(now) != len(held) or any(now.get(name) is not value for name, value in held.items()):
        for name in held:
            vars(before.module).pop(name, None)  # a plain tensor that stood in for it
        now.clear()
        now.update(held)
