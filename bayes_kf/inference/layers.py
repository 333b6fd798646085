"""Per-example gradients of a module's tensors from what went in (a) and the cotangent of what came out (g)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _linear_weight(module: nn.Module, taken: Tensor, cotangent: Tensor, shape: torch.Size) -> Tensor:
    """Σ_t g_t ⊗ a_t per example, (B, out, in)."""
    size = len(taken)
    return cotangent.reshape(size, -1, shape[0]).mT @ taken.to(cotangent.dtype).reshape(size, -1, shape[1])


def _linear_bias(module: nn.Module, taken: Tensor, cotangent: Tensor, shape: torch.Size) -> Tensor:
    """Σ_t g_t per example, (B, out)."""
    return cotangent.reshape(len(taken), -1, shape[0]).sum(1)


def _conv_weight(module: nn.Module, taken: Tensor, cotangent: Tensor, shape: torch.Size) -> Tensor:
    """Per-example gradient of a convolution's weight, (B, *shape): a grouped convolution of patches and cotangents."""
    assert isinstance(module, nn.Conv2d)
    size, groups = len(taken), module.groups
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        raise RuntimeError("padding mode without a rule")
    patches = F.unfold(taken.to(cotangent.dtype), module.kernel_size, module.dilation, module.padding, module.stride)
    patches = patches.view(size, groups, -1, patches.shape[-1])  # (B, g, in/g·kh·kw, L)
    cotangent = cotangent.reshape(size, groups, shape[0] // groups, -1)  # (B, g, out/g, L)
    return (cotangent @ patches.mT).reshape(size, *shape)


def _conv_bias(module: nn.Module, taken: Tensor, cotangent: Tensor, shape: torch.Size) -> Tensor:
    """Per-example gradient of a convolution's bias, (B, out)."""
    return cotangent.flatten(2).sum(2)


Rule = Callable[[nn.Module, Tensor, Tensor, torch.Size], Tensor]

RULES: dict[type[nn.Module], dict[str, Rule]] = {
    nn.Linear: {"weight": _linear_weight, "bias": _linear_bias},
    nn.Conv2d: {"weight": _conv_weight, "bias": _conv_bias},
}
