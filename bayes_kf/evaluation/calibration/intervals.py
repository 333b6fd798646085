"""Confidence intervals in closed form: of proportions, means, AUROCs and rank correlations.

Each was simulated over sizes from 30, numbers of classes and kinds of miscalibration
(`benchmarks/quality/interval_coverage.py`) and covers the true value in at least 90 % of data sets where it says 95. Scores for
which no such interval is known have none: calibration errors, AUPR, FPR@95, the area under the risk-coverage curve,
squared errors and log densities.

Means use the distribution that a Bayesian bootstrap gives the mean when one more example is added: the upper end adds
one at the largest value that an example may have, the lower end one at the least. A Beta (or Gamma) distribution of
the same mean and variance takes the place of resampling. For zeros and ones this is exactly Clopper and Pearson's
interval, so 3 right of 3 give 29 % to 100 %; the ordinary bootstrap gives 100 % to 100 % there.
"""

import math
from typing import NamedTuple

import scipy
import torch
from torch import Tensor

from bayes_kf.evaluation.calibration.confidence_profile import top_confidence
from bayes_kf.evaluation.calibration.errors import check_binned
from bayes_kf.evaluation.inputs import Array, as_targets, as_vector, check_choice, check_fraction

FEWEST_LOSSES = 50  # fewer log losses have no interval: with 30, 86 to 90 % were covered where labels are noisy
LEAST_LOSS_PROB = torch.finfo(torch.float32).tiny  # bounds the loss of a label that was given probability zero
FEWEST_RANKED = 10  # pairs of which a rank correlation has an interval
ROUNDING = 1e-9


class Interval(NamedTuple):
    """Lower and upper end."""

    low: float
    high: float


def mean_interval(values: Array, *, bounds: tuple[float, float] = (0.0, 1.0), level: float = 0.95) -> Interval:
    """Interval of the mean of per-example scores that lie between known bounds.

    Of zeros and ones it is Clopper and Pearson's. Scores without bounds are refused: a few examples never tell how
    large the rare ones are.

    Args:
        values: One score an example, (N,).
        bounds: Least and largest value that a score may have.
        level: Probability that the interval covers the mean of the population.

    Raises:
        ValueError: If an argument is malformed or a value lies outside the bounds.

    References: Clopper, Pearson 1934; one more example at the bound: Gaffke 2004.

    Example:
        >>> low, high = mean_interval(torch.ones(3))
        >>> round(low, 3), high
        (0.292, 1.0)
    """
    vector = as_vector(values, "values")
    check_fraction(level, "level")
    least, most = (float(end) for end in bounds)
    if not (math.isfinite(least) and math.isfinite(most) and least < most):
        raise ValueError(f"`bounds` must be two finite numbers, the smaller first, got {bounds!r}.")
    if vector.min() < least - ROUNDING or vector.max() > most + ROUNDING:
        found = f"{vector.min():.3g}..{vector.max():.3g}"
        raise ValueError(f"`values` must lie in {least:g}..{most:g}, the `bounds`, got values in {found}.")
    return bounded_interval(vector.sum().item(), vector.square().sum().item(), len(vector), least, most, level)


def calibration_interval(
    probs: Array, targets: Array, statistic: str = "gap", *, top_k: int = 1, level: float = 0.95
) -> Interval:
    """Interval of the confidence gap, mean confidence minus accuracy.

    Calibration errors have none: they are positive by chance alone, and bootstrap intervals of them were seen to cover
    the true error in 0 to 90 % of data sets where they said 95. Whether an error is more than chance is what
    `calibration_test` answers.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).
        statistic: "gap".
        top_k: How many of the most probable classes count together.
        level: Probability that the interval covers the gap of the population.

    Raises:
        ValueError: If an argument is malformed, or for the other statistics.

    Example:
        >>> low, high = calibration_interval(torch.tensor([[0.9, 0.1]] * 100), torch.tensor([0, 1] * 50))
        >>> 0.25 < low < 0.4 < high < 0.55
        True
    """
    check_choice(statistic, "statistic", ("gap",))
    checked = check_binned(probs, 1, "equal_width", "confidence", top_k)
    check_fraction(level, "level")
    confidence, hit = top_confidence(checked, as_targets(targets, checked), top_k)
    return mean_interval(confidence - hit, bounds=(-1.0, 1.0), level=level)


