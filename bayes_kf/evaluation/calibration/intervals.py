"""Confidence intervals in closed form of proportions and means.

Simulations over sample sizes from 30, numbers of classes and kinds of miscalibration
(`benchmarks/quality/interval_coverage.py`) show that each nominal 95 % interval covers the true value in at least 90 %
of data sets. Scores for which no such interval is known have none: calibration errors, AUPR, FPR@95, the area under the
risk-coverage curve, squared errors and log densities.

Intervals of means use the distribution that a Bayesian bootstrap gives the mean after one more example is added: with
the largest possible value for the upper end, with the smallest for the lower end. A Beta (or Gamma) distribution of the
same mean and variance replaces the resampling. For zeros and ones the result is exactly Clopper and Pearson's interval:
3 correct of 3 give 29 % to 100 %, where the ordinary bootstrap gives 100 % to 100 %.
"""

import math

import scipy
import torch
from torch import Tensor

from bayes_kf.evaluation.calibration.confidence_profile import top_confidence
from bayes_kf.evaluation.calibration.statistics import check_binned
from bayes_kf.evaluation.inputs import Array, as_targets, as_vector, check_choice, check_fraction
from bayes_kf.evaluation.score import Interval

MIN_LOSSES = 50  # fewer log losses have no interval: 30 with noisy labels had a coverage of 86 to 90 %
MIN_LOSS_PROB = torch.finfo(torch.float32).tiny  # bounds the loss of a label of probability zero
ROUNDING = 1e-9  # by which a value may exceed its bounds


def mean_interval(values: Array, *, bounds: tuple[float, float] = (0.0, 1.0), level: float = 0.95) -> Interval:
    """Confidence interval of the mean of per-example scores with known bounds.

    For zeros and ones it is Clopper and Pearson's interval. Bounds are required, because a few examples carry no
    information about the size of rare values.

    Args:
        values: One score per example, (N,).
        bounds: Smallest and largest possible score.
        level: Probability that the interval covers the population mean.

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
        got = f"{vector.min():.3g}..{vector.max():.3g}"
        raise ValueError(f"`values` must lie in {least:g}..{most:g}, the `bounds`, got values in {got}.")
    return bounded_interval(vector.sum().item(), vector.square().sum().item(), len(vector), least, most, level)


def calibration_interval(
    probs: Array, targets: Array, statistic: str = "gap", *, top_k: int = 1, level: float = 0.95
) -> Interval:
    """Confidence interval of the confidence gap, mean confidence minus accuracy.

    Calibration errors have no interval: they are biased upwards, and nominal 95 % bootstrap intervals covered the true
    error in 0 to 90 % of simulated data sets. Use `calibration_test` to test whether an error is significant.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).
        statistic: "gap", the only one with an interval.
        top_k: k of the confidence, the total probability of the k most probable classes.
        level: Probability that the interval covers the population gap.

    Raises:
        ValueError: If an argument is malformed or the statistic is another one.

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
    """Clopper and Pearson's interval of `hits` of `count`, whose coverage is never below `level`.

    Wilson's 95 % interval has a coverage of 84 % for true proportions about 0.2/N from 0 or 1.
    """
    return bounded_interval(hits, hits, count, 0.0, 1.0, level)


def bounded_interval(total: float, squares: float, count: float, least: float, most: float, level: float) -> Interval:
    """Interval of the mean of values in `least`..`most` from their number, sum and sum of squares."""
    width, tail = most - least, (1 - level) / 2
    first = (total - count * least) / width
    second = (squares - 2 * least * total + count * least**2) / width**2
    mean = min(max(first / count, 0.0), 1.0)
    low = min(_beta_end(first, second, count, 0.0, tail), mean)
    high = max(_beta_end(first, second, count, 1.0, 1 - tail), mean)
    return Interval(least + width * low, least + width * high)


def loss_interval(
    total: float, squares: float, cubes: float, count: float, runner_up: float, level: float
) -> Interval | None:
    """Interval of the mean of non-negative losses from their number and sums of powers.

    Args:
        total: Σ l.
        squares: Σ l².
        cubes: Σ l³.
        count: Number of losses.
        runner_up: Loss of an error that the data may not contain yet, see `runner_up_losses`. The upper end adds one
            example with the larger of this loss and Σ l³ / Σ l².
        level: Probability that the interval covers the population mean.

    Returns:
        The interval, or None if the losses are infinite or fewer than 50.
    """
    if count < MIN_LOSSES or not math.isfinite(total):
        return None
    mean, tail = total / count, (1 - level) / 2
    added = max(runner_up, cubes / squares if squares > 0 else 0.0)
    low = min(_gamma_end(total, squares, count, 0.0, tail), mean)
    return Interval(low, max(_gamma_end(total, squares, count, added, 1 - tail), mean))


