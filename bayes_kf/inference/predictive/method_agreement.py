"""Whether predictions from drawn adapters agree with those of the linearized model."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import torch

from bayes_kf.inference.predictive.gaussian_posterior import GaussianPosterior
from bayes_kf.inference.predictive.linearized_prediction import predict_from_covariance
from bayes_kf.inference.predictive.prediction import Prediction
from bayes_kf.models.batch import Batch
from bayes_kf.models.likelihood import ONE_OF_CLASSES, Likelihood, RealLikelihood

MAX_EXAMPLES = 16  # the first examples of a batch are compared
MIN_DRAWS = 8  # with fewer draws nothing is compared
MAX_ERRORS = 3.0  # multiples of the Monte Carlo error that are not reported
MIN_DISTANCE = 0.05  # in total variation or standard deviations; a smaller one is not reported


def warn_if_methods_disagree(posterior: GaussianPosterior, batch: Batch, sampled: Prediction, stacklevel: int) -> None:
    """Warn if predictions from drawn adapters differ from linearized ones by more than Monte Carlo error.

    Args:
        posterior: the posterior that predicts.
        batch: the examples.
        sampled: its prediction by "sampled".
        stacklevel: of the warning, as :func:`warnings.warn` takes it.
    """
    assert sampled.samples is not None  # "sampled" has draws
    num_samples, size = len(sampled.samples), min(MAX_EXAMPLES, batch.size)
    if num_samples < max(MIN_DRAWS, sampled.samples.shape[2]):  # linearized draws take a backward pass per output
        return
    some = Batch.of(batch.inputs)[:size]
    _, some = next(iter(posterior.kf.linearize.chunks(posterior.mean_vector, some)))  # those that fit in memory
    size = some.size
    generator = torch.Generator(device=posterior.adapter.device).manual_seed(posterior.config.seed + 1)
    linearized = predict_from_covariance(posterior, some, "linearized", num_samples, generator)
    variance = None if sampled.variance is None else sampled.variance[:size]
    first = replace(sampled, samples=sampled.samples[:, :size], variance=variance)
    family = posterior.likelihood
    if isinstance(family, RealLikelihood):  # the unit is the standard deviation of the linearized prediction
        first, linearized = linearized, first
    distance, error = prediction_distance(family, first, linearized)
    if distance > max(MAX_ERRORS * error, MIN_DISTANCE):
        unit = "standard deviations" if linearized.variance is not None else "total variation"
        warnings.warn(
            f"`method` 'sampled' and 'linearized' disagree: {distance:.3f} {unit} apart on {size} examples, where "
            f"Monte Carlo error makes {error:.3f}. The posterior is that of the linearized model: prefer 'linearized'.",
            stacklevel=stacklevel,
        )


def prediction_distance(family: Likelihood, first: Prediction, second: Prediction) -> tuple[float, float]:
    """Distance of two predictions of the same inputs, and the distance that Monte Carlo error alone causes.

    For classifiers this is the total variation ½ Σ|p − p'|. For other likelihoods it is the difference of the means, in
    standard deviations of the target under the first prediction. Both are averages over examples (and outputs).

    Args:
        family: the likelihood.
        first: with ``samples``.
        second: with ``samples``, independent of the first's.
    """
    draws = [p.samples.double() for p in (first, second) if p.samples is not None]  # both have samples
    means, variances = [d.mean(0) for d in draws], [d.var(0) / len(d) for d in draws]  # of the mean of S draws
    distance, error = (means[0] - means[1]).abs(), math.sqrt(2.0 / math.pi) * (variances[0] + variances[1]).sqrt()
    if family.name in ONE_OF_CLASSES:
        return 0.5 * float(distance.sum(1).mean()), 0.5 * float(error.sum(1).mean())
    if first.variance is None:  # Bernoulli
        return float(distance.mean()), float(error.mean())
    sd = first.variance.double().sqrt()
    return float((distance / sd).mean()), float((error / sd).mean())