def proportion_interval(hits: float, count: float, level: float) -> Interval:
    """Clopper and Pearson's interval of `hits` of `count`, which never covers less often than it says.

    Wilson's covers in 84 % of data sets where the true share is about 0.2/N from 0 or 1.
    """
    return bounded_interval(hits, hits, count, 0.0, 1.0, level)


def bounded_interval(total: float, squares: float, count: float, least: float, most: float, level: float) -> Interval:
    """Interval of the mean of values in `least`..`most`, from their number, sum and sum of squares."""
    width, tail = most - least, (1 - level) / 2
    first = (total - count * least) / width
    second = (squares - 2 * least * total + count * least**2) / width**2
    mean = min(max(first / count, 0.0), 1.0)
    low = min(_beta_end(first, second, count, 0.0, tail), mean)
    high = max(_beta_end(first, second, count, 1.0, 1 - tail), mean)
    return Interval(least + width * low, least + width * high)


def loss_interval(
    total: float, squares: float, cubes: float, count: float, unseen: float, level: float
) -> Interval | None:
    """Interval of the mean of losses from zero up, from their number and sums of powers.

    Args:
        total: Σ l.
        squares: Σ l².
        cubes: Σ l³.
        count: Number of losses.
        unseen: What an error costs that has not happened yet. The upper end adds one example of this loss or of
            Σ l³ / Σ l², whichever is larger.
        level: Probability inside.

    Returns:
        The interval, or None of infinite losses and of fewer than 50.
    """
    if count < FEWEST_LOSSES or not math.isfinite(total):
        return None
    mean, tail = total / count, (1 - level) / 2
    added = max(unseen, cubes / squares if squares > 0 else 0.0)
    low = min(_gamma_end(total, squares, count, 0.0, tail), mean)
    return Interval(low, max(_gamma_end(total, squares, count, added, 1 - tail), mean))


def skewed_interval(values: Tensor, level: float, *, below: float = math.inf, above: float = -math.inf) -> Interval:
    """Interval of the mean of values (N,) without bounds: Student's, corrected for skewness by Hall's transformation.

    Upper and lower end are those of N + 1 values. The one that is added lies as far above or below the mean as
    deviations on that side weighted by their squares do on average, or at `above` and `below` where those are further
    away. Fewer than 50 values say nothing: their interval is infinite.

    Reference: Hall, *On the removal of skewness by transformation*, 1992.
    """
    if len(values) < FEWEST_LOSSES:
        return Interval(-math.inf, math.inf)
    mean, deviation, tail = values.mean().item(), values - values.mean(), (1 - level) / 2
    return Interval(
        mean - _skewed_end(-deviation, mean - below, tail), mean + _skewed_end(deviation, above - mean, tail)
    )


def difference_interval(change: Tensor, first: Tensor, second: Tensor, level: float) -> Interval:
    """Interval of the mean of log losses under `first` less those under `second`, paired by example.

    A difference that has not been seen yet may be as large as that of the two most probable labels of either model.

    Args:
        change: The differences, (N,).
        first: Class probabilities, (N, C).
        second: Class probabilities of as many examples, (N, C) or of other classes, which bound nothing.
        level: Probability inside.
    """
    if first.shape != second.shape:
        return skewed_interval(change, level)
    chosen = torch.cat([first.topk(2, dim=1).indices, second.topk(2, dim=1).indices], dim=1)  # (N, 4)
    logs = [p.gather(1, chosen).clamp(min=LEAST_LOSS_PROB).log() for p in (first, second)]
    possible = logs[1] - logs[0]
    below, above = possible.amin(dim=1).mean().item(), possible.amax(dim=1).mean().item()
    return skewed_interval(change, level, below=below, above=above)


