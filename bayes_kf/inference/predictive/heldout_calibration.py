"""The temperatures of a posterior, chosen by the log loss of held-out data.

The temperature is a factor on P. Held-out losses distinguish only large differences of it: if P is small against the
noise of the labels, they are almost the same at all temperatures. So the temperature is the one nearest to 1, where
predictions are those of P itself, whose loss is not clearly larger than the smallest. Ours.

P can only add uncertainty. If the mean alone is less confident than held-out data justify, the logits are divided by a
softmax temperature below 1 (temperature scaling, Guo et al. 2017). It is the most probable one under a normal prior on
its logarithm, with mean 0 and standard deviation 0.1. Above 1 it would repeat the effect of P, and if many labels are
wrong it would add uncertainty that P has added already. Prior and bound are ours.

An estimated σ² is estimated again, from the held-out residuals e ~ N(0, T·J P Jᵀ + σ²) at each temperature T.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from bayes_kf.inference.covariance.gaussian_sampling import semidefinite
from bayes_kf.inference.filtering.prequential_temperature import GRID, MAX_STANDARD_ERRORS, nearest_to_one
from bayes_kf.inference.measurement_model import noise, predictive_density
from bayes_kf.inference.predictive.gaussian_posterior import GaussianPosterior
from bayes_kf.inference.predictive.linearized_prediction import (
    output_covariance,
    output_deviations,
    parameter_draws_are_cheaper,
    required_targets,
)
from bayes_kf.models.batch import Batch, split_batch
from bayes_kf.models.likelihood import Categorical, Likelihood

NUM_DRAWS = 64  # parameter draws that stand for the covariance of more outputs than that
NOISE_COUNT = 20.0  # weight of the present σ², in observations, against held-out residuals
NOISE_CANDIDATES = 201  # values of σ², from a thousandth to a thousand times the present one
SOFTMAX_GRID = tuple(round(1.0 - 0.05 * k, 2) for k in range(16))  # 1 to 0.25: never above 1
SOFTMAX_SD = 0.1  # of the logarithm of the softmax temperature, under its prior
SOFTMAX_PRIOR = 0.5 * (torch.tensor(SOFTMAX_GRID, dtype=torch.float64).log() / SOFTMAX_SD).square()  # −log density

P = TypeVar("P", bound=GaussianPosterior)


def calibrate_temperature(posterior: P, loader: Iterable[Any]) -> P:
    """The posterior at the temperature of ``GRID`` that the log loss of held-out examples chooses."""
    if posterior.config.noise_variance == "estimated" and posterior.config.likelihood == "gaussian":
        return _calibrate_with_noise(posterior, loader)
    family, losses = posterior.likelihood, list[Tensor]()
    num_examples = 0
    for batch in heldout_batches(posterior, loader):
        with posterior.adapter.full_precision():
            losses.append(log_losses(posterior, family, batch, num_examples))
        num_examples += batch.size
    return posterior.with_settings(temperature=choose_temperature(torch.cat(losses, 1)))


def calibrate_softmax(posterior: P, loader: Iterable[Any]) -> P:
    """The posterior with the softmax temperature of ``SOFTMAX_GRID``, at most 1, that held-out data choose."""
    family = posterior.likelihood
    if not isinstance(family, Categorical):
        raise ValueError(f"`calibrate_softmax` needs `likelihood` 'categorical', got {family.name!r}.")
    losses = SOFTMAX_PRIOR
    for batch in heldout_batches(posterior, loader):
        with posterior.adapter.full_precision():
            outputs = posterior.adapter.outputs(posterior.mean_vector, batch.inputs)
        losses = losses + softmax_log_losses(family, outputs, required_targets(family, outputs, batch))
    return posterior.with_settings(softmax_temperature=choose_softmax_temperature(losses))


def choose_temperature(losses: Tensor) -> float:
    """The temperature nearest to 1 whose held-out log loss is not clearly above the smallest.

    Its mean exceeds the smallest mean by at most half a standard error of the difference, paired by example. One
    example has no standard error; it rules out only temperatures that gave its target no probability.

    Args:
        losses: log losses of N examples at each temperature of ``GRID``, (K, N), in nats.
    """
    means = losses.mean(1)
    best = int(means.argmin())
    if not bool(torch.isfinite(means[best])):
        return GRID[0]
    excess = losses - losses[best]
    number = losses.shape[1]
    error = excess.std(1, correction=0) / (number - 1) ** 0.5 if number > 1 else torch.full_like(means, 1e300)
    return nearest_to_one(excess.mean(1) <= MAX_STANDARD_ERRORS * error, excess.mean(1), best)


def choose_softmax_temperature(losses: Tensor) -> float:
    """The value of ``SOFTMAX_GRID`` with the smallest loss, (G,), prior included; the largest among equals."""
    return SOFTMAX_GRID[int(losses.nan_to_num(torch.inf).argmin())] if bool(torch.isfinite(losses[0])) else 1.0


def softmax_log_losses(family: Likelihood, outputs: Tensor, targets: Tensor) -> Tensor:
    """−Σ log p(y) of a batch with its logits (B, m) divided by each value of ``SOFTMAX_GRID``, (G,), on the CPU."""
    logits = outputs.double()
    return -torch.stack([family.log_prob(logits / divisor, targets).sum() for divisor in SOFTMAX_GRID]).cpu()


def log_losses(posterior: GaussianPosterior, family: Likelihood, batch: Batch, first: int) -> Tensor:
    """Log losses of linearized predictions at each temperature of ``GRID``, (K, B), in nats.

    Args:
        posterior: the posterior that predicts.
        family: its likelihood.
        batch: B examples with targets.
        first: number of the batch's first example among all held-out examples.
    """
    if parameter_draws_are_cheaper(posterior, batch, NUM_DRAWS):
        return _log_losses_from_draws(posterior, family, batch, first)
    losses = list[Tensor]()
    for _, chunk in posterior.kf.linearize.chunks(posterior.mean_vector, batch):
        linearized = posterior.kf.linearize(posterior.mean_vector, chunk)
        outputs = posterior.scaled_logits(linearized.outputs)
        checked = required_targets(family, outputs, chunk)
        output_cov = output_covariance(posterior, linearized) / posterior.softmax_temperature**2
        number = first + sum(part.shape[1] for part in losses)
        losses.append(predictive_density.log_loss(family, outputs, output_cov, checked, GRID, number))
    return torch.cat(losses, 1)


def _log_losses_from_draws(posterior: GaussianPosterior, family: Likelihood, batch: Batch, first: int) -> Tensor:
    """The same, with the covariance of the outputs estimated from ``NUM_DRAWS`` draws Jδ."""
    outputs = posterior.adapter.outputs(posterior.mean_vector, batch.inputs)
    checked = required_targets(family, outputs, batch)
    deviations = output_deviations(posterior, batch, NUM_DRAWS, posterior.generator())
    root = posterior.scaled_logits(deviations / NUM_DRAWS**0.5).transpose(0, 1)  # (B, S, m)
    return predictive_density.root_log_loss(family, posterior.scaled_logits(outputs), root, checked, GRID, first)


def _calibrate_with_noise(posterior: P, loader: Iterable[Any]) -> P:
    """:func:`calibrate_temperature` for a Gaussian likelihood whose σ² is estimated: both are chosen together."""
    residual, covariance = _heldout_residuals(posterior, loader)
    present = _present_noise(posterior.state.noise.variance, residual)
    variances, losses = [], []
    for temperature in GRID:
        output_cov = temperature * covariance
        variance = heldout_noise_variance(present, residual, output_cov.diagonal(dim1=1, dim2=2))
        variances.append(variance)
        losses.append(gaussian_log_losses(variance, residual, output_cov))
    chosen = choose_temperature(torch.stack(losses))
    return _with_noise(posterior.with_settings(temperature=chosen), variances[GRID.index(chosen)], len(residual))


def with_heldout_noise(posterior: P, loader: Iterable[Any], present: Tensor | None) -> P:
    """The posterior with the most probable σ² given held-out residuals at its covariance.

    Args:
        posterior: with a Gaussian likelihood whose σ² is estimated.
        loader: batches with targets that the posterior was not fitted on.
        present: the σ² of the fit, (m,), which weighs ``NOISE_COUNT`` observations; None: 1.
    """
    residual, covariance = _heldout_residuals(posterior, loader)
    output_var = posterior.temperature * covariance.diagonal(dim1=1, dim2=2)
    variance = heldout_noise_variance(_present_noise(present, residual), residual, output_var)
    return _with_noise(posterior, variance, len(residual))


def _present_noise(variance: Tensor | None, residual: Tensor) -> Tensor:
    """σ², (m,); 1 if the filter made no update."""
    return torch.ones_like(residual[0]) if variance is None else variance


def _with_noise(posterior: P, variance: Tensor, num_examples: int) -> P:
    """The posterior with another σ², (m,)."""
    count = torch.full_like(variance, NOISE_COUNT + num_examples)
    state = posterior.state._replace(noise=noise.with_variance(posterior.state.noise, variance, count))
    return replace(posterior, state=state)


def _heldout_residuals(posterior: GaussianPosterior, loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Residuals e = y − f(x, μ), (N, m), and covariances J P Jᵀ, (N, m, m), of held-out examples."""
    family, residuals, covariances = posterior.likelihood, list[Tensor](), list[Tensor]()
    for batch in heldout_batches(posterior, loader):
        with posterior.adapter.full_precision():
            for _, chunk in posterior.kf.linearize.chunks(posterior.mean_vector, batch):
                linearized = posterior.kf.linearize(posterior.mean_vector, chunk)
                checked = required_targets(family, linearized.outputs, chunk)
                residuals.append((checked - linearized.outputs).double())
                covariances.append(output_covariance(posterior, linearized))
    return torch.cat(residuals), semidefinite(torch.cat(covariances))


