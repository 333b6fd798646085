"""What goes into a model and what comes out: inputs of its dtype, outputs as a matrix."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kf.models.batch import Inputs, to_device


def to_model(
    inputs: Inputs, model: nn.Module, device: torch.device, dtypes: Collection[torch.dtype], autocast: bool
) -> Inputs:
    """Inputs on a device, in the model's own floating-point dtype if it has one and nothing else casts them.

    If the model has no float64 tensor, float64 inputs (NumPy's arrays, for example) become its widest dtype. Other
    inputs are cast only if all of the model's tensors have one dtype and autocast is off. Torch would raise for most.

    Args:
        inputs: as for the model.
        model: the model.
        device: where its trainable tensors are.
        dtypes: of its trainable tensors; inputs of these dtypes need no walk through the model.
        autocast: whether autocast is on in the forward pass.
    """
    inputs = inputs.to(device) if isinstance(inputs, Tensor) else to_device(inputs, device)
    for value in inputs.values() if isinstance(inputs, Mapping) else (inputs,):
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype not in dtypes:
            break
    else:
        return inputs
    present = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    widest = max(present, key=lambda dtype: torch.finfo(dtype).bits)
    single = len(present) == 1 and not autocast

    def cast(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype in present:
            return value
        return value.to(widest) if single or value.dtype == torch.float64 else value

    return {name: cast(value) for name, value in inputs.items()} if isinstance(inputs, Mapping) else cast(inputs)


def as_tensor(outputs: Any) -> Tensor:
    """The tensor in what a model returned: itself, or its ``logits``.

    Raises:
        ValueError: if there is none.
    """
    if not isinstance(outputs, Tensor):
        outputs = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if not isinstance(outputs, Tensor):
        raise ValueError("`model` must return a tensor or an object with `logits`, got neither.")
    return outputs


def as_matrix(outputs: Any) -> Tensor:
    """The (B, m) tensor in what a model returned.

    Raises:
        ValueError: if there is none.
    """
    outputs = as_tensor(outputs)
    if outputs.ndim != 2:
        raise ValueError(f"`model` must return outputs of shape (batch, outputs), got {tuple(outputs.shape)}.")
    return outputs


def as_column(outputs: Any) -> Tensor:
    """As :func:`as_tensor`, with one number for each example, (B,), as a column, (B, 1)."""
    tensor = as_tensor(outputs)
    return tensor.unsqueeze(-1) if tensor.ndim == 1 else tensor
