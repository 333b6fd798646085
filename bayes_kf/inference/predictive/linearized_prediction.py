"""Predictions of the linearized model, whose outputs are η ~ N(f(x, μ), J P Jᵀ).

There are two ways to draw η. One forms the covariance J P Jᵀ of the outputs, by backward passes. The other draws
δ ~ N(0, P) and takes f ± Jδ, by a forward pass for each δ; it is cheaper if there are more outputs than draws.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bayes_kf.inference.covariance.gaussian_sampling import gaussian_draws, normal_draws_by_example
from bayes_kf.inference.linearization.shared_batch import Linearized
from bayes_kf.inference.measurement_model.output_directions import MAX_EXACT_OUTPUTS
from bayes_kf.inference.predictive import predictive_distributions
from bayes_kf.inference.predictive.gaussian_posterior import GaussianPosterior
from bayes_kf.inference.predictive.prediction import Prediction
from bayes_kf.inference.predictive.targets.target_distribution import TargetDistribution
from bayes_kf.models.batch import Batch
from bayes_kf.models.batched_forward import finite_difference_jvps
from bayes_kf.models.likelihood import Likelihood, Poisson, RealLikelihood


def predict_from_covariance(
    posterior: GaussianPosterior, batch: Batch, method: str, num_samples: int, generator: torch.Generator
) -> Prediction:
    """The prediction by "linearized" or "probit" from J P Jᵀ, for a batch that fits in memory."""
    family = posterior.likelihood
    linearized = posterior.kf.linearize(posterior.mean_vector, batch)
    outputs = posterior.scaled_logits(linearized.outputs)
    targets = check_targets(family, outputs, batch.targets)
    covariance = output_covariance(posterior, linearized)
    output_cov = posterior.temperature / posterior.softmax_temperature**2 * covariance
    if method == "probit" and not isinstance(family, RealLikelihood):
        return predictive_distributions.probit(family, outputs, output_cov.to(outputs.dtype), targets)
    draws = None
    if method == "linearized":
        normal = normal_draws_by_example(num_samples, outputs.shape, generator)
        draws = gaussian_draws(outputs, output_cov, num_samples, generator, normal)
    if isinstance(family, RealLikelihood):
        return predictive_distributions.from_gaussian(family, outputs, output_cov, draws, targets)
    assert draws is not None
    prediction = predictive_distributions.from_draws(family, draws, targets)
    if not isinstance(family, Poisson):
        return prediction
    return replace(prediction, distribution=TargetDistribution.of_gaussian(family, outputs, output_cov))


def predict_from_parameter_draws(
    posterior: GaussianPosterior, batch: Batch, num_samples: int, generator: torch.Generator
) -> Prediction:
    """The prediction by "linearized" from outputs f ± Jδ, δ ~ N(0, temperature·P); J P Jᵀ is not formed."""
    family = posterior.likelihood
    outputs = posterior.adapter.outputs(posterior.mean_vector, batch.inputs)
    deviations = output_deviations(posterior, batch, -(-num_samples // 2), generator, posterior.temperature)
    draws = posterior.scaled_logits(outputs + torch.cat([deviations, -deviations])[:num_samples])
    return predictive_distributions.from_draws(family, draws, check_targets(family, outputs, batch.targets))


def parameter_draws_are_cheaper(posterior: GaussianPosterior, batch: Batch, num_samples: int) -> bool:
    """Whether S draws of the outputs take fewer passes from draws of the parameters than from J P Jᵀ."""
    if isinstance(posterior.likelihood, RealLikelihood) or not posterior.adapter.is_precise:
        return False
    passes = posterior.kf.linearize.num_backward_passes(posterior.mean_vector, batch)
    return num_samples < passes or posterior.kf.linearize.num_outputs > MAX_EXACT_OUTPUTS


def output_deviations(
    posterior: GaussianPosterior,
    batch: Batch,
    num_draws: int,
    generator: torch.Generator,
    temperature: float = 1.0,
) -> Tensor:
    """Jδ for draws δ ~ N(0, temperature·P), (S, B, m)."""
    steps = posterior.sample_deviations(num_draws, generator, temperature)
    at_once = posterior.adapters_at_once(batch)
    return finite_difference_jvps(posterior.adapter, posterior.mean_vector, steps, batch.inputs, at_once)


def output_covariance(posterior: GaussianPosterior, linearized: Linearized) -> Tensor:
    """J P Jᵀ of each example, (B, m, m), without the temperature."""
    return posterior.state.belief.output_covariance(linearized.jacobian())


def check_targets(family: Likelihood, outputs: Tensor, targets: Tensor | None) -> Tensor | None:
    """Targets in the likelihood's own form; None if there are none."""
    return None if targets is None else family.check(outputs, targets)


def required_targets(family: Likelihood, outputs: Tensor, batch: Batch) -> Tensor:
    """Targets of a batch in the likelihood's own form; the batch has them."""
    assert batch.targets is not None  # checked when the loader yielded it
    return family.check(outputs, batch.targets)
