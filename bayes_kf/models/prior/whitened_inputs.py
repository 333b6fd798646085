"""LoRA factors A that whiten the inputs of their layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs
from bayes_kf.models.prior.layer_tensors import factors_without_effect
from bayes_kf.processes import shared_work

SMALLEST = 1e-10  # of the eigenvalues, relative to the largest: smaller ones are rounding errors


def whitened_factors(adapter: AdapterModel, vector: Tensor, inputs: Inputs) -> Tensor:
    """Trainable tensors with A = c S_r^(−1/2) V_rᵀ in the LoRA layers that have no effect yet, (n,).

    S is the mean of x xᵀ over the inputs x of a layer (pixels and tokens included), V_r its r leading eigenvectors, S_r
    their eigenvalues. So the r numbers Ax are uncorrelated and each has the mean square c² = a² tr S, where a² is the
    mean square of the elements of the A in ``vector``. That is the mean square that they have under independent
    elements, so B sees inputs of the size that PEFT's A gives it. Outputs do not change, since B = 0. If the inputs
    have rank q < r, the other r − q rows stay. Of a layer that is called several times, the first call counts. Ours.

    Args:
        adapter: the model.
        vector: its trainable tensors, (n,).
        inputs: a batch. Tokens that a mapping's ``attention_mask`` hides do not count.

    Raises:
        ValueError: if no LoRA layer has a trainable A and B = 0, or such a layer is not on a Linear or an ungrouped
            Conv2d.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> adapter, x = AdapterModel(model), torch.randn(32, 8) * torch.arange(1.0, 9.0)
        >>> a = adapter.unflatten(whitened_factors(adapter, adapter.vector(), x))[adapter.names[0]]
        >>> moment = (x @ a.T).T @ (x @ a.T) / 32
        >>> torch.allclose(moment, moment[0, 0] * torch.eye(2), atol=1e-4)
        True
    """
    factors = list(factors_without_effect(adapter, vector))
    if not factors:
        raise ValueError("`lora_inputs` 'whitened' needs LoRA layers whose factor B is zero, got none.")
    tensors, whitened = adapter.unflatten(vector), dict[str, Tensor]()
    mask = None if isinstance(inputs, Tensor) else inputs.get("attention_mask")

    def whiten(name: str, factor: nn.Module, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        if name not in whitened:
            samples = _samples(factor, arguments[0], mask).to(tensors[name].device)
            whitened[name] = whitened_factor(tensors[name].flatten(1), samples)

    for _, layer, _ in factors:
        _check_layer(layer)
    hooks = [layer.register_forward_pre_hook(partial(whiten, name, factor)) for name, layer, factor in factors]
    try:
        with shared_work.shared(None):  # the hooks need all examples
            adapter.outputs(vector, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return adapter.flatten(tensors | whitened)


def whitened_factor(factor: Tensor, samples: Tensor) -> Tensor:
    """A factor (r, d) whose products with the samples (N, d) are uncorrelated; see :func:`whitened_factors`."""
    x = samples.double()
    gram = x.T @ x if len(x) >= x.shape[1] else x @ x.T  # the smaller one; both have the same positive eigenvalues
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0)[: len(factor)], vectors.flip(1)[:, : len(factor)]
    known = values > SMALLEST * values[0]
    directions = vectors.T if len(x) >= x.shape[1] else (x.T @ vectors / values.clamp_min(0.0).sqrt()).T
    moments = values / len(x)
    scale = (factor.double().square().mean() * x.square().sum() / len(x)).sqrt()
    result = factor.double().clone()
    result[: len(known)][known] = (scale / moments[:, None].sqrt() * directions)[known]
    return result.to(factor.dtype)


def _check_layer(layer: Any) -> None:
    """Raise ValueError unless a LoRA layer multiplies vectors that its input consists of."""
    base = layer.get_base_layer()
    is_linear = isinstance(base, nn.Linear) or type(base).__name__ == "Conv1D"  # of transformers' GPT-2
    is_conv = isinstance(base, nn.Conv2d) and base.groups == 1 and not isinstance(base.padding, str)
    if hasattr(layer, "get_param") or not (is_linear or is_conv):
        raise ValueError(
            "`lora_inputs` 'whitened' needs LoRA on Linear layers or on Conv2d with one group and paddings that are "
            f"numbers, got {type(base).__name__}."
        )


def _samples(factor: nn.Module, inputs: Tensor, mask: Tensor | None) -> Tensor:
    """The vectors that a factor A multiplies, (N, d)."""
    if isinstance(factor, nn.Conv2d):
        assert not isinstance(factor.padding, str)  # checked
        patches = F.unfold(inputs, factor.kernel_size, factor.dilation, factor.padding, factor.stride)
        return patches.transpose(1, 2).flatten(0, 1)
    if mask is not None and inputs.ndim == 3 and mask.shape == inputs.shape[:2]:
        return inputs[mask.to(inputs.device).bool()]
    return inputs.flatten(0, -2)
