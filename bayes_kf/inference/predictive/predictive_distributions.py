"""The predictive distribution of a target, from a point, a Gaussian or draws of the outputs η = f(x, θ)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_kf.inference.covariance.gaussian_sampling import semidefinite
from bayes_kf.inference.predictive.prediction import Prediction
from bayes_kf.models.likelihood import Gaussian, Likelihood


def from_point(family: Likelihood, outputs: Tensor, targets: Tensor | None) -> Prediction:
    """The prediction p(y | η) of outputs (B, m); it has no epistemic part."""
    mean = family.mean(outputs)
    log_prob = None if targets is None else family.log_prob(outputs, targets)
    if family.name in ("categorical", "bernoulli"):
        return Prediction(mean, mean, entropy=_entropy(family, mean), log_prob=log_prob)
    noise_var = _noise_variance(family, mean)
    return _regression(family, mean, noise_var, torch.zeros_like(mean), None, log_prob)


def from_gaussian(
    family: Gaussian, outputs: Tensor, output_cov: Tensor, samples: Tensor | None, targets: Tensor | None
) -> Prediction:
    """The exact prediction N(y; f, C + σ²I) of a Gaussian likelihood and η ~ N(f, C).

    Args:
        family: the likelihood.
        outputs: f, (B, m).
        output_cov: C, (B, m, m).
        samples: draws of η, (S, B, m), which the prediction carries along.
        targets: (B, m).
    """
    noise_var = _noise_variance(family, outputs)
    total = semidefinite(output_cov.double()) + torch.diag_embed(noise_var.double())
    normal = torch.distributions.MultivariateNormal(outputs.double(), total, validate_args=False)
    log_prob = None if targets is None else normal.log_prob(targets.double()).to(outputs.dtype)
    epistemic = output_cov.diagonal(dim1=1, dim2=2).to(outputs.dtype)
    prediction = _regression(family, outputs, noise_var, epistemic, samples, log_prob)
    return replace(prediction, entropy=normal.entropy().to(outputs.dtype))


def from_draws(family: Likelihood, outputs: Tensor, targets: Tensor | None) -> Prediction:
    """The mixture of p(y | η) over S equally likely draws of η, (S, B, m)."""
    samples = family.mean(outputs)
    mean = samples.mean(0)
    log_prob = None
    if targets is not None:
        log_prob = family.log_prob(outputs, targets).logsumexp(0) - math.log(len(outputs))
    if family.name in ("categorical", "bernoulli"):
        total, aleatoric = _entropy(family, mean), _entropy(family, samples).mean(0)
        return Prediction(mean, mean, samples, None, total, aleatoric, total - aleatoric, log_prob)
    noise_var = _noise_variance(family, samples).mean(0)
    return _regression(family, mean, noise_var, samples.var(0, correction=0), samples, log_prob)


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
    if family.name in ("categorical", "bernoulli"):
        total, aleatoric = _entropy(family, mean), None
        if all(p.aleatoric is not None for p in parts):
            aleatoric = _weighted_sum([p.aleatoric for p in parts], weights)
        epistemic = None if aleatoric is None else total - aleatoric
        return Prediction(mean, mean, None, None, total, aleatoric, epistemic, log_prob)
    noise_var = _weighted_sum([p.aleatoric for p in parts], weights)
    epistemic = _weighted_sum([p.epistemic + (p.mean - mean).square() for p in parts], weights)  # type: ignore[operator]
    return _regression(family, mean, noise_var, epistemic, None, log_prob)


def _weighted_sum(tensors: Sequence[Tensor | None], weights: Sequence[float]) -> Tensor:
    return torch.stack([w * t for w, t in zip(weights, tensors, strict=True) if t is not None]).sum(0)


def _entropy(family: Likelihood, probs: Tensor) -> Tensor:
    """Entropy in nats over the last dimension, (..., B)."""
    if family.name == "bernoulli":
        return (torch.special.entr(probs) + torch.special.entr(1.0 - probs)).sum(-1)
    return torch.special.entr(probs).sum(-1)


def _noise_variance(family: Likelihood, mean: Tensor) -> Tensor:
    """Var(y | mean) of a regression likelihood: σ², or the rate of a Poisson; shape of ``mean``."""
    return family.noise_variance.to(mean).expand_as(mean) if isinstance(family, Gaussian) else mean


def _regression(
    family: Likelihood,
    mean: Tensor,
    noise_var: Tensor,
    epistemic: Tensor,
    samples: Tensor | None,
    log_prob: Tensor | None,
) -> Prediction:
    """The prediction of a regression likelihood: variances (B, m) add up; the outputs count as independent."""
    variance = noise_var + epistemic
    entropy = 0.5 * (2 * math.pi * math.e * variance).log().sum(-1) if isinstance(family, Gaussian) else None
    return Prediction(mean, None, samples, variance, entropy, noise_var, epistemic, log_prob)
