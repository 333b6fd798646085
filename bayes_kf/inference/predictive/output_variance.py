"""Where the uncertainty of predictions sits: what each tensor contributes to the variance of the outputs."""

from __future__ import annotations

from typing import Any

import torch

from bayes_kf.inference.linearization.linearized_batch import LinearizedBatch
from bayes_kf.inference.linearization.row_buffer import Directions
from bayes_kf.models.adapter import AdapterModel

MAX_DIRECTIONS = 16  # outputs looked at; of more, evenly spaced ones


def output_variance(
    adapter: AdapterModel, structure: Any, belief: Any, batch: LinearizedBatch, centred: bool
) -> dict[str, float]:
    """Mean over examples and outputs of J_t (P Jᵀ)_t for each tensor t; they add up to the mean of J P Jᵀ.

    The covariance of two tensors counts once for each of them, so a contribution may be negative. Without covariances
    (J_t P_tt J_tᵀ) the numbers can add up to many times the variance, where tensors make up for each other.

    Args:
        adapter: the model.
        structure: the covariance structure, see `config`.
        belief: its state.
        batch: examples that went forward at the belief's mean.
        centred: whether outputs count less their mean over the outputs, as softmax sees them.
    """
    num_outputs = batch.outputs.shape[1]
    chosen = torch.linspace(0, num_outputs - 1, min(num_outputs, MAX_DIRECTIONS)).round().long()
    seeds = torch.eye(num_outputs, dtype=batch.outputs.dtype, device=batch.outputs.device)[chosen]
    if centred and num_outputs > 1:
        seeds = seeds - 1.0 / num_outputs
    rows = batch.jacobian(Directions(len(seeds), lambda _, which: seeds[which])).dense()  # (B, c, n)
    flat = rows.flatten(0, 1)
    both = flat.double() * torch.stack([structure.product(belief, row) for row in flat]).double()
    each = both.sum(0) / len(flat)  # (n,), what every number contributes
    return {name: each[where].sum().item() for name, where in adapter.slices().items()}
