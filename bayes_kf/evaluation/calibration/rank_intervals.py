"""Confidence intervals of rank statistics: AUROC and Spearman's rank correlation."""

import math

import scipy
import torch
from torch import Tensor

from bayes_kf.evaluation.score import Interval

MIN_PAIRS = 10  # fewer pairs have no interval of the rank correlation
EDGE = 1e-9  # distance from 0 and 1 at which the score test is evaluated


def auroc_interval(
    negatives: Tensor,
    positives: Tensor,
    level: float,
    clusters: tuple[Tensor, Tensor] | None = None,
    weights: tuple[Tensor, Tensor] | None = None,
) -> Interval | None:
    """Interval of the AUROC of negatives (n,) and positives (m,): all values that a score test does not reject.

    Newcombe's method 5 with Hanley and McNeil's variance, which is positive even if the scores separate both kinds
    perfectly. If DeLong's estimate is larger, the variance is multiplied by the ratio of the two. Clusters, 0..G − 1,
    of the negatives (n,) and the positives (m,) put Obuchowski's estimate in its place. With weights of both, that
    estimate is of the weighted parts, and n and m are Kish's effective numbers (Σw)²/Σw². Returns None without a
    positive or without a negative, by weight.

    References: Hanley, McNeil 1982; DeLong et al. 1988; Newcombe 2006; Obuchowski, *Nonparametric analysis of clustered
    ROC curve data*, 1997; Kish, *Survey sampling*, 1965. With weights ours.
    """
    counts = weights or (torch.ones_like(negatives), torch.ones_like(positives))
    if min(float(count.sum()) for count in counts) <= 0:
        return None
    shares = [count / count.sum() for count in counts]
    n, m = (1.0 / share.square().sum().item() for share in shares)
    below, above = auroc_parts(negatives, positives, counts)
    value = (shares[1] * above).sum().item()
    parts = [shares[0] * (below - value), shares[1] * (above - value)]
    if clusters is not None:
        number = 1 + int(torch.cat(clusters).max())
        sums = torch.zeros(number, dtype=torch.float64).index_add_(0, torch.cat(clusters), torch.cat(parts))
        spread = sums.square().sum().item() * number / (number - 1)
    else:  # the variance of each kind, on one degree of freedom less
        spread = sum(
            part.square().sum().item() * size / (size - 1)
            for part, size in zip(parts, (n, m), strict=True)
            if size > 1 + EDGE
        )
    modelled = _auroc_variance(value, n, m)
    scale = scipy.stats.norm.ppf((1 + level) / 2) ** 2 * (max(1.0, spread / modelled) if modelled > 0 else 1.0)

    def rejection(truth: float) -> float:  # positive: the test rejects this AUROC
        return (truth - value) ** 2 - scale * _auroc_variance(truth, n, m)

    inside = min(max(value, EDGE), 1 - EDGE)  # the variance is zero at 0 and 1
    ends = [end if rejection(inside) > 0 else scipy.optimize.brentq(rejection, inside, end) for end in (0.0, 1.0)]
    return Interval(min(ends[0], value), max(ends[1], value))


def auroc_parts(
    negatives: Tensor, positives: Tensor, weights: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The share of positives above each negative, (n,), and of negatives below each positive, (m,); ties count half.

    Weights are those of the negatives (n,) and the positives (m,). The (weighted) mean of either part is the AUROC.
    """
    of_negatives, of_positives = weights or (torch.ones_like(negatives), torch.ones_like(positives))
    return 1.0 - _share_below(negatives, positives, of_positives), _share_below(positives, negatives, of_negatives)


def _share_below(values: Tensor, others: Tensor, weights: Tensor) -> Tensor:
    """The share by weight of ``others`` (m,) below each value, (n,); those that equal it count half."""
    ordered, order = others.sort()
    sums = torch.cat([weights.new_zeros(1), weights[order].cumsum(0)])
    ends = [sums[torch.searchsorted(ordered, values.contiguous(), right=right)] for right in (False, True)]
    return (ends[0] + ends[1]) / (2.0 * sums[-1])


def rank_correlation_interval(value: float, count: int, level: float) -> Interval | None:
    """Fisher's interval of Spearman's rank correlation with Bonett and Wright's variance; None for fewer than 10 pairs.

    The centre is clipped to ±(1 − 1/N), so that the interval of a perfectly ordered sample has a positive width.
    """
    if count < MIN_PAIRS or math.isnan(value):
        return None
    centre = math.atanh(max(-1 + 1 / count, min(value, 1 - 1 / count)))
    half = scipy.stats.norm.ppf((1 + level) / 2) * math.sqrt((1 + value**2 / 2) / (count - 3))
    return Interval(min(math.tanh(centre - half), value), max(math.tanh(centre + half), value))


def _auroc_variance(truth: float, num_negatives: float, num_positives: float) -> float:
    """Hanley and McNeil's variance in Newcombe's form, which is symmetric in both numbers."""
    half = (num_negatives + num_positives) / 2 - 1
    factor = 1 + half * (1 - truth) / (2 - truth) + half * truth / (1 + truth)
    return truth * (1 - truth) * factor / (num_negatives * num_positives)
