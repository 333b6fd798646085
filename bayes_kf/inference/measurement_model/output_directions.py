"""Directions of the outputs that an update uses: all outputs, the likely classes and the rest, or the label's log odds.

All three are ours in this form. With fewer directions than classes the observation is a coarser one of the same label,
so its log-likelihood and its gradient are exact, whatever classes are lumped together:

- truncated: the classes that hold 1 − ε of an example's probability, its label, and the rest as one class with logit
  logsumexp. With ρ ≤ ε the mass of the rest, the Fisher information J'ᵀV'J' lacks ρ Cov(J_j) of the exact one, over j
  drawn from the rest. So 0 ≤ vᵀ(F − F')v ≤ ρ/4 (max − min of (Jv)_j over the rest)² for every step v.
- sampled: the mean uses the label against everything else, one direction e_y − s per example (s the other classes'
  shares of the rest), whose log odds ζ have the label's exact log-likelihood log σ(ζ). The covariance uses probes
  Wᵀz/√K with random signs z, so that the expectation of MᵀM is the Fisher information JᵀVJ (Hutchinson's estimator);
  V is evaluated at the expansion point of the mean. That point is known only after the first direction has been pulled
  back, but each probe is a combination of e_y − s and √s∘z − (√s·z) s, whatever the odds, so one pullback gives all
  rows.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_kf.inference.config_groups import CurvatureSettings
from bayes_kf.inference.linearization.row_buffer import Directions, selected_outputs
from bayes_kf.models.likelihood import Bernoulli, Likelihood, Tokens
from bayes_kf.models.likelihoods.tokens import LOG_PROB, STATISTICS, UNCERTAINTY

MAX_EXACT_OUTPUTS = 500  # outputs above which m directions or m² covariances of an example cost too much
MASKED_LOGIT = -1e4  # logit of a class that an example does not use


class ProjectedOutputs(NamedTuple):
    """The outputs of a batch in the directions that the update uses.

    Attributes:
        family: likelihood of the targets given the projected outputs.
        outputs: the projected outputs, (B, c).
        targets: in terms of them.
        degrees_of_freedom: of each example's innovation if the filter is consistent, (B,), int64. Also for the label
            against all other classes: its innovation without the variance of a belief is 1/π − 1, with mean m − 1.
        directions: of the outputs, for the Jacobian; None for all outputs. The first c are those of ``outputs``.
        lumped: largest probability that the lumped classes of an example have together ("truncated"); otherwise 0.
        project: from other outputs (b, m) of some of the examples to their projected outputs, (b, c).
        probes: weights that combine the other directions into probes; None if there are none.
    """

    family: Likelihood
    outputs: Tensor
    targets: Tensor
    degrees_of_freedom: Tensor
    directions: Directions | None
    lumped: float
    project: Callable[[Tensor, slice], Tensor]
    probes: Probes | None = None


class Probes(ABC):
    """K random directions of the curvature per example, as combinations of the directions that are pulled back."""

    @abstractmethod
    def examples(self, which: slice) -> Probes:
        """The probes of some examples."""

    @abstractmethod
    def factor(self, outputs: Tensor) -> Tensor:
        """The left factor of the 1 + K directions, (B, K, 1 + K), at projected outputs (B, 1)."""


@dataclass(frozen=True)
class LabelProbes(Probes):
    """K random probes Wᵀz/√K per example, as combinations of the directions e_y − s and √s∘z − (√s·z) s.

    Attributes:
        label: z at the label, (B, K).
        others: √s·z, (B, K).
    """

    label: Tensor
    others: Tensor

    def examples(self, which: slice) -> LabelProbes:
        """The probes of some examples."""
        return LabelProbes(self.label[which], self.others[which])

    def factor(self, outputs: Tensor) -> Tensor:
        """The left factor of the 1 + K directions, (B, K, 1 + K), for V at log odds (B, 1) of the label."""
        label, others = outputs.sigmoid(), (-outputs).sigmoid()
        total = label.sqrt() * self.label + others.sqrt() * self.others  # √π·z
        along = label.sqrt() * self.label - label * total
        number = self.label.shape[1]
        return torch.cat([along.unsqueeze(-1), torch.diag_embed(others.sqrt().expand(-1, number))], -1) / number**0.5


@dataclass(frozen=True)
class TokenProbes(Probes):
    """The probes of :mod:`bayes_kf.models.language.token_scores`, which are outputs of the model.

    Attributes:
        number: K.
    """

    number: int

    def examples(self, which: slice) -> TokenProbes:
        """The same: all examples have the same combinations."""
        return self

    def factor(self, outputs: Tensor) -> Tensor:
        """The left factor of the 1 + K directions, (B, K, 1 + K), of which the first is the log-likelihood's."""
        rows = torch.eye(1 + self.number, dtype=outputs.dtype, device=outputs.device)[1:] / self.number**0.5
        return rows.expand(len(outputs), -1, -1)


