"""The trainable tensors of a model: which they are, where they are, and a table of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from bayes_kf.processes.divided_tensors import is_divided

Places = list[tuple[nn.Module, str]]  # the modules that hold a tensor, with the name of the attribute

LARGE = 20_000_000  # trainable numbers above which full fine-tuning by accident is more likely than intent


def trainable_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> trainable tensor of a model that can be used, else ValueError."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("`model` must have trainable tensors, got none with requires_grad=True.")
    divided = next((name for name, parameter in trainable.items() if is_divided(parameter)), None)
    if divided is not None:
        raise ValueError(
            f"`model` must have its trainable tensors whole in every process, got {divided} divided by FSDP or ZeRO-3: "
            "divide the base alone (docs/how-to/several-processes.md)."
        )
    devices = {str(p.device): name for name, p in trainable.items()}
    if len(devices) > 1 or "meta" in devices:
        places = ", ".join(f"{device} ({name})" for device, name in devices.items())
        raise ValueError(f"`model` must have its trainable tensors in the memory of one device, got {places}.")
    merged = [name for name, module in model.named_modules() if getattr(module, "merged_adapters", None)]
    if merged:
        raise ValueError(f"`model` must have its adapters apart from the base, got one merged into {merged[0]!r}.")
    return trainable


def tensor_places(model: nn.Module, trainable: Mapping[str, nn.Parameter]) -> dict[str, Places]:
    """Trainable tensor -> every module and attribute that holds it; several if tensors are tied."""
    names = {id(parameter): name for name, parameter in trainable.items()}
    places: dict[str, Places] = {name: [] for name in trainable}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in names:
                places[names[id(parameter)]].append((module, attribute))
    return places


def warn_if_large(num_parameters: int, dtype: torch.dtype) -> None:
    """Warns if so many numbers are trainable that the base may not be frozen."""
    if num_parameters > LARGE:
        state_gib = 4 * num_parameters * dtype.itemsize / 2**30
        warnings.warn(
            f"`model` has {num_parameters:,} trainable numbers, above {LARGE:,}: the covariance and its prior take "
            f"{state_gib:.1f} GiB, a quarter more for every output row of a step; is the base not frozen?",
            stacklevel=3,
        )


def table(names: Sequence[str], shapes: Sequence[torch.Size], kinds: Sequence[str], methods: Sequence[str]) -> str:
    """A text table with one row a tensor.

    Args:
        names: of the tensors.
        shapes: of the tensors.
        kinds: classes of the modules that hold them.
        methods: how they are linearized.
    """
    rows = [("tensor", "shape", "numbers", "module", "linearized by")]
    for name, shape, kind, method in zip(names, shapes, kinds, methods, strict=True):
        rows.append((name, str(tuple(shape)), f"{shape.numel():,}", kind, method))
    wide = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [f"{a:<{wide[0]}}  {b:<{wide[1]}}  {c:>{wide[2]}}  {d:<{wide[3]}}  {e}" for a, b, c, d, e in rows]
    return "\n".join(lines)
