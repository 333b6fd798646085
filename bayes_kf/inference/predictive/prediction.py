"""What a posterior says about inputs: probabilities, draws, and how uncertain they are and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from bayes_kf.inference.covariance.gaussian_sampling import semidefinite
from bayes_kf.models.likelihood import Gaussian, Likelihood

METHODS = ("linearized", "probit", "sampled", "mean")


@dataclass(frozen=True, repr=False)
class Prediction:
    """Predictions for B examples of m outputs.

    Attributes:
        mean: predictive mean of the observed quantity: class probabilities, probabilities of a one, real values or
            rates, (B, m).
        probs: ``mean`` again for categorical and Bernoulli likelihoods; None for regression and counts.
        samples: draws of the mean parameter under the posterior, (S, B, m); None for "mean" and "probit".
        variance: predictive variance of the target, (B, m), aleatoric plus epistemic; None for classification.
        entropy: total predictive entropy in nats, (B,), summed over the answers of a Bernoulli likelihood; of the
            predictive Gaussian for regression (with "sampled", of its outputs taken one by one); None for counts.
        aleatoric: classification: mean entropy over draws, (B,), in nats, None without draws. Otherwise the mean of
            the noise variances, (B, m).
        epistemic: classification: entropy − aleatoric (mutual information), (B,). Otherwise the variance of the
            means, (B, m).
        log_prob: log predictive density of the targets, (B,); None where no targets were given.
    """

    mean: Tensor
    probs: Tensor | None = None
    samples: Tensor | None = None
    variance: Tensor | None = None
    entropy: Tensor | None = None
    aleatoric: Tensor | None = None
    epistemic: Tensor | None = None
    log_prob: Tensor | None = None

    def __repr__(self) -> str:
        known = {field.name: getattr(self, field.name) for field in fields(self)}
        shown = ", ".join(f"{name} {tuple(value.shape)}" for name, value in known.items() if value is not None)
        return f"{type(self).__name__}({shown})"


@dataclass(frozen=True, repr=False)
class LoaderPrediction(Prediction):
    """Predictions for a whole loader, on the CPU, with the targets met on the way (None where there were none)."""

    targets: Tensor | None = None


def point(family: Likelihood, outputs: Tensor, targets: Tensor | None) -> Prediction:
    """The prediction of one parameter vector: no epistemic part. ``outputs`` (B, m)."""
    mean = family.mean(outputs)
    log_prob = None if targets is None else family.log_prob(outputs, targets)
    if family.name in ("categorical", "bernoulli"):
        return Prediction(mean, mean, entropy=_entropy(family, mean), log_prob=log_prob)
    noise_var = _noise_variance(family, mean)
    return _regression(family, mean, noise_var, torch.zeros_like(mean), None, log_prob)


def gaussian_moments(
    family: Gaussian, outputs: Tensor, output_cov: Tensor, samples: Tensor | None, targets: Tensor | None
) -> Prediction:
    """Exact prediction of a Gaussian likelihood from η ~ N(outputs, output_cov); (B, m) and (B, m, m)."""
    noise_var = _noise_variance(family, outputs)
    total = semidefinite(output_cov.double()) + torch.diag_embed(noise_var.double())
    normal = torch.distributions.MultivariateNormal(outputs.double(), total, validate_args=False)
    log_prob = None if targets is None else normal.log_prob(targets.double()).to(outputs.dtype)
    spread = output_cov.diagonal(dim1=1, dim2=2).to(outputs.dtype)
    found = _regression(family, outputs, noise_var, spread, samples, log_prob)
    return replace(found, entropy=normal.entropy().to(outputs.dtype))


def probit(family: Likelihood, outputs: Tensor, output_cov: Tensor, targets: Tensor | None) -> Prediction:
    """MacKay's approximation: η/√(1 + πv/8) in place of η, v its variance. (B, m), (B, m, m).

    Of classes, the log odds of each against the rest in place of η, and probabilities normalized (ours): MacKay's own
    for two classes. What all outputs have in common, which softmax does not see and no data teach, has no part in it.
    """
    if family.name == "categorical":
        odds, variance = _against_the_rest(outputs.double(), output_cov.double())
        scaled = torch.nn.functional.logsigmoid(odds / (1.0 + math.pi / 8.0 * variance).sqrt())
        return point(family, scaled.to(outputs.dtype), targets)
    variance = output_cov.diagonal(dim1=1, dim2=2)
    return point(family, outputs / (1.0 + math.pi / 8.0 * variance).sqrt(), targets)


def _against_the_rest(outputs: Tensor, output_cov: Tensor) -> tuple[Tensor, Tensor]:
    """Log odds ζ_c = η_c − log Σ_{j≠c} exp η_j of each class, and their variance to first order, (B, m) each.

    With the slope e_c − s, s the others' shares of the rest, as sums over all classes; the likeliest class by itself,
    whose rest would be lost in rounding.
    """
    log_probs = outputs.log_softmax(1)
    probs, variance = log_probs.exp(), output_cov.diagonal(dim1=1, dim2=2)
    pulled = (output_cov @ probs.unsqueeze(-1)).squeeze(-1)
    rest = 1.0 - probs
    across = (pulled - probs * variance) / rest  # eᵀCs
    within = ((probs * pulled).sum(1, keepdim=True) - 2.0 * probs * pulled + probs.square() * variance) / rest.square()
    odds, spread = log_probs - rest.log(), variance - 2.0 * across + within
    top = outputs.argmax(1, keepdim=True)
    others = outputs.scatter(1, top, -math.inf)
    shares = others.softmax(1)
    seen = (output_cov @ shares.unsqueeze(-1)).squeeze(-1)
    of_top = variance.gather(1, top) - 2.0 * seen.gather(1, top) + (shares * seen).sum(1, keepdim=True)
    odds = odds.scatter(1, top, outputs.gather(1, top) - others.logsumexp(1, keepdim=True))
    return odds, spread.scatter(1, top, of_top).clamp_min(0.0)


def mixture(family: Likelihood, outputs: Tensor, targets: Tensor | None) -> Prediction:
    """The prediction of S equally likely outputs, (S, B, m)."""
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


def noise_by_example(num_samples: int, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Standard normal noise (S, B, m) for outputs of ``shape`` (B, m), drawn for one example after the other.

    So an example's noise depends on how many stand before it, not on how they are divided into batches or pieces.
    """
    size, num_outputs = shape

    def one() -> Tensor:
        return torch.randn(
            (num_samples, num_outputs), generator=generator, dtype=torch.float64, device=generator.device
        )

    return torch.stack([one() for _ in range(size)], 1)


