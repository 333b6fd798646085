"""4-bit weights of bitsandbytes on a CPU: no gradient flows through them once they are packed for inference."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def four_bit_on_cpu(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The layers that bitsandbytes would pack in eval mode, on processors that it has a kernel for.

    That kernel gives outputs without a graph, as if nothing before the layer mattered. In training mode, which changes
    nothing else in them, they are not packed. Known by name, not imported.
    """
    return [module for module in modules if _is_four_bit(module) and module.weight.device.type == "cpu"]


def check_unpacked(layers: Iterable[nn.Module]) -> None:
    """Raises ValueError where one of these layers was packed already."""
    for layer in layers:
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                "`model` must have 4-bit weights that gradients flow through, got ones that bitsandbytes packed for "
                "inference when the model was called in eval mode on this CPU: load it again, in training mode."
            )


def _is_four_bit(module: nn.Module) -> bool:
    return any(k.__name__ == "Linear4bit" and k.__module__.startswith("bitsandbytes") for k in type(module).__mro__)
