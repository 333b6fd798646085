"""Per-example gradients of a module's tensors from a call of it and the cotangent g of what came out.

A rule takes the call, g (R, ...) and the tensor's shape, and returns the rows of R examples, (R, size); for embedding
tables only the columns of the tokens that were looked up, see ``columns``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayes_kf.models.peft_adapters.in_use import peft_in_use


class ModuleCall(NamedTuple):
    """One call of a module in a forward pass.

    Attributes:
        module: what was called.
        input: its first argument, (R, ...).
        kwargs: its keyword arguments.
        output: what came out, in the graph.
    """

    module: nn.Module
    input: Tensor
    kwargs: dict[str, Any]
    output: Tensor


def columns(call: ModuleCall) -> Tensor | None:
    """Which columns of a flattened tensor its rows are about; None for all of them."""
    if not isinstance(call.module, nn.Embedding):
        return None
    width = torch.arange(call.module.embedding_dim, device=call.input.device)
    return (call.input.unique().unsqueeze(-1) * call.module.embedding_dim + width).flatten()


def _linear_weight(call: ModuleCall, cotangent: Tensor, shape: torch.Size) -> Tensor:
    """Σ_t g_t ⊗ a_t."""
    size = len(call.input)
    g, a = cotangent.reshape(size, -1, shape[0]), call.input.to(cotangent.dtype).reshape(size, -1, shape[1])
    return (g.mT @ a).flatten(1)


def _linear_bias(call: ModuleCall, cotangent: Tensor, shape: torch.Size) -> Tensor:
    """Σ_t g_t."""
    return cotangent.reshape(len(call.input), -1, shape[0]).sum(1)


def _conv_weight(call: ModuleCall, cotangent: Tensor, shape: torch.Size) -> Tensor:
    """Patches times cotangents, summed over places, group by group."""
    conv, size = call.module, len(call.input)
    assert isinstance(conv, nn.Conv2d)
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        raise RuntimeError("padding mode without a rule")
    patches = F.unfold(call.input.to(cotangent.dtype), conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    patches = patches.view(size, conv.groups, -1, patches.shape[-1])  # (R, g, in/g·kh·kw, L)
    cotangent = cotangent.reshape(size, conv.groups, shape[0] // conv.groups, -1)  # (R, g, out/g, L)
    return (cotangent @ patches.mT).flatten(1)


def _conv_bias(call: ModuleCall, cotangent: Tensor, shape: torch.Size) -> Tensor:
    """Σ_t g_t over the places t."""
    return cotangent.flatten(2).sum(2)


def _norm_weight(call: ModuleCall, cotangent: Tensor, shape: torch.Size) -> Tensor:
    """Σ_t g_t ∘ x̂_t, x̂ the normalized input."""
    norm = call.module
    assert isinstance(norm, nn.LayerNorm)
    normalized = F.layer_norm(call.input.to(cotangent.dtype), norm.normalized_shape, eps=norm.eps)
    return _sum_places(cotangent * normalized, shape)


def _norm_bias(call: ModuleCall, cotangent: Tensor, shape: torch.Size) -> Tensor:
    """Σ_t g_t."""
    return _sum_places(cotangent, shape)


def _embedding_weight(call: ModuleCall, cotangent: Tensor, shape: torch.Size) -> Tensor:
    """Σ of g_t over the places t of every token that occurs in the batch."""
    table, size, width = call.module, len(call.input), shape[1]
    assert isinstance(table, nn.Embedding)
    if table.max_norm is not None or table.scale_grad_by_freq:
        raise RuntimeError("embedding option without a rule")
    tokens = call.input.unique()
    places = torch.searchsorted(tokens, call.input.reshape(size, -1).contiguous()).unsqueeze(-1)  # (R, T, 1)
    cotangent = cotangent.reshape(size, -1, width)
    if table.padding_idx is not None:
        cotangent = cotangent * (call.input.reshape(size, -1, 1) != table.padding_idx)
    rows = cotangent.new_zeros(size, len(tokens), width)
    return rows.scatter_add_(1, places.expand_as(cotangent), cotangent).flatten(1)


def _linear_magnitude(call: ModuleCall, cotangent: Tensor, shape: torch.Size) -> Tensor:
    """Σ_t g_t ∘ (base_t + low-rank_t)/‖w‖, which is (out + base)/magnitude (DoRA; its norm is a constant)."""
    base, out = call.kwargs["base_result"].detach(), call.output.detach()
    if call.kwargs["base_layer"].bias is not None:
        base = base - call.kwargs["base_layer"].bias.detach()
    slope = (out + base).to(cotangent.dtype) / _weight(call).to(cotangent.dtype)
    return _sum_places(cotangent * slope, shape)


def _conv_magnitude(call: ModuleCall, cotangent: Tensor, shape: torch.Size) -> Tensor:
    """As :func:`_linear_magnitude`, with the channels in the second place; its shape is (1, out, 1, 1)."""
    base, out, bias = call.kwargs["base_result"].detach(), call.output.detach(), call.kwargs["base_layer"].bias
    if bias is not None:
        base = base - bias.detach().view(1, -1, 1, 1)
    slope = (out + base).to(cotangent.dtype) / _weight(call).to(cotangent.dtype)
    return (cotangent * slope).flatten(2).sum(2)


def _weight(call: ModuleCall) -> Tensor:
    weight: Tensor = call.module.weight  # type: ignore[assignment]
    return weight.detach()


def _sum_places(values: Tensor, shape: torch.Size) -> Tensor:
    """Summed over all between the example and the tensor's own dimensions, (R, size)."""
    return values.reshape(len(values), -1, shape.numel()).sum(1)


Rule = Callable[[ModuleCall, Tensor, torch.Size], Tensor]

RULES: dict[type[nn.Module], dict[str, Rule]] = {
    nn.Linear: {"weight": _linear_weight, "bias": _linear_bias},
    nn.Conv2d: {"weight": _conv_weight, "bias": _conv_bias},
    nn.LayerNorm: {"weight": _norm_weight, "bias": _norm_bias},
    nn.Embedding: {"weight": _embedding_weight},
}


def rules(module: nn.Module) -> Mapping[str, Rule]:
    """By name, how a module applies the tensors that it has a rule for."""
    return RULES.get(type(module)) or _rules_of_peft().get(type(module), {})


def _rules_of_peft() -> Mapping[type[nn.Module], Mapping[str, Rule]]:
    if not peft_in_use():
        return {}
    from peft.tuners.lora.dora import DoraConv2dLayer, DoraLinearLayer

    return {DoraLinearLayer: {"weight": _linear_magnitude}, DoraConv2dLayer: {"weight": _conv_magnitude}}
