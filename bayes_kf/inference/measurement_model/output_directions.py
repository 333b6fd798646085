"""Which directions of the outputs a step sees: all classes, the likely ones and the rest, or the label's odds.

All three are ours in this form. With fewer directions than classes the observation is a coarser one of the same label,
so its log-likelihood and its gradient are exact, whatever was lumped together:

- truncated: the classes that hold 1 − ε of an example's probability, its label, and the rest as one class with logit
  logsumexp. With ρ ≤ ε the mass of the rest, the Fisher information J'ᵀV'J' misses of the exact one ρ Cov(J_j), over j
  drawn from the rest. So 0 ≤ vᵀ(F − F')v ≤ ρ/4 (max − min of (Jv)_j over the rest)² for every step v.
- sampled: the mean sees the label against everything else, one direction e_y − s per example (s the other classes'
  shares of the rest), whose log odds ζ have the label's exact log-likelihood log σ(ζ). The covariance takes probes
  Wᵀz/√K with random signs z, so that the expectation of MᵀM is the Fisher information JᵀVJ (Hutchinson's estimator);
  V is taken where the mean's expansion is. That is known only after the first direction has been pulled back, but each
  probe is a combination of e_y − s and √s∘z − (√s·z) s, whatever the odds, so that one pull gives all rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.linearization.row_buffer import Directions
from bayes_kf.models.likelihood import Bernoulli, Likelihood

MANY = 500  # outputs, above which m directions or m² covariances of an example are no sensible way
ABSENT = -1e4  # logit of a class that an example does not have


class Seen(NamedTuple):
    """What a step sees of a batch.

    Attributes:
        family: likelihood of the targets given what is seen of the outputs.
        outputs: that, (B, c).
        targets: in terms of it.
        degrees: of freedom of each example's innovation when the filter is consistent, (B,), int64. Against all other
            classes too, a label's innovation without a belief's variance is 1/π − 1, whose mean over labels is m − 1.
        directions: of the outputs, for the Jacobian; None for all of them. The first c are those of ``outputs``.
        lumped: largest probability that an example's lumped classes have together ("truncated"); else 0.
        project: from other outputs (b, m) of some of the examples to what is seen of them, (b, c).
        probes: what combines the other directions into probes; None where there are none.
    """

    family: Likelihood
    outputs: Tensor
    targets: Tensor
    degrees: Tensor
    directions: Directions | None
    lumped: float
    project: Callable[[Tensor, slice], Tensor]
    probes: Probes | None = None


class Probes(NamedTuple):
    """K random probes Wᵀz/√K per example, as combinations of the directions e_y − s and √s∘z − (√s·z) s.

    Attributes:
        label: z at the label, (B, K).
        others: √s·z, (B, K).
    """

    label: Tensor
    others: Tensor

    def examples(self, which: slice) -> Probes:
        """Those of some examples."""
        return Probes(self.label[which], self.others[which])

    def factor(self, log_odds: Tensor) -> Tensor:
        """What multiplies the 1 + K directions, (B, K, 1 + K), for V where the label has these log odds (B, 1)."""
        label, others = log_odds.sigmoid(), (-log_odds).sigmoid()
        total = label.sqrt() * self.label + others.sqrt() * self.others  # √π·z
        along = label.sqrt() * self.label - label * total
        number = self.label.shape[1]
        return torch.cat([along.unsqueeze(-1), torch.diag_embed(others.sqrt().expand(-1, number))], -1) / number**0.5


def see(config: KalmanConfig, family: Likelihood, outputs: Tensor, targets: Tensor, seed: int = 0) -> Seen:
    """What the configured curvature sees of outputs η (B, m); ``seed`` is that of probes."""
    if config.curvature == "truncated":
        return _truncated(family, outputs, targets, config.curvature_epsilon, config.curvature_classes)
    if config.curvature == "sampled":
        return _log_odds(outputs, targets, config.curvature_draws, seed)
    return _all(family, outputs, targets)


def warn_of_many(config: KalmanConfig, num_outputs: int) -> None:
    """Where all of very many classes would be followed."""
    if config.curvature == "exact" and config.likelihood == "categorical" and num_outputs > MANY:
        warnings.warn(
            f"`curvature` 'exact' follows all {num_outputs:,} classes of every example, which takes their square in "
            "time and memory; 'truncated' follows the likely ones.",
            stacklevel=2,
        )


def num_rows(config: KalmanConfig, num_outputs: int) -> int:
    """How many rows of the Jacobian an example can have; what is known before its outputs are."""
    if config.curvature == "sampled":
        return 1 + config.curvature_draws
    if config.curvature == "truncated" and num_outputs > 2:
        return min(num_outputs, config.curvature_classes + 2)
    return num_outputs


def num_directions(config: KalmanConfig, num_outputs: int) -> int:
    """How many of them have to be pulled back: softmax does not see what all outputs share."""
    rows = num_rows(config, num_outputs)
    lumping = config.curvature == "sampled" or (config.curvature == "truncated" and num_outputs > 2)
    return rows if lumping or config.likelihood != "categorical" else max(1, rows - 1)


def signs(outputs: Tensor, num_draws: int, generator: torch.Generator) -> Directions:
    """Random signs, whose outer products average to the identity."""
    drawn = _signs(outputs, num_draws, generator) / num_draws**0.5
    return Directions(num_draws, lambda example, which: drawn[example, which])


def _signs(outputs: Tensor, num_draws: int, generator: torch.Generator) -> Tensor:
    shape = (len(outputs), num_draws, outputs.shape[1])
    return (
        torch.empty(shape, dtype=outputs.dtype, device=outputs.device)
        .bernoulli_(0.5, generator=generator)
        .mul_(2)
        .sub_(1)
    )


def _all(family: Likelihood, outputs: Tensor, targets: Tensor) -> Seen:
    """Every output; softmax does not see what all have in common."""
    degrees = torch.full((len(outputs),), outputs.shape[1] - (family.name == "categorical"), device=outputs.device)
    return Seen(family, outputs, targets, degrees, None, 0.0, lambda others, which: others)


def _truncated(family: Likelihood, outputs: Tensor, targets: Tensor, epsilon: float, most: int) -> Seen:
    """The rest first, then an example's classes by probability, as many as it needs; further ones are absent."""
    num_outputs, label = outputs.shape[1], targets.unsqueeze(-1)
    if num_outputs <= 2:
        return _all(family, outputs, targets)
    ordered, order = outputs.double().softmax(-1).sort(-1, descending=True)
    most = min(most, num_outputs - 1)  # so that something is left to be lumped
    needed = ((ordered.cumsum(-1) < 1.0 - epsilon).sum(-1) + 1).clamp_max(most)
    rank = (order == label).to(torch.int8).argmax(-1)
    unlikely = (rank >= needed) & (needed < num_outputs - 1)  # a label beyond the classes needed comes after them
    count = int((needed + unlikely).max())
    kept = order[:, :count].clone()
    last = needed.clamp_max(count - 1).unsqueeze(-1)
    kept = kept.scatter(1, last, torch.where(unlikely.unsqueeze(-1), label, kept.gather(1, last)))
    needed = needed + unlikely
    valid = torch.arange(count, device=outputs.device) < needed.unsqueeze(-1)  # (B, count)
    taken = torch.zeros_like(outputs, dtype=torch.int8).scatter_add_(1, kept, valid.to(torch.int8))

    def project(others: Tensor, which: slice) -> Tensor:
        rest = others.masked_fill(taken[which] > 0, float("-inf")).logsumexp(-1, keepdim=True)
        return torch.cat([rest, others.gather(-1, kept[which]).masked_fill(~valid[which], ABSENT)], -1)

    coarse = project(outputs, slice(None))
    shares = outputs.masked_fill(taken > 0, float("-inf")).softmax(-1)

    def seeds(example: Tensor, which: Tensor) -> Tensor:
        before = (which - 1).clamp_min(0)
        ones = F.one_hot(kept[example, before], outputs.shape[1]).to(outputs) * valid[example, before].unsqueeze(-1)
        return torch.where(which.unsqueeze(-1) > 0, ones, shares[example])

    found = (kept == label) & valid
    where = torch.where(found.any(-1), found.to(torch.int8).argmax(-1) + 1, 0)
    several = valid.sum(-1) < num_outputs - 1  # one class by itself is not lumped
    lumped = float((coarse.softmax(-1)[:, 0] * several).max())
    return Seen(family, coarse, where, needed, Directions(count + 1, seeds, needed + 1), lumped, project)


