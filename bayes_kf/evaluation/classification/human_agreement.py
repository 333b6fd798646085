"""Agreement with human label distributions: the answers of many people for each example."""

import math
from typing import NamedTuple

import scipy
import torch
from torch import Tensor

from bayes_kf.evaluation.calibration.intervals import (
    bounded_interval,
    loss_interval,
    runner_up_losses,
)
from bayes_kf.evaluation.calibration.rank_intervals import rank_correlation_interval
from bayes_kf.evaluation.classification.entropy import entropy
from bayes_kf.evaluation.inputs import Array, as_probs, check_fraction
from bayes_kf.evaluation.score import Interval, Score

DECIMALS = 12  # of ranked entropies, so that rounding does not break ties


class Estimate(NamedTuple):
    """A value and its confidence interval; the ends are NaN if no valid interval is known."""

    value: float
    low: float
    high: float

    def score(self) -> Score:
        """The same numbers as a `Score`."""
        return Score(self.value, None if math.isnan(self.low) else Interval(self.low, self.high))


class HumanAgreement(NamedTuple):
    """Agreement of predictions with people's answers; the correlations are NaN if all entropies of one are equal."""

    nll: Estimate  # −Σ_c h_c log p_c, nats: the log loss of one person's answer
    kl: Estimate  # Σ_c h_c log(h_c/p_c), nats: the log loss minus the entropy of the answers
    total_variation: Estimate  # ½ Σ_c |h_c − p_c|, 0 to 1
    entropy_spearman: Estimate  # rank correlation of the entropies of p and of h
    entropy_pearson: float


def human_agreement(probs: Array, human: Array, *, level: float = 0.95) -> HumanAgreement:
    """Agreement of predicted probabilities with the distributions h of people's answers, averaged over examples.

    Probabilities are not clipped: an answer of probability zero makes the log loss and the divergence infinite. Shares
    of few people are noisy: even the true probabilities have a positive divergence from them.

    Args:
        probs: Class probabilities, (N, C).
        human: Shares of people's answers, (N, C), rows sum to one (divide counts by their sums).
        level: Probability that each interval covers the population value.

    Raises:
        ValueError: If an argument is malformed or the shapes differ.

    Reference: Peterson et al., *Human uncertainty makes classification more robust*, 2019.

    Example:
        >>> human = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.7, 0.3]])
        >>> agreement = human_agreement(torch.tensor([[0.8, 0.2], [0.4, 0.6], [0.9, 0.1]]), human)
        >>> [round(score.value, 4) for score in agreement[:4]]
        [0.6133, 0.0703, 0.1333, 0.5]
    """
    predicted, answers = check_human(probs, human)
    check_fraction(level, "level")
    losses = human_losses(predicted, answers)  # (N, 3)
    count, runner_up = len(losses), runner_up_losses(predicted).mean().item()
    powers = [losses[:, :2].clamp(min=0).pow(k).sum(dim=0).tolist() for k in (1, 2, 3)]
    nll, kl = (
        loss_interval(first, second, third, count, runner_up, level)
        for first, second, third in zip(*powers, strict=True)
    )
    distance = losses[:, 2]
    tv_interval = bounded_interval(distance.sum().item(), distance.square().sum().item(), count, 0.0, 1.0, level)
    spearman, pearson = entropy_correlations(rounded_entropy(predicted), rounded_entropy(answers))
    means = losses.mean(dim=0).tolist()
    return HumanAgreement(
        _estimate(means[0], nll),
        _estimate(means[1], kl),
        _estimate(means[2], tv_interval),
        _estimate(spearman, rank_correlation_interval(spearman, count, level)),
        pearson,
    )


def _estimate(value: float, interval: Interval | None) -> Estimate:
    """An estimate from a value and its interval, if any."""
    return Estimate(value, *(interval or (math.nan, math.nan)))


def check_human(probs: Array, human: Array) -> tuple[Tensor, Tensor]:
    """Probabilities and human shares as float64 (N, C); raises a ValueError unless the shapes agree."""
    predicted, answers = as_probs(probs), as_probs(human, "human")
    if answers.shape != predicted.shape:
        expected, got = tuple(predicted.shape), tuple(answers.shape)
        raise ValueError(f"`human` must have the shape of `probs`, {expected}, got {got}.")
    return predicted, answers


def human_losses(probs: Tensor, human: Tensor) -> Tensor:
    """Log loss, divergence and total variation of each example, (N, 3)."""
    loss = -torch.xlogy(human, probs)  # (N, C)
    columns = [loss, loss + torch.xlogy(human, human), 0.5 * (human - probs).abs()]
    return torch.stack([column.sum(dim=1) for column in columns], dim=1)


def rounded_entropy(probs: Tensor) -> Tensor:
    """Entropy of each row, (N,), rounded such that permuted rows have exactly equal entropies."""
    return entropy(probs.sort(dim=1).values).round(decimals=DECIMALS)


def entropy_correlations(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Spearman's and Pearson's correlation of two vectors (N,); NaN if one of them is constant."""
    if _is_constant(first) or _is_constant(second):
        return math.nan, math.nan
    pair = first.numpy(), second.numpy()
    return float(scipy.stats.spearmanr(*pair).statistic), float(scipy.stats.pearsonr(*pair).statistic)


def _is_constant(values: Tensor) -> bool:
    """Whether all values are equal."""
    return bool((values == values[0]).all())
