"""Per-example gradients of a module's tensors, from a call of the module and the cotangent g of its output.

A rule takes the call, g (R, ...) and the tensor, and returns the gradients of R examples, (R, size). For embedding
tables these have only the columns of the tokens in the batch, see :func:`columns`.
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
        module: the module.
        input: its first argument, (R, ...).
        kwargs: its keyword arguments.
        output: its output, in the graph.
    """

    module: nn.Module
    input: Tensor
    kwargs: dict[str, Any]
    output: Tensor


def columns(call: ModuleCall) -> Tensor | None:
    """The columns of the flattened tensor that the rows of a call have; None for all columns."""
    if not isinstance(call.module, nn.Embedding):
        return None
    width = torch.arange(call.module.embedding_dim, device=call.input.device)
    return (call.input.unique().unsqueeze(-1) * call.module.embedding_dim + width).flatten()


def _linear_weight(call: ModuleCall, cotangent: Tensor, weight: Tensor) -> Tensor:
    """Σ_t g_t ⊗ a_t."""
    size, (out_features, in_features) = len(call.input), weight.shape
    g = cotangent.reshape(size, -1, out_features)  # (R, T, out)
    a = call.input.to(cotangent.dtype).reshape(size, -1, in_features)  # (R, T, in)
    return (g.mT @ a).flatten(1)


def _linear_bias(call: ModuleCall, cotangent: Tensor, bias: Tensor) -> Tensor:
    """Σ_t g_t."""
    return cotangent.reshape(len(call.input), -1, bias.shape[0]).sum(1)


def _conv_weight(call: ModuleCall, cotangent: Tensor, weight: Tensor) -> Tensor:
    """Σ_t g_t ⊗ patch_t over the places t, group by group."""
    conv, size = call.module, len(call.input)
    assert isinstance(conv, nn.Conv2d)
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        raise RuntimeError("padding mode without a rule")
    patches = F.unfold(call.input.to(cotangent.dtype), conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    patches = patches.view(size, conv.groups, -1, patches.shape[-1])  # (R, groups, in/groups·kh·kw, T)
    g = cotangent.reshape(size, conv.groups, weight.shape[0] // conv.groups, -1)  # (R, groups, out/groups, T)
    return (g @ patches.mT).flatten(1)


def _conv_bias(call: ModuleCall, cotangent: Tensor, bias: Tensor) -> Tensor:
    """Σ_t g_t over the places t."""
    return cotangent.flatten(2).sum(2)


def _norm_weight(call: ModuleCall, cotangent: Tensor, weight: Tensor) -> Tensor:
    """Σ_t g_t ∘ x̂_t, x̂ the normalized input."""
    norm = call.module
    assert isinstance(norm, nn.LayerNorm)
    normalized = F.layer_norm(call.input.to(cotangent.dtype), norm.normalized_shape, eps=norm.eps)
    return _sum_places(cotangent * normalized, weight)


def _norm_bias(call: ModuleCall, cotangent: Tensor, bias: Tensor) -> Tensor:
    """Σ_t g_t."""
    return _sum_places(cotangent, bias)


def _embedding_weight(call: ModuleCall, cotangent: Tensor, weight: Tensor) -> Tensor:
    """Σ of g_t over the places t of each token in the batch."""
    table, size, width = call.module, len(call.input), weight.shape[1]
    assert isinstance(table, nn.Embedding)
    if table.max_norm is not None or table.scale_grad_by_freq:
        raise RuntimeError("embedding option without a rule")
    tokens = call.input.unique()
    places = torch.searchsorted(tokens, call.input.reshape(size, -1).contiguous()).unsqueeze(-1)  # (R, T, 1)
    g = cotangent.reshape(size, -1, width)  # (R, T, width)
    if table.padding_idx is not None:
        g = g * (call.input.reshape(size, -1, 1) != table.padding_idx)
    rows = g.new_zeros(size, len(tokens), width)
    return rows.scatter_add_(1, places.expand_as(g), g).flatten(1)


def _linear_magnitude(call: ModuleCall, cotangent: Tensor, magnitude: Tensor) -> Tensor:
    """Σ_t g_t ∘ (base_t + low-rank_t)/‖w‖, which is (out + base)/magnitude (DoRA; its norm is a constant)."""
    base, out = call.kwargs["base_result"].detach(), call.output.detach()
    if call.kwargs["base_layer"].bias is not None:
        base = base - call.kwargs["base_layer"].bias.detach()
    slope = (out + base).to(cotangent.dtype) / magnitude.detach().to(cotangent.dtype)
    return _sum_places(cotangent * slope, magnitude)


def _conv_magnitude(call: ModuleCall, cotangent: Tensor, magnitude: Tensor) -> Tensor:
    """As :func:`_linear_magnitude`, with the channels in the second place; the magnitude is (1, out, 1, 1)."""
    base, out, bias = call.kwargs["base_result"].detach(), call.output.detach(), call.kwargs["base_layer"].bias
    if bias is not None:
        base = base - bias.detach().view(1, -1, 1, 1)
    slope = (out + base).to(cotangent.dtype) / magnitude.detach().to(cotangent.dtype)
    return (cotangent * slope).flatten(2).sum(2)


def _sum_places(values: Tensor, parameter: Tensor) -> Tensor:
    """The sum over all dimensions between the example and the tensor's own, (R, size)."""
    return values.reshape(len(values), -1, parameter.numel()).sum(1)


Rule = Callable[[ModuleCall, Tensor, Tensor], Tensor]

RULES: dict[type[nn.Module], dict[str, Rule]] = {
    nn.Linear: {"weight": _linear_weight, "bias": _linear_bias},
    nn.Conv2d: {"weight": _conv_weight, "bias": _conv_bias},
    nn.LayerNorm: {"weight": _norm_weight, "bias": _norm_bias},
    nn.Embedding: {"weight": _embedding_weight},
}

RULES_THAT_READ_MODULES = (_linear_magnitude, _conv_magnitude)  # the bias of the base layer


def rules(module: nn.Module) -> Mapping[str, Rule]:
    """Attribute -> rule, for the tensors of a module that have one."""
    return RULES.get(type(module)) or _rules_of_peft().get(type(module), {})


def _rules_of_peft() -> Mapping[type[nn.Module], Mapping[str, Rule]]:
    if not peft_in_use():
        return {}
    from peft.tuners.lora.dora import DoraConv2dLayer, DoraLinearLayer

    return {DoraLinearLayer: {"weight": _linear_magnitude}, DoraConv2dLayer: {"weight": _conv_magnitude}}


@torch.no_grad()
def per_example_rows(
    calls: list[tuple[ModuleCall, Tensor]], rule: Rule, parameter: Tensor
) -> tuple[Tensor | None, Tensor]:
    """Per-example gradients of one tensor, from all calls of its module and the gradients of their outputs.

    Returns:
        The columns of the flattened tensor that the rows have, None for all, and the rows (R, columns).
    """
    if len(calls) == 1:
        call, g = calls[0]
        return columns(call), rule(call, g, parameter)
    rows = [_all_columns(call, rule(call, g, parameter), parameter) for call, g in calls]
    return None, torch.stack(rows).sum(0)


def _all_columns(call: ModuleCall, rows: Tensor, parameter: Tensor) -> Tensor:
    """Rows over all columns of a tensor, if a rule gave those of the tokens in the batch."""
    own = columns(call)
    return rows if own is None else rows.new_zeros(len(rows), parameter.numel()).index_copy_(1, own, rows)