def project_outputs(
    settings: CurvatureSettings, family: Likelihood, outputs: Tensor, targets: Tensor, seed: int = 0
) -> ProjectedOutputs:
    """Outputs η (B, m) in the directions of the configured curvature; ``seed`` is that of the probes."""
    if isinstance(family, Tokens):
        return _token_statistics(family, outputs)
    if settings.curvature == "truncated" and outputs.shape[1] > 2:
        return _likely_classes(family, outputs, targets, settings.curvature_epsilon, settings.curvature_classes)
    if settings.curvature == "sampled":
        return _label_log_odds(outputs, targets, settings.curvature_draws, seed)
    degrees = outputs.shape[1] - (family.name == "categorical")  # softmax does not depend on a shared shift
    every = torch.full((len(outputs),), degrees, device=outputs.device)
    return ProjectedOutputs(family, outputs, targets, every, None, 0.0, lambda others, which: others)


def warn_of_many_outputs(settings: CurvatureSettings, likelihood: str, num_outputs: int) -> None:
    """Warn if all of very many classes would be used."""
    if settings.curvature == "exact" and likelihood == "categorical" and num_outputs > MAX_EXACT_OUTPUTS:
        warnings.warn(
            f"`curvature` 'exact' uses all {num_outputs:,} classes of every example, which takes their square in "
            "time and memory; 'truncated' uses the likely ones.",
            stacklevel=2,
        )


def num_rows(settings: CurvatureSettings, num_outputs: int) -> int:
    """Rows of the Jacobian that an example can have at most, which is known before its outputs are."""
    if settings.curvature == "sampled":
        return 1 + settings.curvature_draws
    if settings.curvature == "truncated" and num_outputs > 2:
        return min(num_outputs, settings.curvature_classes + 2)
    return num_outputs


def num_directions(settings: CurvatureSettings, likelihood: str, num_outputs: int) -> int:
    """Directions of an example that are pulled back: one fewer than rows for softmax, which ignores a shared shift."""
    rows = num_rows(settings, num_outputs)
    lumping = settings.curvature == "sampled" or (settings.curvature == "truncated" and num_outputs > 2)
    return rows if lumping or likelihood != "categorical" else max(1, rows - 1)


def random_signs(outputs: Tensor, num_draws: int, generator: torch.Generator) -> Directions:
    """Random signs, whose outer products average to the identity."""
    drawn = _signs(outputs, num_draws, generator) / num_draws**0.5
    return Directions(num_draws, lambda example, which: drawn[example, which])


def _signs(outputs: Tensor, num_draws: int, generator: torch.Generator) -> Tensor:
    """Independent signs, (B, K, m)."""
    signs = torch.empty((len(outputs), num_draws, outputs.shape[1]), dtype=outputs.dtype, device=outputs.device)
    return signs.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)


