"""Where the uncertainty of predictions sits: the variance of the outputs that each tensor alone accounts for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayes_kf.inference.jacobian import Jacobian
from bayes_kf.inference.linearized import Linearized
from bayes_kf.inference.store import Directions
from bayes_kf.models.adapter import AdapterModel

MAX_DIRECTIONS = 16  # outputs looked at; of more, evenly spaced ones


def output_variance(
    adapter: AdapterModel, structure: Any, belief: Any, batch: Linearized, centred: bool
) -> dict[str, float]:
    """Mean over examples and outputs of J_t P_tt J_tᵀ for each tensor t, without the covariances between tensors.

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
    rows = batch.pull(Directions(len(seeds), lambda _, which: seeds[which])).dense()  # (B, c, n)
    found: dict[str, float] = {}
    for name, where in adapter.slices().items():
        alone = torch.zeros_like(rows)
        alone[..., where] = rows[..., where]
        covariance: Tensor = structure.output_covariance(belief, Jacobian.of_rows(alone))
        found[name] = covariance.diagonal(dim1=-2, dim2=-1).mean().item()
    return found
