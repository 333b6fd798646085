"""Agreement with people: many people's answers for each example, as a distribution over the classes."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import scipy
import torch
from torch import Tensor

from bayes_kf.evaluation._inputs import Array, as_probs
from bayes_kf.evaluation.bootstrap import Interval, column_intervals, quantile_ends, resampled_indices
from bayes_kf.evaluation.null import check_simulation
from bayes_kf.evaluation.uncertainty import entropy

DECIMALS = 12  # of entropies that are ranked: equal ones differ by rounding


class Estimate(NamedTuple):
    """A value and its bootstrap interval over examples."""

    value: float
    low: float
    high: float


class HumanAgreement(NamedTuple):
    """How predictions and people's answers agree; the correlations are NaN where all entropies of one are equal."""

    nll: Estimate  # −Σ_c h_c log p_c, nats: the log loss of one person's answer
    kl: Estimate  # Σ_c h_c log(h_c/p_c), nats: what of it is not people's own entropy
    total_variation: Estimate  # ½ Σ_c |h_c − p_c|, 0 to 1
    entropy_spearman: Estimate  # rank correlation of the entropies of p and of h
    entropy_pearson: Estimate


def human_agreement(
    probs: Array, human: Array, *, level: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> HumanAgreement:
    """Agreement of predicted probabilities with the distributions h of people's answers, averaged over examples.

    Nothing is clipped: an answer that was given probability zero makes the log loss and the divergence infinite.
    Answers of few people are noisy: even a model that predicts every share exactly shows a positive divergence.

    Args:
        probs: Class probabilities, (N, C).
        human: Shares of people's answers, (N, C), rows sum to one; counts are to be divided by their sums.
        level: Probability inside the bootstrap intervals.
        num_resamples: Number of resampled data sets, at least 2/(1 − level) − 1.
        seed: Seed of the resampling.

    Raises:
        ValueError: If an argument is malformed or the shapes differ.

    Reference: Peterson et al., *Human uncertainty makes classification more robust*, 2019.

    Example:
        >>> human = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.7, 0.3]])
        >>> found = human_agreement(torch.tensor([[0.8, 0.2], [0.4, 0.6], [0.9, 0.1]]), human)
        >>> round(found.nll.value, 4), round(found.total_variation.value, 4), round(found.entropy_spearman.value, 4)
        (0.6133, 0.1333, 0.5)
    """
    predicted, answers = checked_human(probs, human)
    check_simulation(num_resamples, level)
    losses = human_losses(predicted, answers)  # (N, 3)
    means = zip(losses.mean(dim=0).tolist(), column_intervals(losses, level, num_resamples, seed), strict=True)
    doubts = doubt(predicted), doubt(answers)
    correlations = zip(
        entropy_correlations(*doubts), _correlation_intervals(*doubts, level, num_resamples, seed), strict=True
    )
    return HumanAgreement(*(Estimate(value, *interval) for value, interval in (*means, *correlations)))


def checked_human(probs: Array, human: Array) -> tuple[Tensor, Tensor]:
    """Both as float64 (N, C) of one shape."""
    predicted, answers = as_probs(probs), as_probs(human, "human")
    if answers.shape != predicted.shape:
        wanted, got = tuple(predicted.shape), tuple(answers.shape)
        raise ValueError(f"`human` must have the shape of `probs`, {wanted}, got {got}.")
    return predicted, answers


def human_losses(probs: Tensor, human: Tensor) -> Tensor:
    """Log loss, divergence and total variation of each example, (N, 3)."""
    loss = -torch.xlogy(human, probs)  # (N, C)
    columns = [loss, loss + torch.xlogy(human, human), 0.5 * (human - probs).abs()]
    return torch.stack([column.sum(dim=1) for column in columns], dim=1)


def doubt(probs: Tensor) -> Tensor:
    """Entropy of each row, (N,), such that rows of the same numbers in another order have exactly the same one."""
    return entropy(probs.sort(dim=1).values).round(decimals=DECIMALS)


def entropy_correlations(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Spearman's and Pearson's correlation of two vectors (N,); NaN where one of them is constant."""
    if _is_constant(first) or _is_constant(second):
        return math.nan, math.nan
    pair = first.numpy(), second.numpy()
    return float(scipy.stats.spearmanr(*pair).statistic), float(scipy.stats.pearsonr(*pair).statistic)


def _correlation_intervals(
    first: Tensor, second: Tensor, level: float, num_resamples: int, seed: int
) -> tuple[Interval, Interval]:
    """Bootstrap intervals of Spearman's and Pearson's correlation, from the resamples in which it is defined."""
    if _is_constant(first) or _is_constant(second):
        return Interval(math.nan, math.nan), Interval(math.nan, math.nan)
    drawn = torch.cat(list(_resampled_correlations(first, second, num_resamples, seed)), dim=1)  # (2, R)
    spearman, pearson = (_ends(values, level) for values in drawn)
    return spearman, pearson


def _resampled_correlations(first: Tensor, second: Tensor, num_resamples: int, seed: int) -> Iterator[Tensor]:
    """Both correlations of resampled examples, (2, r) a block."""
    groups = [values.unique(return_inverse=True)[1] for values in (first, second)]
    for index in resampled_indices(len(first), num_resamples, seed):  # (r, N)
        ranks = [_ranks(group[index]) for group in groups]
        yield torch.stack([_correlation(*ranks), _correlation(first[index], second[index])])


def _ranks(groups: Tensor) -> Tensor:
    """Mean ranks in each row, (r, N), of values told by the place of theirs in order, whole numbers from zero."""
    num_rows, num_groups = len(groups), int(groups.max()) + 1
    cells = groups + num_groups * torch.arange(num_rows)[:, None]
    counts = torch.bincount(cells.flatten(), minlength=num_rows * num_groups).view(num_rows, num_groups).double()
    return (counts.cumsum(dim=1) - (counts - 1) / 2).gather(1, groups)


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation in each row, (r, N) → (r,); NaN where a row is constant."""
    a, b = (values - values.mean(dim=1, keepdim=True) for values in (first, second))
    scale = (a.square().sum(dim=1) * b.square().sum(dim=1)).sqrt()
    constant = (first == first[:, :1]).all(dim=1) | (second == second[:, :1]).all(dim=1)
    return torch.where(constant, math.nan, (a * b).sum(dim=1) / scale)


def _ends(values: Tensor, level: float) -> Interval:
    """Ends of the values that are defined; NaN where too few are."""
    defined = values[~values.isnan()]
    if (1 - level) / 2 * (len(defined) + 1) < 1 - 1e-9:
        return Interval(math.nan, math.nan)
    return quantile_ends(defined, level)


def _is_constant(values: Tensor) -> bool:
    """Whether all values are equal."""
    return bool((values == values[0]).all())