def disagreement(family: Likelihood, first: Prediction, second: Prediction) -> tuple[float, float]:
    """How far two predictions of the same inputs lie apart, and how far Monte Carlo error alone would put them.

    For classifiers the total variation ½ Σ|p − p'|, else the difference of the means in standard deviations of the
    first prediction's target; averaged over examples (and outputs).

    Args:
        family: the likelihood.
        first: with ``samples``.
        second: with ``samples``, independent of the first's.
    """
    draws = [p.samples.double() for p in (first, second) if p.samples is not None]  # both are drawn
    means, errors = [d.mean(0) for d in draws], [d.var(0) / len(d) for d in draws]
    apart, expected = (means[0] - means[1]).abs(), math.sqrt(2.0 / math.pi) * (errors[0] + errors[1]).sqrt()
    if family.name == "categorical":
        return 0.5 * float(apart.sum(1).mean()), 0.5 * float(expected.sum(1).mean())
    if first.variance is None:  # Bernoulli
        return float(apart.mean()), float(expected.mean())
    unit = first.variance.double().sqrt()
    return float((apart / unit).mean()), float((expected / unit).mean())


def average(family: Likelihood, parts: Sequence[Prediction], weights: Sequence[float]) -> Prediction:
    """The mixture of several predictions of the same inputs; weights sum to one. Draws are not kept."""
    mean, shares = _mixed([p.mean for p in parts], weights), torch.tensor(weights, dtype=torch.float64)
    log_prob = None
    if parts[0].log_prob is not None:
        each = torch.stack([p.log_prob.double() for p in parts])  # type: ignore[union-attr]  # all or none
        log_prob = (each + shares.log().to(each)[:, None]).logsumexp(0).to(mean)
    if family.name in ("categorical", "bernoulli"):
        total, aleatoric = _entropy(family, mean), None
        if all(p.aleatoric is not None for p in parts):
            aleatoric = _mixed([p.aleatoric for p in parts], weights)
        epistemic = None if aleatoric is None else total - aleatoric
        return Prediction(mean, mean, None, None, total, aleatoric, epistemic, log_prob)
    noise_var = _mixed([p.aleatoric for p in parts], weights)
    spread = _mixed([p.epistemic + (p.mean - mean).square() for p in parts], weights)  # type: ignore[operator]
    return _regression(family, mean, noise_var, spread, None, log_prob)


def _mixed(tensors: Sequence[Tensor | None], weights: Sequence[float]) -> Tensor:
    return torch.stack([w * t for w, t in zip(weights, tensors, strict=True) if t is not None]).sum(0)


def concatenate(parts: Sequence[Prediction]) -> Prediction:
    """One prediction from those of consecutive batches, of the kind of the first."""
    joined: dict[str, Any] = {}
    for field in fields(parts[0]):
        values = [getattr(part, field.name) for part in parts]
        dim = 1 if field.name == "samples" else 0
        joined[field.name] = None if any(v is None for v in values) else torch.cat(values, dim)
    return type(parts[0])(**joined)


def _entropy(family: Likelihood, probs: Tensor) -> Tensor:
    """Entropy in nats over the last dimension, (..., B)."""
    if family.name == "bernoulli":
        return (torch.special.entr(probs) + torch.special.entr(1.0 - probs)).sum(-1)
    return torch.special.entr(probs).sum(-1)


def _noise_variance(family: Likelihood, mean: Tensor) -> Tensor:
    """The variance of y given the mean parameter of a regression likelihood: σ², or the rate of a Poisson."""
    return family.noise_variance.to(mean).expand_as(mean) if isinstance(family, Gaussian) else mean


def _regression(
    family: Likelihood, mean: Tensor, noise_var: Tensor, spread: Tensor, samples: Tensor | None, log_prob: Tensor | None
) -> Prediction:
    variance = noise_var + spread
    entropy = 0.5 * (2 * math.pi * math.e * variance).log().sum(-1) if isinstance(family, Gaussian) else None
    return Prediction(mean, None, samples, variance, entropy, noise_var, spread, log_prob)
