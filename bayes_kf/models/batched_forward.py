"""Many adapters on one batch: their low-rank branches side by side over one product with the frozen base."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs, to_device

DIFFERENCES = {torch.float32: 2e-3, torch.float64: 1e-7}  # of a step: short of kinks, above rounding


def outputs_of_draws(
    adapter: AdapterModel, draws: Tensor, inputs: Inputs, at_once: int | None = None, gradients: bool = False
) -> Tensor:
    """Raw outputs under S adapters, (S, B, m), without gradients unless asked for.

    One forward pass over all of them (``torch.func.vmap`` over the adapter's tensors), so what no adapter has touched
    yet is computed once. A model that cannot be batched this way (it branches on its values, say, or has PEFT's LoRA on
    ``nn.MultiheadAttention``) or for which memory runs out is run S times, with a warning that says why; the numbers
    agree to rounding.

    Args:
        adapter: the model.
        draws: θ of every adapter, (S, n).
        inputs: a batch of B examples.
        at_once: adapters in a pass; all by default.
        gradients: whether the outputs can be differentiated by ``draws``.
    """
    inputs = to_device(inputs, adapter.device)
    with torch.set_grad_enabled(gradients):
        if len(draws) == 1:
            return _one(adapter, draws[0], inputs).unsqueeze(0)
        try:
            return _batched(adapter, draws, inputs, at_once)
        except Exception as error:  # vmap and layers inside it have no class of their own for what fails
            outputs = torch.stack([_one(adapter, draw, inputs) for draw in draws])  # bad inputs raise here
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            warnings.warn(f"{len(draws)} draws were run one by one, not at once: {reason}", stacklevel=2)
            return outputs


def finite_difference_jvps(
    adapter: AdapterModel, at: Tensor, steps: Tensor, inputs: Inputs, at_once: int | None = None
) -> Tensor:
    """J·δ of S steps δ away from θ = ``at``, (S, B, m), by differences: a forward pass each, and one at θ.

    Whatever the number of outputs, where J itself takes a backward pass for each. The differences are taken at two
    thousandths of each step, which float32 allows and bfloat16 does not (``adapter.is_precise``): good to about one per
    cent of the largest change where a step crosses no kinks on its way, three where changes are tiny. On LeNet-5 as
    drawn, with its max pooling, the kinks within that share change it by up to a tenth. DoRA's backward passes leave
    out what a step does to the norm of a weight; this does not.

    Args:
        adapter: the model.
        at: θ, (n,).
        steps: δ, (S, n).
        inputs: a batch of B examples.
        at_once: adapters in a pass; all by default.
    """
    share = DIFFERENCES[adapter.dtype]
    outputs = outputs_of_draws(adapter, torch.cat([at[None], at + share * steps]), inputs, at_once)  # rounded alike
    return (outputs[1:] - outputs[0]) / share


def _one(adapter: AdapterModel, draw: Tensor, inputs: Inputs) -> Tensor:
    """Raw outputs under one adapter, (B, m)."""
    with adapter.eval_mode():
        return adapter.call(adapter.tensors(draw), inputs).to(adapter.dtype)


def _batched(adapter: AdapterModel, draws: Tensor, inputs: Inputs, at_once: int | None) -> Tensor:
    with adapter.eval_mode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")  # one kernel loops, the rest does not
        one = torch.func.vmap(lambda draw: adapter.call(adapter.tensors(draw), inputs), chunk_size=at_once)
        return one(draws).to(adapter.dtype)
