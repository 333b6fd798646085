"""Outputs of many adapters on one batch: the frozen base is computed once for all low-rank branches."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Batch, Inputs, batch_size, to_device
from bayes_kf.processes import shared_work

STEP_SHARE = {torch.float32: 2e-3, torch.float64: 1e-7}  # of a step: small beside kinks, large beside rounding


def outputs_of_draws(
    adapter: AdapterModel, draws: Tensor, inputs: Inputs, at_once: int | None = None, gradients: bool = False
) -> Tensor:
    """Raw outputs under S adapters, (S, B, m).

    One forward pass over all of them (``torch.func.vmap`` over the adapter's tensors) computes the layers before the
    first adapter once. If a model cannot be batched this way (it branches on values, or has PEFT's LoRA on
    ``nn.MultiheadAttention``) or memory runs out, it is run S times, with a warning that gives the reason. The outputs
    are the same up to rounding.

    Args:
        adapter: the model.
        draws: θ of every adapter, (S, n).
        inputs: a batch of B examples.
        at_once: adapters in a pass; all by default.
        gradients: whether the outputs can be differentiated with respect to ``draws``.
    """
    inputs = to_device(inputs, adapter.device)
    share = None if gradients or not adapter.rows_are_examples else shared_work.share_of(batch_size(inputs))
    if share is None:
        return _outputs_of_draws(adapter, draws, inputs, at_once, gradients)
    own = adapter.part(Batch.of(inputs), share.where).inputs
    outputs = shared_work.done_everywhere(lambda: _outputs_of_draws(adapter, draws, own, at_once, False), is_share=True)
    return share.gathered(outputs.transpose(0, 1)).transpose(0, 1)


def _outputs_of_draws(
    adapter: AdapterModel, draws: Tensor, inputs: Inputs, at_once: int | None, gradients: bool
) -> Tensor:
    """:func:`outputs_of_draws` in this process alone."""
    with torch.set_grad_enabled(gradients):
        if len(draws) == 1:
            return _one(adapter, draws[0], inputs).unsqueeze(0)
        try:
            return _batched(adapter, draws, inputs, at_once)
        except Exception as error:  # vmap and the layers inside it raise errors of any class
            outputs = torch.stack([_one(adapter, draw, inputs) for draw in draws])  # invalid inputs raise here
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            warnings.warn(f"{len(draws)} draws were run one by one, not at once: {reason}", stacklevel=3)
            return outputs


def finite_difference_jvps(
    adapter: AdapterModel, at: Tensor, steps: Tensor, inputs: Inputs, at_once: int | None = None
) -> Tensor:
    """Jδ of S steps δ from θ = ``at``, (S, B, m), by finite differences: a forward pass for each step and one at θ.

    The cost does not depend on the number of outputs; J itself takes a backward pass for each. The differences are
    taken at 0.002 of each step, which needs float32 (``adapter.is_precise``). The error is about 1 % of the largest
    change if the step crosses no kinks, and 3 % if changes are tiny. On an untrained LeNet-5 the kinks of max pooling
    change it by up to 10 %. Unlike DoRA's backward passes, it includes the effect of a step on the norm of a weight.

    Args:
        adapter: the model.
        at: θ, (n,).
        steps: δ, (S, n).
        inputs: a batch of B examples.
        at_once: adapters in a pass; all by default.
    """
    share = STEP_SHARE[adapter.dtype]
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