def auroc_interval(negatives: Tensor, positives: Tensor, level: float) -> Interval | None:
    """Interval of the AUROC of scores (n,) and (m,): the values that a score test does not reject.

    Newcombe's method 5 with Hanley and McNeil's variance, which is not zero where both kinds never mix; where
    DeLong's estimate is larger the variance is multiplied by their ratio. None without a positive or a negative.

    References: Hanley, McNeil 1982; DeLong et al. 1988; Newcombe 2006.
    """
    n, m = len(negatives), len(positives)
    if n == 0 or m == 0:
        return None
    low, high = negatives.numpy(), positives.numpy()
    ranks = scipy.stats.rankdata(torch.cat([positives, negatives]).numpy())
    above, below = (ranks[:m] - scipy.stats.rankdata(high)) / n, 1 - (ranks[m:] - scipy.stats.rankdata(low)) / m
    value = float(above.mean())
    delong = (above.var(ddof=1) / m if m > 1 else 0.0) + (below.var(ddof=1) / n if n > 1 else 0.0)
    modelled = _auroc_variance(value, n, m)
    scale = scipy.stats.norm.ppf((1 + level) / 2) ** 2 * (max(1.0, delong / modelled) if modelled > 0 else 1.0)

    def rejected(truth: float) -> float:
        return (truth - value) ** 2 - scale * _auroc_variance(truth, n, m)

    inside = min(max(value, ROUNDING), 1 - ROUNDING)  # at 0 and 1 the test is exact by any of them
    ends = [end if rejected(inside) > 0 else scipy.optimize.brentq(rejected, inside, end) for end in (0.0, 1.0)]
    return Interval(min(ends[0], value), max(ends[1], value))


def rank_correlation_interval(value: float, count: int, level: float) -> Interval | None:
    """Fisher's interval of Spearman's rank correlation with Bonett and Wright's variance; None of less than ten pairs.

    The centre is at most 1 − 1/N from zero, so that a sample in perfect order is not certain.
    """
    if count < FEWEST_RANKED or math.isnan(value):
        return None
    centre = math.atanh(max(-1 + 1 / count, min(value, 1 - 1 / count)))
    half = scipy.stats.norm.ppf((1 + level) / 2) * math.sqrt((1 + value**2 / 2) / (count - 3))
    return Interval(min(math.tanh(centre - half), value), max(math.tanh(centre + half), value))


def unseen_losses(probs: Tensor) -> Tensor:
    """−log of the second largest probability, (N,): what an example costs at least where the top label is wrong."""
    return -probs.topk(2, dim=1).values[:, 1].clamp(min=LEAST_LOSS_PROB).log()


def _beta_end(first: float, second: float, count: float, added: float, share: float) -> float:
    """Quantile of the Beta distribution of the mean of values in 0..1, one example at 0 or 1 added."""
    mean = (first + added) / (count + 1)
    if not 0 < mean < 1:
        return min(max(mean, 0.0), 1.0)
    variance = ((second + added) / (count + 1) - mean**2) / (count + 2)
    if variance <= 0:
        return mean
    size = mean * (1 - mean) / variance - 1
    return float(scipy.stats.beta.ppf(share, mean * size, (1 - mean) * size))


def _gamma_end(first: float, second: float, count: float, added: float, share: float) -> float:
    """Quantile of the Gamma distribution of the mean of losses, one example of the loss `added` more."""
    mean = (first + added) / (count + 1)
    variance = ((second + added**2) / (count + 1) - mean**2) / (count + 2)
    if mean <= 0 or variance <= 0:
        return mean
    return float(scipy.stats.gamma.ppf(share, mean**2 / variance, scale=variance / mean))


def _skewed_end(deviation: Tensor, least_added: float, tail: float) -> float:
    """How far the mean may lie in the direction of positive deviations (N,)."""
    squares = deviation.clamp(min=0).square().sum().item()
    cubes = deviation.clamp(min=0).pow(3).sum().item()
    added = max(cubes / squares if squares > 0 else 0.0, least_added)
    number = len(deviation) + 1
    mean = added / number
    values = torch.cat([deviation, deviation.new_tensor([added])]) - mean
    spread = values.std().item()
    if spread <= 0:
        return 0.0
    root = number**0.5
    skewness = values.pow(3).mean().item() / spread**3 / root
    quantile = float(scipy.stats.t.isf(tail, number - 1))
    if abs(skewness) > 1e-6:
        inner = 1 + skewness * (quantile + skewness / 6)
        quantile = (math.copysign(abs(inner) ** (1 / 3), inner) - 1) / skewness * 3
    return max(0.0, mean + spread / root * quantile)


def _auroc_variance(truth: float, num_negatives: int, num_positives: int) -> float:
    """Hanley and McNeil's variance, as Newcombe makes it symmetric in both numbers."""
    half = (num_negatives + num_positives) / 2 - 1
    room = 1 + half * (1 - truth) / (2 - truth) + half * truth / (1 + truth)
    return truth * (1 - truth) * room / (num_negatives * num_positives)
