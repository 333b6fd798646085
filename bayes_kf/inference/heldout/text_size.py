"""The size of a posterior over text, chosen by held-out sequences.

The sequences of a batch are one observation of θ. With their summed gradient g, the Fisher information F = RᵀR of K
probes a sequence, and the covariance P_s of size s (:mod:`.covariance_size`), Laplace's approximation of their joint
likelihood under N(μ, P_s) is

    ℓ(μ) + ½ gᵀ (P_s⁻¹ + F)⁻¹ g − ½ log det(I + R P_s Rᵀ),

and s maximizes its sum over batches − ½ (log₁₀ s)². Text is written by drawn adapters, for which the linearization
need not hold. So s grows from there until the predictions of a few drawn adapters together are no worse than those of
the mean: by at most 0.02 nats a token, or by two standard errors, paired by sequence. Ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from bayes_kf.inference.covariance.observation import solve_innovation
from bayes_kf.inference.heldout.choice import Choice, most_probable
from bayes_kf.inference.heldout.covariance_size import DECADES, LEAST_EXCESS, SIZES, STANDARD_ERRORS, with_size
from bayes_kf.inference.heldout.heldout_examples import heldout_batches
from bayes_kf.inference.linearization.jacobian import Jacobian
from bayes_kf.inference.linearization.row_buffer import selected_outputs
from bayes_kf.inference.predictive.gaussian_posterior import GaussianPosterior
from bayes_kf.models.batch import Batch
from bayes_kf.models.language import LearnedTokens
from bayes_kf.models.likelihoods.tokens import LOG_PROB, STATISTICS

PROBES = 4  # of each held-out sequence
DRAWS = 8  # adapters that predict held-out sequences together


def choose_text_size(pairs: Iterable[tuple[GaussianPosterior, Iterable[Any]]]) -> Choice:
    """One s for posteriors over text under the same settings, each with held-out batches of its own.

    Args:
        pairs: a posterior at the size 1, and batches that it was not fitted on.

    Raises:
        ValueError: if a loader yields nothing, or a batch has no labels or does not fit.
    """
    given = [(posterior, list(heldout_batches(posterior, loader))) for posterior, loader in pairs]
    joint = torch.zeros(len(SIZES), dtype=torch.float64)
    for posterior, batches in given:
        joint += joint_log_likelihoods([with_size(posterior, size) for size in SIZES], batches)
    heights = {size: float(joint[number]) for number, size in enumerate(SIZES)}

    def log_density(size: float) -> float:
        return heights.get(size, -math.inf) - 0.5 * (math.log10(size) / DECADES) ** 2

    chosen = most_probable(log_density, SIZES, evaluations=1)
    at_mean = torch.cat([_losses(posterior, [posterior.mean_vector], batches) for posterior, batches in given])
    tokens = sum(_num_tokens(posterior, batch) for posterior, batches in given for batch in batches)
    allowed = LEAST_EXCESS * tokens / len(at_mean)
    for size in SIZES[SIZES.index(chosen.value) :]:
        sized = [(with_size(posterior, size), batches) for posterior, batches in given]
        excess = torch.cat([sampled_text_losses(posterior, batches) for posterior, batches in sized]) - at_mean
        error = excess.std() / len(excess) ** 0.5 if len(excess) > 1 else excess.new_zeros(())
        if float(excess.mean()) <= max(allowed, STANDARD_ERRORS * float(error)):
            break
    return Choice(size, min(chosen.low, size), max(chosen.high, size), size == SIZES[-1], chosen.log_density)


def joint_log_likelihoods(posteriors: Sequence[GaussianPosterior], batches: Iterable[Batch]) -> Tensor:
    """Σ over batches of the joint log-likelihood of their sequences under each posterior, (G,), in nats.

    Args:
        posteriors: with one mean.
        batches: of sequences, with labels.
    """
    first, total = posteriors[0], torch.zeros(len(posteriors), dtype=torch.float64)
    probing = first.with_adapter(_tokens(first).with_probes(PROBES))
    for number, batch in enumerate(batches):
        log_prob, jacobian = _linearized(probing, batch, number)
        for which, posterior in enumerate(posteriors):
            covariance = posterior.temperature * posterior.state.belief.joint_output_covariance(jacobian)
            total[which] += log_prob + _gain(covariance.double(), batch.size)
    return total


def sampled_text_losses(posterior: GaussianPosterior, batches: Iterable[Batch]) -> Tensor:
    """−log p of each sequence under drawn adapters together, (N,) in nats, float64."""
    return _losses(posterior, list(posterior.sample(DRAWS)), batches)


def _tokens(posterior: GaussianPosterior) -> LearnedTokens:
    """The adapter of a posterior over text."""
    assert isinstance(posterior.adapter, LearnedTokens)  # that of the likelihood "tokens"
    return posterior.adapter


def _num_tokens(posterior: GaussianPosterior, batch: Batch) -> int:
    """How many tokens of a batch are learned."""
    adapter = _tokens(posterior)
    return int((adapter.learned_labels(adapter.with_targets(batch).inputs) >= 0).sum())


def _losses(posterior: GaussianPosterior, draws: Sequence[Tensor], batches: Iterable[Batch]) -> Tensor:
    """−log of the mean probability of each sequence under some parameters (n,), (N,) in nats, float64, on the CPU."""
    adapter, losses = posterior.adapter, list[Tensor]()
    with adapter.full_precision():
        for batch in batches:
            inputs = adapter.with_targets(batch).inputs
            log_probs = torch.stack([adapter.outputs(draw, inputs)[:, LOG_PROB].double() for draw in draws])
            losses.append((math.log(len(draws)) - log_probs.logsumexp(0)).cpu())
    return torch.cat(losses)


def _linearized(posterior: GaussianPosterior, batch: Batch, number: int) -> tuple[float, Jacobian]:
    """The summed log-likelihood of a batch, and the rows of its gradients and probes, 1 + K a sequence."""
    seeded = posterior.adapter.with_targets(batch, posterior.config.seed + number * batch.size)
    with posterior.adapter.full_precision():
        linearized = posterior.kf.linearize(posterior.mean_vector, seeded, rows_per_example=1 + PROBES)
        rows = selected_outputs(linearized.outputs, [LOG_PROB, *range(STATISTICS, STATISTICS + PROBES)])
        jacobian = linearized.jacobian(rows)
    return float(linearized.outputs[:, LOG_PROB].double().sum()), jacobian


def _gain(covariance: Tensor, size: int) -> float:
    """½ gᵀ(P⁻¹ + RᵀR)⁻¹g − ½ log det(I + RPRᵀ), from the covariance of all rows, (B(1+K), B(1+K)).

    R are the probes over √K. With S = I + RPRᵀ the first term is ½ (gᵀPg − gᵀPRᵀ S⁻¹ RPg).
    """
    by_example = covariance.view(size, 1 + PROBES, size, 1 + PROBES)
    of_gradient = by_example[:, 0, :, 0].sum()
    cross = by_example[:, 0, :, 1:].sum(0).flatten() / PROBES**0.5
    of_probes = by_example[:, 1:, :, 1:].reshape(size * PROBES, size * PROBES) / PROBES
    solved = solve_innovation(of_probes, cross)
    return 0.5 * float(of_gradient - solved.squared) - float(solved.chol.diagonal().log().sum())
