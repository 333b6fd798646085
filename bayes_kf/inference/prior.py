"""The variance that a belief starts from: as given, or scaled so that the first inputs' outputs vary as configured."""

from __future__ import annotations

import torch
from torch import Tensor

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.curvature import signs
from bayes_kf.inference.linearize import Linearizer
from bayes_kf.models.adapter import Inputs, batch_size
from bayes_kf.models.lora import largest_variances
from bayes_kf.models.state_space import constant_variance, logit_variance, uniform_variance

SCALE_PROBES = 16  # per example, where the outputs are not seen one by one


def unscaled(config: KalmanConfig, mean: Tensor) -> Tensor:
    """The variance by the configured rule, (n,); a unit where the first inputs scale it.

    Raises:
        ValueError: where it is not positive and finite in the mean's precision.
    """
    size, variance = len(mean), config.initial_variance
    if variance is None:
        drawn = constant_variance(size, 1.0)
    elif config.initial_rule == "constant":
        drawn = constant_variance(size, variance)
    else:
        drawn = uniform_variance(size, variance, torch.Generator().manual_seed(config.seed))
    drawn = drawn.to(mean)
    if not bool(torch.isfinite(drawn).all() and (drawn > 0).all()):
        raise ValueError(f"`initial_variance` must be positive and finite in {mean.dtype}, got {variance:g}.")
    return drawn


def scaled(config: KalmanConfig, linearize: Linearizer, mean: Tensor, inputs: Inputs) -> Tensor:
    """The variance that gives the outputs for ``inputs`` the configured spread, (n,), constant in every tensor."""
    adapter, squares = linearize.adapter, _squares(config, linearize, mean, inputs)
    where = adapter.slices()
    gains = [float(squares[part].double().sum()) for part in where.values()]
    starts = [float(mean[part].double().square().mean()) for part in where.values()]
    modules = [name.rpartition(".")[0] for name in where]
    variances = logit_variance(gains, starts, modules, config.initial_logit_sd, config.initial_spread)
    if config.initial_spread == "modules":
        most = largest_variances(adapter)
        variances = [min(v, most.get(name, v)) for name, v in zip(where, variances, strict=True)]
    return torch.cat([mean.new_full((size,), value) for value, size in zip(variances, adapter.sizes, strict=True)])


def _squares(config: KalmanConfig, linearize: Linearizer, mean: Tensor, inputs: Inputs) -> Tensor:
    """Mean squares of the Jacobian's columns over examples and outputs, (n,); by probes for many outputs."""
    num_outputs, total = linearize.prepare(mean, inputs), torch.zeros_like(mean)
    count = num_outputs if config.curvature == "exact" else min(num_outputs, SCALE_PROBES)
    generator = torch.Generator(device=mean.device).manual_seed(config.seed)
    for _, piece in linearize.pieces(mean, inputs, count):
        batch = linearize(mean, piece, needed=count)
        directions = None if count == num_outputs else signs(batch.outputs, count, generator)
        total += batch.pull(directions).column_squares()
    return total / (batch_size(inputs) * num_outputs)
