"""The predictive distribution of a target, from a point, a Gaussian or draws of the outputs η = f(x, θ)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_kf.inference.covariance.gaussian_sampling import semidefinite
from bayes_kf.inference.measurement_model import predictive_density
from bayes_kf.inference.predictive.prediction import Prediction
from bayes_kf.inference.predictive.targets.target_distribution import TargetDistribution
from bayes_kf.inference.predictive.targets.target_mixture import TargetMixture
from bayes_kf.models.likelihood import (
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
    RealLikelihood,
    RegressionLikelihood,
)


def from_point(family: Likelihood, outputs: Tensor, targets: Tensor | None) -> Prediction:
    """The prediction p(y | η) of outputs (B, m); it has no epistemic part."""
    mean = family.mean(outputs)
    log_prob = None if targets is None else family.log_prob(outputs, targets)
    if family.target_kind == "class":
        return Prediction(mean, mean, entropy=_entropy(family, mean), log_prob=log_prob)
    regression = as_regression(family)
    noise_var, exact = regression.target_variance(outputs), TargetDistribution(regression, outputs[None])
    return _regression(family, mean, noise_var, torch.zeros_like(mean), None, log_prob, exact)


def from_gaussian(
    family: RealLikelihood, outputs: Tensor, output_cov: Tensor, samples: Tensor | None, targets: Tensor | None
) -> Prediction:
    """The prediction of real targets with η ~ N(f, C), with exact moments.

    Gaussian noise: N(y; f, C + σ²I). Student-t noise has the mean f and the variance C + σ²ν/(ν−2). Heteroscedastic
    noise has the variance of the mean plus E exp s = exp(f_s + C_ss/2). The log densities of these two are those of
    ``predictive_density``: quadrature for one target an example, quasi-random draws for more.

    Args:
        family: the likelihood.
        outputs: f, (B, outputs).
        output_cov: C, (B, outputs, outputs).
        samples: draws of η, (S, B, outputs), whose means the prediction carries along.
        targets: (B, m).
    """
    distribution = TargetDistribution.of_gaussian(family, outputs, output_cov)
    if not isinstance(family, Gaussian):
        return _from_other_noise(family, outputs, output_cov, samples, targets, distribution)
    noise_var = family.target_variance(outputs)
    total = semidefinite(output_cov.double()) + torch.diag_embed(noise_var.double())
    normal = torch.distributions.MultivariateNormal(outputs.double(), total, validate_args=False)
    log_prob = None if targets is None else normal.log_prob(targets.double()).to(outputs.dtype)
    epistemic = output_cov.diagonal(dim1=1, dim2=2).to(outputs.dtype)
    prediction = _regression(family, outputs, noise_var, epistemic, samples, log_prob, distribution)
    return replace(prediction, entropy=normal.entropy().to(outputs.dtype))


def _from_other_noise(
    family: RealLikelihood,
    outputs: Tensor,
    output_cov: Tensor,
    samples: Tensor | None,
    targets: Tensor | None,
    distribution: TargetDistribution,
) -> Prediction:
    """The prediction of real targets whose noise is not Gaussian of one variance; arguments as above."""
    log_prob = None
    if targets is not None:
        log_prob = -predictive_density.log_loss(family, outputs, output_cov, targets, (1.0,))[0].to(outputs.dtype)
    variances = output_cov.diagonal(dim1=1, dim2=2).to(outputs.dtype)
    shifted = outputs
    if isinstance(family, HeteroscedasticGaussian):  # E exp s of a Gaussian s
        shifted = outputs + 0.5 * variances
    means, draws = family.mean(outputs), None if samples is None else family.mean(samples)
    noise_var, epistemic = family.target_variance(shifted), family.mean(variances)
    return _regression(family, means, noise_var, epistemic, draws, log_prob, distribution)


def from_draws(family: Likelihood, outputs: Tensor, targets: Tensor | None) -> Prediction:
    """The mixture of p(y | η) over S equally likely draws of η, (S, B, m)."""
    samples = family.mean(outputs)
    mean = samples.mean(0)
    log_prob = None
    if targets is not None:
        log_prob = family.log_prob(outputs, targets).logsumexp(0) - math.log(len(outputs))
    if family.target_kind == "class":
        total, aleatoric = _entropy(family, mean), _entropy(family, samples).mean(0)
        return Prediction(mean, mean, samples, None, total, aleatoric, total - aleatoric, log_prob)
    regression = as_regression(family)
    noise_var, average = regression.target_variance(outputs).mean(0), TargetDistribution(regression, outputs)
    return _regression(family, mean, noise_var, samples.var(0, correction=0), samples, log_prob, average)


def probit(family: Likelihood, outputs: Tensor, output_cov: Tensor, targets: Tensor | None) -> Prediction:
    """MacKay's approximation: p(y | η/√(1 + πv/8)) for η with mean f (B, m) and variance v, of covariance (B, m, m).

    For classes, η is the log odds of a class against all others, and the probabilities are normalized (ours); for two
    classes this is MacKay's formula. A shift of all outputs, which softmax ignores, has no effect.
    """
    if family.name == "categorical":
        odds, variance = _one_against_rest(outputs.double(), output_cov.double())
        scaled = F.logsigmoid(odds / (1.0 + math.pi / 8.0 * variance).sqrt())
        return from_point(family, scaled.to(outputs.dtype), targets)
    variance = output_cov.diagonal(dim1=1, dim2=2)
    return from_point(family, outputs / (1.0 + math.pi / 8.0 * variance).sqrt(), targets)


def _one_against_rest(outputs: Tensor, output_cov: Tensor) -> tuple[Tensor, Tensor]:
    """Log odds ζ_c = η_c − log Σ_{j≠c} exp η_j of each class, and their first-order variance, (B, m) each.

    The slope of ζ_c is e_c − s with s_j = p_j / (1 − p_c). The sums run over all classes, less the class itself. The
    most probable class is computed apart: 1 − p_c would be lost in rounding.
    """
    log_probs = outputs.log_softmax(1)
    probs, variance = log_probs.exp(), output_cov.diagonal(dim1=1, dim2=2)
    product = (output_cov @ probs.unsqueeze(-1)).squeeze(-1)  # C p
    rest = 1.0 - probs
    across = (product - probs * variance) / rest  # eᵀCs
    within = (
        (probs * product).sum(1, keepdim=True) - 2.0 * probs * product + probs.square() * variance
    ) / rest.square()  # sᵀCs
    odds, odds_var = log_probs - rest.log(), variance - 2.0 * across + within
    top = outputs.argmax(1, keepdim=True)
    others = outputs.scatter(1, top, -math.inf)
    shares = others.softmax(1)
    product = (output_cov @ shares.unsqueeze(-1)).squeeze(-1)  # C s
    top_var = variance.gather(1, top) - 2.0 * product.gather(1, top) + (shares * product).sum(1, keepdim=True)
    odds = odds.scatter(1, top, outputs.gather(1, top) - others.logsumexp(1, keepdim=True))
    return odds, odds_var.scatter(1, top, top_var).clamp_min(0.0)


def average(family: Likelihood, parts: Sequence[Prediction], weights: Sequence[float]) -> Prediction:
    """The mixture of several predictions of the same inputs; the weights sum to one. It has no samples."""
    mean = _weighted_sum([p.mean for p in parts], weights)
    shares = torch.tensor(weights, dtype=torch.float64)
    log_prob = None
    if parts[0].log_prob is not None:
        log_probs = torch.stack([p.log_prob.double() for p in parts])  # type: ignore[union-attr]  # all or none
        log_prob = (log_probs + shares.log().to(log_probs)[:, None]).logsumexp(0).to(mean)
    if parts[0].probs is not None:
        total, aleatoric = _entropy(family, mean), None
        if all(p.aleatoric is not None for p in parts):
            aleatoric = _weighted_sum([p.aleatoric for p in parts], weights)
        epistemic = None if aleatoric is None else total - aleatoric
        return Prediction(mean, mean, None, None, total, aleatoric, epistemic, log_prob)
    noise_var = _weighted_sum([p.aleatoric for p in parts], weights)
    epistemic = _weighted_sum([p.epistemic + (p.mean - mean).square() for p in parts], weights)  # type: ignore[operator]
    known = tuple(p.distribution for p in parts if isinstance(p.distribution, TargetDistribution))
    mixture = TargetMixture(known, tuple(weights)) if len(known) == len(parts) else None
    return _regression(family, mean, noise_var, epistemic, None, log_prob, mixture)


def _weighted_sum(tensors: Sequence[Tensor | None], weights: Sequence[float]) -> Tensor:
    return torch.stack([w * t for w, t in zip(weights, tensors, strict=True) if t is not None]).sum(0)


def _entropy(family: Likelihood, probs: Tensor) -> Tensor:
    """Entropy in nats over the last dimension, (..., B)."""
    if family.name == "bernoulli":
        return (torch.special.entr(probs) + torch.special.entr(1.0 - probs)).sum(-1)
    return torch.special.entr(probs).sum(-1)


def as_regression(family: Likelihood) -> RegressionLikelihood:
    """The likelihood itself, whose targets are known to be numbers."""
    assert isinstance(family, RegressionLikelihood)
    return family


def _regression(
    family: Likelihood,
    mean: Tensor,
    noise_var: Tensor,
    epistemic: Tensor,
    samples: Tensor | None,
    log_prob: Tensor | None,
    distribution: TargetDistribution | TargetMixture | None,
) -> Prediction:
    """The prediction of a regression likelihood: variances (B, m) add up; the outputs count as independent."""
    variance = noise_var + epistemic
    entropy = 0.5 * (2 * math.pi * math.e * variance).log().sum(-1) if isinstance(family, Gaussian) else None
    return Prediction(mean, None, samples, variance, entropy, noise_var, epistemic, log_prob, distribution)