def _log_odds(outputs: Tensor, targets: Tensor, num_draws: int, seed: int) -> Seen:
    """ζ = η_y − logsumexp of the others, whose Jacobian is that of η along onehot(y) − s, and the probes."""
    label = targets.unsqueeze(-1)

    def project(others: Tensor, which: slice) -> Tensor:
        return others.gather(-1, label[which]) - _without(others, label[which]).logsumexp(-1, keepdim=True)

    log_odds = project(outputs, slice(None))
    shares = _without(outputs, label).softmax(-1)  # s, 0 at the label
    drawn = _signs(outputs, num_draws, torch.Generator(device=outputs.device).manual_seed(seed))
    at_label = drawn.gather(-1, label.unsqueeze(1).expand(-1, num_draws, 1)).squeeze(-1)
    along = drawn.mul_(shares.sqrt().unsqueeze(1))
    others = along.sum(-1)
    along.addcmul_(shares.unsqueeze(1), others.unsqueeze(-1), value=-1.0)
    odds = shares.neg_().scatter_(-1, label, 1.0)

    def seeds(example: Tensor, which: Tensor) -> Tensor:
        found = along[example, (which - 1).clamp_min(0)]
        first = which == 0
        found[first] = odds[example[first]]
        return found

    directions = Directions(1 + num_draws, seeds)
    degrees = torch.full_like(targets, outputs.shape[1] - 1)
    ones, probes = torch.ones_like(log_odds), Probes(at_label, others)
    return Seen(Bernoulli(), log_odds, ones, degrees, directions, 0.0, project, probes)


def odds_length(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared length of the direction of the label's log odds, (B,): their variance for outputs of variance 1."""
    return 1.0 + _without(outputs, targets.unsqueeze(-1)).softmax(-1).square().sum(-1)


def _without(outputs: Tensor, classes: Tensor) -> Tensor:
    """Outputs with those of some classes (B, c) at −∞."""
    return outputs.scatter(-1, classes, float("-inf"))
