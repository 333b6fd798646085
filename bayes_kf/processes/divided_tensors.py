"""Tensors of a base that FSDP or DeepSpeed's ZeRO-3 divides among the processes, and puts together for each use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

BY_FSDP, BY_DEEPSPEED = "to_local", "ds_id"  # attributes of divided tensors
COUNTS = ("applied_pre_backward_ref_cnt", "ds_grads_remaining")  # attributes of modules, kept by ZeRO-3


def is_divided(tensor: Any) -> bool:
    """Whether processes divide a tensor."""
    return hasattr(tensor, BY_FSDP) or hasattr(tensor, BY_DEEPSPEED)


def own_part(tensor: Any) -> Tensor:
    """What this process holds of a tensor that processes divide; any other as it is."""
    return tensor.to_local() if hasattr(tensor, BY_FSDP) else tensor


def whole_shape(tensor: Any) -> tuple[int, ...]:
    """The shape of a tensor once it is put together."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def whole(tensor: Any) -> Tensor:
    """A tensor that processes divide, put together, for which all of them must call this; any other as it is."""
    if hasattr(tensor, BY_FSDP):
        return tensor.full_tensor()
    if not hasattr(tensor, BY_DEEPSPEED):
        return tensor
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([tensor]):
        return tensor.detach().clone()


class BackwardCounts:
    """ZeRO-3's counts of the backward passes to come, which allow one pass for every forward pass.

    They say when a module's tensors are put together and taken apart again. Set back before each further pass, they let
    several go through one graph.

    Args:
        modules: of the model, just before a forward pass.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = [module for module in modules if hasattr(module, "ds_id")]
        self._counts: list[tuple[nn.Module, dict[str, int]]] = []  # none yet
        for module in self._modules:
            for name in COUNTS:
                module.__dict__.pop(name, None)

    def after_forward(self) -> None:
        """Remember the counts after the forward pass."""
        self._counts = [
            (module, {name: module.__dict__[name] for name in COUNTS if name in module.__dict__})
            for module in self._modules
        ]

    def set_back(self) -> None:
        """The counts as they were after the forward pass, for a further backward pass."""
        for module, counts in self._counts:
            module.__dict__.update(counts)
