"""The priors of a user's Pyro model, read by running it, after checks that the filter can stand for the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bayes_kf.inference.covariance.diagonal import DiagonalGaussian
from bayes_kf.inference.measurement_model import noise
from bayes_kf.inference.pyro.kalman_guide import KalmanGuide
from bayes_kf.inference.pyro.kalman_model import KalmanModel
from bayes_kf.inference.pyro.site_priors import NORMAL, ModelSites, SitePrior, differing_site, run_model
from bayes_kf.models.batch import Inputs

LIKELIHOOD_RTOL = 1e-3  # of log p(y | θ) between the model and the filter, which may round differently
PRIOR_RTOL = 1e-5  # between the model's prior and that under which a guide has learned
NEEDED = {"forgetting": 1.0, "drift_variance": 0.0, "prior_pull": 0.0, "gradient_penalty": 0.0}
"""The values at which a belief is its prior times the data, so that a term of the prior can be replaced."""


def read_priors(
    model: Callable[..., Any], guide: KalmanGuide, inputs: Inputs, targets: Tensor, num_data: int | None
) -> list[SitePrior]:
    """The prior of every tensor, in the adapter's order.

    The model runs twice with the batch, without a change of PyTorch's random state. Both runs must show the same priors
    (they may not depend on drawn values), and the log density of the targets that the filter's likelihood has.

    Args:
        model: the user's.
        guide: it has the adapter, the likelihood and its noise.
        inputs: the first batch.
        targets: its targets.
        num_data: passed to the model if it is given.

    Raises:
        ValueError: if the model does not fit.
    """
    if isinstance(model, KalmanModel):  # its sites are tempered, the filter's prior is not
        prior = model.posterior(inputs).state.prior
        means, sds = guide.adapter.unflatten(prior.mean), guide.adapter.unflatten(prior.variance.sqrt())
        return [SitePrior(name, NORMAL, mean, sds[name]) for name, mean in means.items()]
    kwargs = {} if num_data is None else {"num_data": num_data}
    device = guide.adapter.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        runs = [run_model(model, guide.adapter, inputs, targets, **kwargs) for _ in range(2)]
    priors = runs[0].priors
    changed = differing_site(priors, runs[1].priors)
    if changed is not None:
        raise ValueError(f"`model` must have priors that do not depend on other sites, got one that does: {changed!r}.")
    for run in runs:
        _check_likelihood(guide, run, inputs, targets, num_data)
    local = [prior for prior in priors if prior.family != NORMAL]
    wrong = [name for name, value in NEEDED.items() if getattr(guide.config, name) != value]
    if local and wrong:
        raise ValueError(
            f"`{wrong[0]}` must be {NEEDED[wrong[0]]:g} with a prior by local Gaussian terms ({local[0].family} of "
            f"{local[0].name!r}), got {getattr(guide.config, wrong[0])!r}."
        )
    return priors


def check_prior(priors: Sequence[SitePrior], prior: DiagonalGaussian) -> None:
    """Raise ValueError if a Normal prior is not the one under which a guide has learned; local terms change."""
    sizes = [p.mean.numel() for p in priors]
    parts = zip(priors, prior.mean.split(sizes), prior.variance.split(sizes), strict=True)
    for site, mean, variance in parts:
        pairs = ((site.mean, mean), (site.scale.square(), variance))
        if site.family == NORMAL and not all(
            torch.allclose(one.reshape(-1), two, rtol=PRIOR_RTOL, atol=0.0) for one, two in pairs
        ):
            raise ValueError(
                f"`model` must have the priors under which the guide has learned, got another one for {site.name!r}."
            )


def _check_likelihood(
    guide: KalmanGuide, run: ModelSites, inputs: Inputs, targets: Tensor, num_data: int | None
) -> None:
    """Raise ValueError if the filter gives the targets another density than the model does."""
    adapter, config = guide.adapter, guide.config
    allowed = (1.0, 1.0 if num_data is None else num_data / len(targets))
    if not any(math.isclose(run.scale, scale, rel_tol=1e-6) for scale in allowed):
        raise ValueError(f"`model` must not scale the observed site, got a factor of {run.scale:g}.")
    family = noise.likelihood(config.noise_settings, guide.state.noise)
    outputs = adapter.outputs(run.values, inputs)
    targets = family.check(outputs, targets.to(outputs.device))
    expected = float(family.log_prob(outputs, targets).double().sum())
    if abs(run.log_prob - expected) > LIKELIHOOD_RTOL * max(abs(expected), len(targets)):
        raise ValueError(
            f"`model` must have the `likelihood` of the config, {config.likelihood!r} (`noise_variance` "
            f"{config.noise_variance}), given the module's outputs, got log p(y | θ) = {run.log_prob:.6g} where the "
            f"filter has {expected:.6g}; `guide.model.observe` makes the same site."
        )
