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
    draws = flat_draws(kf.adapter, samples)
    prior = kf.init(inputs)
    if not prior.prior_is_scaled:
        raise ValueError(
            "`inputs` must be given, since the prior takes its scale from them (`initial_variance` with `bound_prior` "
            "False does not), got None."
        )
    return kf, prior._replace(belief=moment_matched(prior.belief, draws))


def flat_draws(adapter: AdapterModel, samples: Mapping[str, Tensor]) -> Tensor:
    """The draws of all tensors, (S, n), of tensor name -> (S, ...).

    Raises:
        ValueError: if a tensor is missing, has another shape or is not finite.
    """
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


def divided_by_member(samples: Mapping[str, Tensor], count: int) -> list[tuple[dict[str, Tensor], float]]:
    """The draws of each of ``count`` members, by the site ``member``, and its share of all draws.

    Raises:
        ValueError: if there is no such site, a number is none of a member, or a member has no draws.
    """
    if "member" not in samples:
        raise ValueError("`samples` must hold 'member', the number of each draw's member, got no such site.")
    numbers = samples["member"].reshape(-1)
    present = torch.bincount(numbers.clamp(0, count), minlength=count + 1).tolist()
    if bool((numbers < 0).any()) or present[count]:
        low, high = int(numbers.min()), int(numbers.max())
        raise ValueError(f"`samples` must have numbers of {count} members in 'member', got {low} to {high}.")
    missing = [k for k in range(count) if not present[k]]
    if missing:
        raise ValueError(f"`samples` must hold draws of every member, got none of number {missing[0]}.")
    others = {name: draws for name, draws in samples.items() if name != "member" and len(draws) == len(numbers)}
    return [
        ({name: draws[numbers == k] for name, draws in others.items()}, present[k] / len(numbers)) for k in range(count)
    ]
