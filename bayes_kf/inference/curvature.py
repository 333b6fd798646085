"""Which directions of the outputs a step sees: all classes, the likely ones and the rest, or the label's odds.

All three are ours in this form. With fewer directions than classes the observation is a coarser one of the same label,
so its log-likelihood and its gradient are exact, whatever was lumped together:

- truncated: the classes that hold 1 − ε of an example's probability, its label, and the rest as one class with logit
  logsumexp. With ρ ≤ ε the mass of the rest, the Fisher information J'ᵀV'J' misses of the exact one ρ Cov(J_j), over j
  drawn from the rest. So 0 ≤ vᵀ(F − F')v ≤ ρ/4 (max − min of (Jv)_j over the rest)² for every step v.
- sampled: the mean sees the label against everything else, one direction per example, whose log odds ζ have the
  label's exact log-likelihood log σ(ζ). The covariance takes probes Wᵀz/√K with random signs z, so that the expectation
  of MᵀM is the Fisher information JᵀVJ (Hutchinson's estimator); V is taken where the mean's expansion is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.store import Directions
from bayes_kf.models.likelihood import Bernoulli, Likelihood

ABSENT = -1e4  # logit of a class that an example does not have


class Seen(NamedTuple):
    """What a step sees of a batch.

    Attributes:
        family: likelihood of the targets given what is seen of the outputs.
        outputs: that, (B, c).
        targets: in terms of it.
        directions: of the outputs, for the Jacobian; None for all of them.
        lumped: largest probability that an example's lumped classes have together.
    """

    family: Likelihood
    outputs: Tensor
    targets: Tensor
    directions: Directions | None
    lumped: float


def see(config: KalmanConfig, family: Likelihood, outputs: Tensor, targets: Tensor) -> Seen:
    """What the configured curvature sees of outputs η (B, m)."""
    if config.curvature == "truncated":
        return _truncated(family, outputs, targets, config.curvature_epsilon, config.curvature_classes)
    if config.curvature == "sampled":
        return _log_odds(outputs, targets)
    return Seen(family, outputs, targets, None, 0.0)


def num_directions(config: KalmanConfig, num_outputs: int) -> int:
    """How many directions an example can have; what is known before its outputs are."""
    if config.curvature == "sampled":
        return 1
    return min(num_outputs, config.curvature_classes + 2) if config.curvature == "truncated" else num_outputs


def probes(outputs: Tensor, targets: Tensor, log_odds: Tensor | None, num_draws: int, seed: int) -> Directions:
    """Wᵀz/√K for random signs z, K directions per example; the expectation of their outer products is V.

    Args:
        outputs: η, (B, m).
        targets: labels, (B,).
        log_odds: of the label where V is taken, (B, 1), the other classes' shares of the rest as they are; None for V
            at ``outputs``.
        num_draws: K.
        seed: of the signs.
    """
    log_probs = outputs.log_softmax(-1)
    if log_odds is not None:
        log_odds = log_odds.to(outputs)
        others = _without(outputs, targets.unsqueeze(-1)).log_softmax(-1) + F.logsigmoid(-log_odds)
        log_probs = others.scatter(-1, targets.unsqueeze(-1), F.logsigmoid(log_odds))
    root = (0.5 * log_probs).exp().unsqueeze(1)  # √π (B, 1, m)
    generator = torch.Generator(device=outputs.device).manual_seed(seed)
    scaled = root * _signs(outputs, num_draws, generator)
    total = scaled.sum(-1, keepdim=True)
    seeds = scaled.addcmul_(root.square(), total, value=-1.0).div_(num_draws**0.5)  # √π∘z − π(√π·z)
    return Directions(num_draws, lambda start, stop: seeds[:, start:stop])


def signs(outputs: Tensor, num_draws: int, generator: torch.Generator) -> Directions:
    """Random signs, whose outer products average to the identity."""
    drawn = _signs(outputs, num_draws, generator) / num_draws**0.5
    return Directions(num_draws, lambda start, stop: drawn[:, start:stop])


def _signs(outputs: Tensor, num_draws: int, generator: torch.Generator) -> Tensor:
    shape = (len(outputs), num_draws, outputs.shape[1])
    return (
        torch.empty(shape, dtype=outputs.dtype, device=outputs.device)
        .bernoulli_(0.5, generator=generator)
        .mul_(2)
        .sub_(1)
    )


def _truncated(family: Likelihood, outputs: Tensor, targets: Tensor, epsilon: float, most: int) -> Seen:
    """The rest first, then an example's classes by probability, as many as it needs; further ones are absent."""
    ordered, order = outputs.double().softmax(-1).sort(-1, descending=True)
    needed = ((ordered.cumsum(-1) < 1.0 - epsilon).sum(-1) + 1).clamp_max(most)
    label = targets.unsqueeze(-1)
    rank = (order == label).to(torch.int8).argmax(-1)
    count = int((needed + (rank >= needed)).max())
    if count >= outputs.shape[1] - 1:
        return Seen(family, outputs, targets, None, 0.0)
    unlikely = rank >= needed  # a label beyond the classes needed comes after them
    kept = order[:, :count].clone()
    last = needed.clamp_max(count - 1).unsqueeze(-1)
    kept = kept.scatter(1, last, torch.where(unlikely.unsqueeze(-1), label, kept.gather(1, last)))
    needed = needed + unlikely
    valid = torch.arange(count, device=outputs.device) < needed.unsqueeze(-1)  # (B, count)
    taken = torch.zeros_like(outputs, dtype=torch.int8).scatter_add_(1, kept, valid.to(torch.int8))
    rest = outputs.masked_fill(taken > 0, float("-inf"))
    single = outputs.gather(-1, kept).masked_fill(~valid, ABSENT)
    coarse = torch.cat([rest.logsumexp(-1, keepdim=True), single], -1)
    shares = rest.softmax(-1).unsqueeze(1)

    def seeds(start: int, stop: int) -> Tensor:
        chosen = slice(max(start, 1) - 1, stop - 1)
        ones = F.one_hot(kept[:, chosen], outputs.shape[1]).to(outputs) * valid[:, chosen].unsqueeze(-1)
        return ones if start else torch.cat([shares, ones], 1)

    where = ((kept == label) & valid).to(torch.int8).argmax(-1) + 1
    lumped = float(coarse.softmax(-1)[:, 0].max())
    return Seen(family, coarse, where, Directions(count + 1, seeds, needed + 1), lumped)


def _log_odds(outputs: Tensor, targets: Tensor) -> Seen:
    """ζ = η_y − logsumexp of the others, whose Jacobian is that of η along onehot(y) − π of the others."""
    label = targets.unsqueeze(-1)
    rest = _without(outputs, label)
    log_odds = outputs.gather(-1, label) - rest.logsumexp(-1, keepdim=True)
    seeds = (F.one_hot(targets, outputs.shape[1]).to(outputs) - rest.softmax(-1)).unsqueeze(1)
    return Seen(Bernoulli(), log_odds, torch.ones_like(log_odds), Directions(1, lambda start, stop: seeds), 1.0)


def odds_length(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared length of the direction of the label's log odds, (B,): their variance for outputs of variance 1."""
    return 1.0 + _without(outputs, targets.unsqueeze(-1)).softmax(-1).square().sum(-1)


def _without(outputs: Tensor, classes: Tensor) -> Tensor:
    """Outputs with those of some classes (B, c) at −∞."""
    return outputs.scatter(-1, classes, float("-inf"))
