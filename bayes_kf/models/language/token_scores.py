"""The log-likelihood of a sequence's learned tokens, and random directions of its curvature, without a (T, V) Jacobian.

From logits η_t of learned tokens y_t, π_t = softmax(η_t), a sequence has 5 + K outputs: the statistics of
``models.likelihoods.tokens``, of which only the log-likelihood Σ_t log π_t(y_t) has a gradient, Σ_t J_tᵀ(e_y − π_t);
and K probes, which are 0 and have the gradients Σ_t J_tᵀ F_t^{1/2} z_t, z_t random signs. The outer products of these
average to the Fisher information Σ_t J_tᵀ F_t J_t, F_t = diag(π_t) − π_t π_tᵀ, as the signs of different tokens are
independent.

So a sequence takes 1 + K backward passes, whatever the number of its tokens and the size of the vocabulary. Beside the
logits and their gradient, memory is needed for a few tokens at a time. Ours, with Hutchinson's estimator.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from bayes_kf.models.likelihoods.tokens import COUNT, HITS, LOG_PROB, SPREAD, STATISTICS, UNCERTAINTY

CHUNK = 2**20  # numbers of the logits that are in work at once
MAX_ODDS = 1e30  # against a label
GOLDEN = 0x9E3779B97F4A7C15  # by which seeds of neighbouring sequences and probes lie far apart


def token_scores(logits: Tensor, labels: Tensor, seeds: Tensor, num_probes: int) -> Tensor:
    """The statistics and probes of each sequence, (B, 5 + K), in the dtype of the logits, at least float32.

    Args:
        logits: of the tokens that are predicted, (B, T, V).
        labels: these tokens, (B, T); negative where none is learned.
        seeds: of the random signs of each sequence, (B,), int64.
        num_probes: K.
    """
    scores: Tensor = _TokenScores.apply(logits, labels, seeds, num_probes)
    return scores


class _TokenScores(Function):
    keeps_rows = True  # an output of a sequence depends on the logits of that sequence alone

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, seeds: Tensor, num_probes: int) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        normalizer = logits.new_zeros(labels.shape, dtype=dtype)
        sums = logits.new_zeros(len(logits), STATISTICS + num_probes, dtype=torch.float64)
        for number, where in _chunks(logits):
            learned = _learned(labels, number, where)
            some, chosen = logits[number, learned].to(dtype), labels[number, learned].unsqueeze(-1)
            normalizer[number, learned] = some.logsumexp(-1)
            log_probs = (some - normalizer[number, learned].unsqueeze(-1)).gather(-1, chosen).squeeze(-1).double()
            sums[number, LOG_PROB] += log_probs.sum()
            sums[number, UNCERTAINTY] += (-log_probs).expm1().clamp_max(MAX_ODDS).sum()
            sums[number, SPREAD] += (1.0 - some.softmax(-1).square().sum(-1)).double().sum()
            sums[number, HITS] += (some.argmax(-1, keepdim=True) == chosen).sum()
            sums[number, COUNT] += len(learned)
        ctx.save_for_backward(logits, labels, seeds, normalizer)
        return sums.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None, None]:
        logits, labels, seeds, normalizer = ctx.saved_tensors
        gradient = torch.zeros_like(logits)
        weights, of_probes = cotangent[:, LOG_PROB].tolist(), cotangent[:, STATISTICS:].tolist()
        for number, where in _chunks(logits):
            learned = _learned(labels, number, where)
            if not len(learned) or not (weights[number] or any(of_probes[number])):
                continue
            probs = (logits[number, learned].to(normalizer) - normalizer[number, learned].unsqueeze(-1)).exp()
            total = torch.zeros_like(probs)
            if weights[number]:
                total.sub_(probs, alpha=weights[number])
                total[torch.arange(len(learned), device=total.device), labels[number, learned]] += weights[number]
            for probe, weight in enumerate(of_probes[number]):
                if weight:
                    along = _signs(probs, int(seeds[number]), probe, where.start).mul_(probs.sqrt())
                    total.add_(along, alpha=weight)
                    total.addcmul_(probs, along.sum(-1, keepdim=True), value=-weight)
            gradient[number, learned] = total.to(gradient)
        return gradient, None, None, None


def _learned(labels: Tensor, number: int, where: slice) -> Tensor:
    """The places of learned tokens of a sequence among those of a range."""
    return (labels[number, where] >= 0).nonzero().squeeze(-1) + where.start


def _chunks(logits: Tensor) -> Iterator[tuple[int, slice]]:
    """Numbers of sequences with ranges of their tokens."""
    step = max(1, CHUNK // logits.shape[2])
    for number in range(len(logits)):
        for start in range(0, logits.shape[1], step):
            yield number, slice(start, min(start + step, logits.shape[1]))


def _signs(like: Tensor, seed: int, probe: int, start: int) -> Tensor:
    """Random signs (T, V), the same for the same seed, probe and first token."""
    mixed = (GOLDEN * (seed + 1) + 0xBF58476D1CE4E5B9 * (probe + 1) + 0x94D049BB133111EB * (start + 1)) % 2**63
    generator = torch.Generator(device=like.device).manual_seed(mixed)
    return torch.empty_like(like).bernoulli_(0.5, generator=generator).mul_(2.0).sub_(1.0)
