"""Scores of predicted real values: RMSE, log loss and coverage of intervals."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import scipy
import torch
from torch import Tensor

from bayes_kf.evaluation.inputs import Array, as_float, as_vector, check_fraction, check_positive_int

LEVELS = (0.5, 0.8, 0.95)
BLOCK = 2**22  # draws per block in float64: bounds memory


class Coverage(NamedTuple):
    """Share of targets inside central intervals; both fields are (L,)."""

    levels: Tensor
    coverage: Tensor


def rmse(mean: Array, targets: Array) -> float:
    """Root mean squared error over all examples and outputs, in the targets' unit.

    Args:
        mean: Predicted means, (N,) or (N, m).
        targets: Observed targets, of the same shape.

    Raises:
        ValueError: If a value is not finite or the shapes differ.

    Example:
        >>> rmse(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])) == 2**0.5
        True
    """
    predicted, observed = as_float(mean, "mean"), as_float(targets, "targets")
    check_same_shape(observed, predicted, "mean")
    return math.sqrt((predicted - observed).square().mean().item())  # torch's sqrt is inexact on some CPUs


def mean_log_loss(log_prob: Array) -> float:
    """Mean of −log p(target), in nats per example, for any predictive distribution.

    Args:
        log_prob: Log density (or probability) of each target under its prediction, (N,); may be −inf.

    Raises:
        ValueError: If the vector is empty or holds NaN.

    Example:
        >>> mean_log_loss(torch.tensor([-1.0, -2.0]))
        1.5
    """
    return -as_vector(log_prob, "log_prob", allow_infinite=True).mean().item()


def gaussian_log_loss(mean: Array, variance: Array, targets: Array) -> float:
    """Mean of −log N(target; mean, variance) over all examples and outputs, in nats.

    Args:
        mean: Predictive means, (N,) or (N, m).
        variance: Predictive variances (noise included), of the same shape, positive.
        targets: Observed targets, of the same shape.

    Raises:
        ValueError: If a shape differs, a value is not finite, or a variance is not positive.

    Example:
        >>> round(gaussian_log_loss(torch.zeros(2), torch.ones(2), torch.tensor([1.0, -1.0])), 4)
        1.4189
    """
    return gaussian_log_losses(*check_gaussian(mean, variance, targets)).mean().item()


def interval_coverage(samples: Array, targets: Array, levels: Sequence[float] = LEVELS) -> Coverage:
    """Share of targets inside the central interval of their predictive samples, at each level.

    The q-quantile of S samples is at position q(S + 1) of the sorted samples, interpolated linearly (Weibull's
    definition: the k-th of S samples covers k/(S + 1) on average). The ends are part of the interval, so intervals of
    counts (Poisson) cover slightly too many targets. A level needs S ≥ 2/(1 − level) − 1 samples: 39 for 95 %.

    Args:
        samples: Draws of the *target* (noise included), (S, N) or (S, N, m).
        targets: Observed targets, (N,) or (N, m).
        levels: Levels of the intervals.

    Raises:
        ValueError: If a shape differs, a value is not finite, or there are too few samples for a level.

    Example:
        >>> samples = torch.linspace(0, 1, 99)[:, None]
        >>> interval_coverage(samples, torch.tensor([0.5])).coverage
        tensor([1., 1., 1.], dtype=torch.float64)
    """
    draws, observed = as_float(samples, "samples"), as_float(targets, "targets")
    check_same_shape(observed, draws[0], "samples[0]")
    ordered = draws.sort(dim=0).values
    shares = []
    for level in levels:
        tail = _tail(level)
        low, high = _quantile(ordered, tail), _quantile(ordered, 1 - tail)
        shares.append(((low <= observed) & (observed <= high)).double().mean())
    return Coverage(torch.tensor(levels, dtype=torch.float64), torch.stack(shares))


def gaussian_coverage(mean: Array, variance: Array, targets: Array, levels: Sequence[float] = LEVELS) -> Coverage:
    """Share of targets inside the central interval of N(mean, variance), at each level.

    Args:
        mean: Predictive means, (N,) or (N, m).
        variance: Predictive variances (noise included), of the same shape, positive.
        targets: Observed targets, of the same shape.
        levels: Levels of the intervals.

    Raises:
        ValueError: If a shape differs, a value is not finite, or a variance is not positive.

    Example:
        >>> gaussian_coverage(torch.zeros(2), torch.ones(2), torch.tensor([0.0, 1.0])).coverage
        tensor([0.5000, 1.0000, 1.0000], dtype=torch.float64)
    """
    center, predictive_var, observed = check_gaussian(mean, variance, targets)
    pit = torch.special.ndtr((observed - center) / predictive_var.sqrt())
    shares = [((pit - 0.5).abs() <= 0.5 - _tail(level)).double().mean() for level in levels]
    return Coverage(torch.tensor(levels, dtype=torch.float64), torch.stack(shares))


def coverage_null(levels: Array, num_targets: int, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """Null band of the coverage of calibrated intervals over independent targets: lowest and highest, each (L,).

    The ends are whole numbers of targets. An end is in the band if more than half of its probability is, so the band
    has a probability as near to `level` as whole numbers allow.

    Args:
        levels: Levels of the intervals, (L,), from 0 to 1.
        num_targets: Number of targets.
        level: Probability of the binomial band.

    Raises:
        ValueError: If a level is not between 0 and 1 or the number is not positive.

    Example:
        >>> low, high = coverage_null(torch.tensor([0.5]), num_targets=100)
        >>> low.item(), high.item()
        (0.41, 0.59)
    """
    check_positive_int(num_targets, "num_targets")
    check_fraction(level, "level")
    shares = as_vector(levels, "levels")
    if shares.min() < 0 or shares.max() > 1:
        raise ValueError(f"`levels` must lie in 0..1, got values in {shares.min():.3g}..{shares.max():.3g}.")
    covered, tail = scipy.stats.binom(num_targets, shares.numpy()), (1 - level) / 2
    low, high = (torch.as_tensor(covered.ppf(q)) for q in (tail, 1 - tail))
    low += torch.as_tensor(covered.cdf(low) - covered.pmf(low) / 2 < tail).double()
    high -= torch.as_tensor(covered.sf(high) + covered.pmf(high) / 2 < tail).double()
    return low / num_targets, high / num_targets


def _tail(level: float) -> float:
    """Tail probability on each side of a central interval."""
    check_fraction(level, "levels")
    return (1 - level) / 2


def _quantile(ordered: Tensor, q: float) -> Tensor:
    """q-quantile of samples sorted along their first axis, at position q(S + 1)."""
    num_samples = len(ordered)
    position = q * (num_samples + 1) - 1
    if position < -1e-9 or position > num_samples - 1 + 1e-9:
        needed = round(1 / min(q, 1 - q)) - 1
        raise ValueError(f"`samples` must hold at least {needed} draws for this interval, got {num_samples}.")
    below = min(max(int(position), 0), num_samples - 1)
    above = min(below + 1, num_samples - 1)
    return torch.lerp(ordered[below], ordered[above], position - below)


def check_same_shape(targets: Tensor, other: Tensor, name: str) -> None:
    """Raises a ValueError if the shapes differ: broadcasting (N,) against (N, 1) would compare all pairs."""
    if targets.shape != other.shape:
        expected, got = tuple(other.shape), tuple(targets.shape)
        raise ValueError(f"`targets` must have the shape of `{name}`, {expected}, got {got}.")


def check_gaussian(mean: Array, variance: Array, targets: Array) -> tuple[Tensor, Tensor, Tensor]:
    """Means, variances and targets in float64; raises a ValueError unless shapes agree and variances are positive."""
    center, predictive_var = as_float(mean, "mean"), as_float(variance, "variance")
    observed = as_float(targets, "targets")
    check_same_shape(observed, center, "mean")
    check_same_shape(observed, predictive_var, "variance")
    if predictive_var.min() <= 0:
        raise ValueError(f"`variance` must be positive, got {predictive_var.min().item():.3g}.")
    return center, predictive_var, observed


def sample_blocks(samples: Array, targets: Array, min_draws: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of draws (S, n) and targets (n,) in float64; raises a ValueError for fewer draws than `min_draws`."""
    draws, observed = torch.as_tensor(samples).detach(), as_float(targets, "targets")
    if draws.ndim == 0 or len(draws) < min_draws:
        got = f"shape {tuple(draws.shape)}"
        raise ValueError(
            f"`samples` must hold at least {min_draws} draws of every target, (S, N) or (S, N, m), got {got}."
        )
    check_same_shape(observed, draws[0], "samples[0]")
    columns, flat = draws.reshape(len(draws), -1), observed.flatten()
    size = max(1, BLOCK // len(draws))
    for start in range(0, len(flat), size):
        yield as_float(columns[:, start : start + size], "samples"), flat[start : start + size]


def gaussian_log_losses(mean: Tensor, variance: Tensor, targets: Tensor) -> Tensor:
    """−log N(target; mean, variance) of each target."""
    return 0.5 * ((2 * math.pi * variance).log() + (targets - mean).square() / variance)