def skewed_interval(values: Tensor, level: float, *, below: float = math.inf, above: float = -math.inf) -> Interval:
    """Interval of the mean of values (N,) without bounds: Student's interval with Hall's correction for skewness.

    Each end is computed from N + 1 values. The added value lies on the side of that end; its distance from the mean is
    the average of the deviations on that side weighted by their squares, or that of `above` or `below` if larger. Fewer
    than 50 values have an infinite interval.

    Reference: Hall, *On the removal of skewness by transformation*, 1992.
    """
    if len(values) < MIN_LOSSES:
        return Interval(-math.inf, math.inf)
    mean, deviation, tail = values.mean().item(), values - values.mean(), (1 - level) / 2
    return Interval(
        mean - _skewed_end(-deviation, mean - below, tail), mean + _skewed_end(deviation, above - mean, tail)
    )


def difference_interval(change: Tensor, first: Tensor, second: Tensor, level: float) -> Interval:
    """Interval of the mean paired difference of log losses, `first` minus `second`.

    The added values (see `skewed_interval`) are the extreme differences over the two most probable labels of either
    model.

    Args:
        change: The differences of the losses, (N,).
        first: Class probabilities, (N, C).
        second: Class probabilities of the same examples, (N, C), or (N, C') without such bounds.
        level: Probability that the interval covers the population mean.
    """
    if first.shape != second.shape:
        return skewed_interval(change, level)
    candidates = torch.cat([first.topk(2, dim=1).indices, second.topk(2, dim=1).indices], dim=1)  # (N, 4)
    logs = [p.gather(1, candidates).clamp(min=MIN_LOSS_PROB).log() for p in (first, second)]
    possible = logs[1] - logs[0]
    below, above = possible.amin(dim=1).mean().item(), possible.amax(dim=1).mean().item()
    return skewed_interval(change, level, below=below, above=above)


def runner_up_losses(probs: Tensor) -> Tensor:
    """−log of the second largest probability, (N,): the smallest loss of an example whose top label is wrong."""
    others = probs.scatter(1, probs.argmax(dim=1, keepdim=True), 0.0)  # faster than topk
    return -others.amax(dim=1).clamp(min=MIN_LOSS_PROB).log()


def _beta_end(first: float, second: float, count: float, added: float, share: float) -> float:
    """Quantile of the Beta distribution of the mean of values in 0..1 after one example, 0 or 1, is added."""
    mean = (first + added) / (count + 1)
    if not 0 < mean < 1:
        return min(max(mean, 0.0), 1.0)
    variance = ((second + added) / (count + 1) - mean**2) / (count + 2)
    if variance <= 0:
        return mean
    size = mean * (1 - mean) / variance - 1
    return float(scipy.stats.beta.ppf(share, mean * size, (1 - mean) * size))


def _gamma_end(first: float, second: float, count: float, added: float, share: float) -> float:
    """Quantile of the Gamma distribution of the mean of losses after one example with the loss `added`."""
    mean = (first + added) / (count + 1)
    variance = ((second + added**2) / (count + 1) - mean**2) / (count + 2)
    if mean <= 0 or variance <= 0:
        return mean
    return float(scipy.stats.gamma.ppf(share, mean**2 / variance, scale=variance / mean))


def _skewed_end(deviation: Tensor, least_added: float, tail: float) -> float:
    """Distance of the upper end from the mean, from deviations (N,); the lower end takes them with the other sign."""
    squares = deviation.clamp(min=0).square().sum().item()
    cubes = deviation.clamp(min=0).pow(3).sum().item()
    added = max(cubes / squares if squares > 0 else 0.0, least_added)
    number = len(deviation) + 1
    mean = added / number
    values = torch.cat([deviation, deviation.new_tensor([added])]) - mean
    sd = values.std().item()
    if sd <= 0:
        return 0.0
    root = number**0.5
    skewness = values.pow(3).mean().item() / sd**3 / root
    quantile = float(scipy.stats.t.isf(tail, number - 1))
    if abs(skewness) > 1e-6:
        inner = 1 + skewness * (quantile + skewness / 6)
        quantile = (math.copysign(abs(inner) ** (1 / 3), inner) - 1) / skewness * 3
    return max(0.0, mean + sd / root * quantile)
