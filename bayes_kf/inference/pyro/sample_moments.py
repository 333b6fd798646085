"""A Gaussian posterior fitted to draws from another sampler, such as NUTS. This module does not load Pyro."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.covariance.moment_matching import moment_matched
from bayes_kf.inference.filtering.kalman_filter import FilterState, KalmanFilter
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs


def fitted_to_samples(
    model: nn.Module | AdapterModel, samples: Mapping[str, Tensor], config: KalmanConfig | None, inputs: Inputs | None
) -> tuple[KalmanFilter, FilterState]:
    """The filter, and its state with the moments of the draws; see ``Posterior.from_samples``."""
    kf = KalmanFilter(model, config)
    if kf.config.noise_variance == "estimated":
        raise ValueError("`noise_variance` must be a number, since the samples do not hold it, got 'estimated'.")
    draws = _flat_draws(kf.adapter, samples)
    prior = kf.init(inputs)
    if not prior.prior_is_scaled:
        raise ValueError(
            "`inputs` must be given, since the prior takes its scale from them (`initial_variance` with `bound_prior` "
            "False does not), got None."
        )
    return kf, prior._replace(belief=moment_matched(prior.belief, draws))


def _flat_draws(adapter: AdapterModel, samples: Mapping[str, Tensor]) -> Tensor:
    """The draws, (S, n)."""
    parts: list[Tensor] = []
    for name, shape, size in zip(adapter.names, adapter.shapes, adapter.sizes, strict=True):
        if name not in samples:
            raise ValueError(f"`samples` must hold every trainable tensor, got none for {name!r}.")
        draws = samples[name].detach()
        count = len(parts[0]) if parts else len(draws)
        if len(draws) != count or draws.numel() != count * size:
            wanted = (count, *shape)
            raise ValueError(f"`samples` must have shape {wanted} for {name!r}, got {tuple(draws.shape)}.")
        if not bool(torch.isfinite(draws).all()):
            raise ValueError(f"`samples` must be finite, got NaN or infinity in {name!r}.")
        parts.append(draws.reshape(count, size).to(adapter.device, adapter.dtype))
    return torch.cat(parts, 1)
