"""The contribution of each tensor to the variance of the outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayes_kf.inference.linearization.linearized_batch import LinearizedBatch
from bayes_kf.inference.linearization.row_buffer import Directions
from bayes_kf.inference.predictive.gaussian_posterior import GaussianPosterior
from bayes_kf.models.batch import Batch, split_batch

MAX_EXAMPLES = 8  # the first examples of a batch
MAX_OUTPUTS = 16  # of more outputs, as many evenly spaced ones


def output_variance(posterior: GaussianPosterior, batch: Any) -> dict[str, float]:
    """Tensor name -> its contribution to the variance of the outputs; see :meth:`Posterior.output_variance`."""
    inputs, _ = split_batch(posterior.adapter.read(batch))
    some = Batch.checked(inputs)[:MAX_EXAMPLES].to(posterior.adapter.device)
    with posterior.adapter.full_precision():
        linearized = posterior.kf.linearize(posterior.mean_vector, some)
        contributions = parameter_contributions(posterior, linearized)
    slices = posterior.adapter.slices()
    return {name: posterior.temperature * contributions[where].sum().item() for name, where in slices.items()}


def parameter_contributions(posterior: GaussianPosterior, linearized: LinearizedBatch) -> Tensor:
    """Mean over examples and outputs of J_i (P Jᵀ)_i for each parameter i, (n,); its sum is the mean of J P Jᵀ.

    The covariance of two parameters counts once for each of them, so a contribution may be negative. Without
    covariances, J_i P_ii J_i could add up to many times the variance, since parameters compensate each other.
    """
    num_outputs = linearized.outputs.shape[1]
    chosen = torch.linspace(0, num_outputs - 1, min(num_outputs, MAX_OUTPUTS)).round().long()
    directions = torch.eye(num_outputs, dtype=linearized.outputs.dtype, device=linearized.outputs.device)[chosen]
    if posterior.config.likelihood == "categorical" and num_outputs > 1:
        directions = directions - 1.0 / num_outputs  # softmax ignores the mean of the outputs
    jacobian = linearized.jacobian(Directions(len(directions), lambda _, which: directions[which])).dense()  # (B, c, n)
    rows = jacobian.flatten(0, 1)
    products = rows.double() * torch.stack([posterior.state.belief.product(row) for row in rows]).double()
    return products.sum(0) / len(rows)