def _likely_classes(
    family: Likelihood, outputs: Tensor, targets: Tensor, epsilon: float, max_classes: int
) -> ProjectedOutputs:
    """The rest first, then an example's classes by probability, as many as it needs; further columns are masked."""
    num_outputs, label = outputs.shape[1], targets.unsqueeze(-1)
    ordered, order = outputs.double().softmax(-1).sort(-1, descending=True)
    max_classes = min(max_classes, num_outputs - 1)  # so that at least one class is lumped
    needed = ((ordered.cumsum(-1) < 1.0 - epsilon).sum(-1) + 1).clamp_max(max_classes)
    rank = (order == label).to(torch.int8).argmax(-1)
    unlikely = (rank >= needed) & (needed < num_outputs - 1)  # a label beyond the needed classes comes after them
    count = int((needed + unlikely).max())
    chosen = order[:, :count].clone()
    last = needed.clamp_max(count - 1).unsqueeze(-1)
    chosen = chosen.scatter(1, last, torch.where(unlikely.unsqueeze(-1), label, chosen.gather(1, last)))
    needed = needed + unlikely
    valid = torch.arange(count, device=outputs.device) < needed.unsqueeze(-1)  # (B, count)
    is_chosen = torch.zeros_like(outputs, dtype=torch.int8).scatter_add_(1, chosen, valid.to(torch.int8))

    def project(others: Tensor, which: slice) -> Tensor:
        rest = others.masked_fill(is_chosen[which] > 0, float("-inf")).logsumexp(-1, keepdim=True)
        return torch.cat([rest, others.gather(-1, chosen[which]).masked_fill(~valid[which], MASKED_LOGIT)], -1)

    coarse = project(outputs, slice(None))
    shares = outputs.masked_fill(is_chosen > 0, float("-inf")).softmax(-1)

    def seeds(example: Tensor, which: Tensor) -> Tensor:
        before = (which - 1).clamp_min(0)
        ones = F.one_hot(chosen[example, before], outputs.shape[1]).to(outputs) * valid[example, before].unsqueeze(-1)
        return torch.where(which.unsqueeze(-1) > 0, ones, shares[example])

    is_label = (chosen == label) & valid
    column = torch.where(is_label.any(-1), is_label.to(torch.int8).argmax(-1) + 1, 0)
    several = valid.sum(-1) < num_outputs - 1  # a single class is not lumped
    lumped = float((coarse.softmax(-1)[:, 0] * several).max())
    directions = Directions(count + 1, seeds, needed + 1)
    return ProjectedOutputs(family, coarse, column, needed, directions, lumped, project)


def _label_log_odds(outputs: Tensor, targets: Tensor, num_draws: int, seed: int) -> ProjectedOutputs:
    """ζ = η_y − logsumexp of the others, whose Jacobian is that of η along onehot(y) − s, and the probes."""
    label = targets.unsqueeze(-1)

    def project(others: Tensor, which: slice) -> Tensor:
        return others.gather(-1, label[which]) - _without(others, label[which]).logsumexp(-1, keepdim=True)

    log_odds = project(outputs, slice(None))
    shares = _without(outputs, label).softmax(-1)  # s, 0 at the label
    signs = _signs(outputs, num_draws, torch.Generator(device=outputs.device).manual_seed(seed))
    at_label = signs.gather(-1, label.unsqueeze(1).expand(-1, num_draws, 1)).squeeze(-1)
    along = signs.mul_(shares.sqrt().unsqueeze(1))
    others = along.sum(-1)
    along.addcmul_(shares.unsqueeze(1), others.unsqueeze(-1), value=-1.0)
    odds = shares.neg_().scatter_(-1, label, 1.0)

    def seeds(example: Tensor, which: Tensor) -> Tensor:
        rows = along[example, (which - 1).clamp_min(0)]
        first = which == 0
        rows[first] = odds[example[first]]
        return rows

    directions = Directions(1 + num_draws, seeds)
    degrees = torch.full_like(targets, outputs.shape[1] - 1)
    ones, probes = torch.ones_like(log_odds), LabelProbes(at_label, others)
    return ProjectedOutputs(Bernoulli(), log_odds, ones, degrees, directions, 0.0, project, probes)


def _token_statistics(family: Tokens, outputs: Tensor) -> ProjectedOutputs:
    """The log-likelihood of each sequence, and the probes, which are outputs; the target is the uncertainty."""
    number = outputs.shape[1] - STATISTICS
    directions = selected_outputs(outputs, [LOG_PROB, *range(STATISTICS, outputs.shape[1])])
    degrees = torch.zeros(len(outputs), dtype=torch.int64, device=outputs.device)  # the innovation of text says little
    uncertainty = outputs[:, UNCERTAINTY].double()
    return ProjectedOutputs(
        family,
        outputs[:, LOG_PROB, None],
        uncertainty,
        degrees,
        directions,
        0.0,
        lambda others, which: others[:, LOG_PROB, None],
        TokenProbes(number),
    )


def log_odds_direction_square(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared length of the direction of the label's log odds, (B,): their variance for outputs of variance 1."""
    return 1.0 + _without(outputs, targets.unsqueeze(-1)).softmax(-1).square().sum(-1)


def _without(outputs: Tensor, classes: Tensor) -> Tensor:
    """Outputs with those of some classes (B, c) at −∞."""
    return outputs.scatter(-1, classes, float("-inf"))