def heldout_noise_variance(present: Tensor, residual: Tensor, output_var: Tensor) -> Tensor:
    """The most probable σ² of each output given held-out residuals e ~ N(0, s + σ²), (m,).

    Its prior is scaled inverse χ² around the present σ² and weighs ``NOISE_COUNT`` observations. A few held-out
    examples change σ² little, and residuals with s ≫ σ² do not change it.

    Args:
        present: the present σ², (m,).
        residual: e, (N, m).
        output_var: s, the diagonal of T·J P Jᵀ, (N, m).
    """
    factors = torch.logspace(-3, 3, NOISE_CANDIDATES, dtype=torch.float64, device=present.device)
    candidates = factors.view(-1, 1, 1) * present  # (G, 1, m)
    total = output_var + candidates
    loss = 0.5 * (total.log() + residual.square() / total).sum(1)  # (G, m)
    loss = loss + 0.5 * NOISE_COUNT * (candidates.log() + present / candidates).squeeze(1)
    return factors[loss.argmin(0)] * present


def gaussian_log_losses(variance: Tensor, residual: Tensor, output_cov: Tensor) -> Tensor:
    """−log N(e; 0, C + σ²I) of each example, (N,); σ² (m,), e (N, m), C (N, m, m)."""
    total = output_cov + torch.diag_embed(variance.expand(len(residual), -1))
    zero = torch.zeros_like(residual)
    return -torch.distributions.MultivariateNormal(zero, total, validate_args=False).log_prob(residual)


def heldout_batches(posterior: GaussianPosterior, loader: Iterable[Any]) -> Iterator[Batch]:
    """Every batch, with targets, on the model's device.

    Raises:
        ValueError: if the loader yields nothing, or a batch has no targets or does not fit.
    """
    index = -1
    for index, batch in enumerate(loader):
        inputs, targets = split_batch(batch)
        if targets is None:
            raise ValueError(f"`loader` must yield targets with every batch, got none in batch {index}.")
        if not isinstance(targets, Tensor):
            raise ValueError(f"`loader` must yield targets as tensors, got {type(targets).__name__}.")
        yield Batch.checked(inputs, targets, posterior.adapter.device)
    if index < 0:
        raise ValueError("`loader` must yield at least one batch, got none.")
