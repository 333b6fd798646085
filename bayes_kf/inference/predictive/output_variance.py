"""The contribution of each tensor to the variance of the outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayes_kf.inference.linearization.row_buffer import Directions, selected_outputs
from bayes_kf.inference.linearization.shared_batch import Linearized
from bayes_kf.inference.predictive.gaussian_posterior import GaussianPosterior
from bayes_kf.models.batch import Batch, split_batch
from bayes_kf.models.language import LearnedTokens
from bayes_kf.models.likelihoods.tokens import SPREAD, STATISTICS

MAX_EXAMPLES = 8  # the first examples of a batch
MAX_OUTPUTS = 16  # of more outputs, as many evenly spaced ones
PROBES = 4  # of each sequence


def output_variance(posterior: GaussianPosterior, batch: Any) -> dict[str, float]:
    """Tensor name -> its contribution to the variance of the outputs; see :meth:`Posterior.output_variance`."""
    inputs, targets = split_batch(posterior.adapter.read(batch))
    some = Batch.checked(inputs, targets)[:MAX_EXAMPLES].to(posterior.adapter.device)
    with posterior.adapter.full_precision():
        if isinstance(posterior.adapter, LearnedTokens):
            contributions = _token_contributions(posterior, posterior.adapter.with_probes(PROBES), some)
        else:
            linearized = posterior.kf.linearize(posterior.mean_vector, some)
            contributions = parameter_contributions(posterior, linearized)
    slices = posterior.adapter.slices()
    return {name: posterior.temperature * contributions[where].sum().item() for name, where in slices.items()}


def parameter_contributions(posterior: GaussianPosterior, linearized: Linearized) -> Tensor:
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
    return _products(posterior, rows) / len(rows)


def _token_contributions(posterior: GaussianPosterior, adapter: LearnedTokens, batch: Batch) -> Tensor:
    """The same of the logits of learned tokens, weighted by their Fisher information F, from random probes, (n,).

    Its sum estimates Σ tr F_t J_t P J_tᵀ / Σ tr F_t: s² for independent logits of variance s².
    """
    seeded = adapter.with_targets(batch, posterior.config.seed)
    linearized = posterior.with_adapter(adapter).kf.linearize(posterior.mean_vector, seeded, rows_per_example=PROBES)
    probes = selected_outputs(linearized.outputs, range(STATISTICS, STATISTICS + PROBES))
    rows = linearized.jacobian(probes).dense().flatten(0, 1)
    return _products(posterior, rows) / (PROBES * float(linearized.outputs[:, SPREAD].double().sum()))


def _products(posterior: GaussianPosterior, rows: Tensor) -> Tensor:
    """Σ over rows r of r_i (P r)_i for each parameter i, (n,), float64."""
    products = rows.double() * torch.stack([posterior.state.belief.product(row) for row in rows]).double()
    return products.sum(0)
