"""How far scores would move if other examples had come: bootstrap intervals.

Examples are drawn with replacement from those there are. Means of more than `LARGE` examples take the normal limit of
that instead. Calibration errors take the *basic* interval, 2·value − quantiles: resampled data sets show the
calibration error that there is and, once more, the error that chance adds, and the basic interval takes the second
off where quantiles of resampled errors would count it twice.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy
import torch
from torch import Tensor

from bayes_kf.evaluation._inputs import Array, as_targets, as_vector, check_choice
from bayes_kf.evaluation.binning import Binning, ClassCells, observed_hits
from bayes_kf.evaluation.calibration import (
    STATISTICS,
    Statistic,
    check_binned,
    class_statistic,
    profile_statistic,
)
from bayes_kf.evaluation.null import check_simulation
from bayes_kf.evaluation.profile import (
    Profile,
    exact_profile,
    groups_of,
    narrow_profile,
    resampled_profiles,
    top_confidence,
)

LARGE = 20_000
BLOCK = 2**21  # numbers drawn at a time
MOST_CLASSWISE = 10**7  # probabilities of which the classwise error has an interval
SIGNED = ("gap",)


class Interval(NamedTuple):
    """Lower and upper end."""

    low: float
    high: float


def mean_interval(values: Array, *, level: float = 0.95, num_resamples: int = 1000, seed: int = 0) -> Interval:
    """Bootstrap interval of the mean of per-example scores: quantiles of the means of resampled examples.

    Args:
        values: One score an example, (N,); +inf or −inf count as they are.
        level: Probability inside the interval.
        num_resamples: Number of resampled data sets, at least 2/(1 − level) − 1.
        seed: Seed of the resampling.

    Raises:
        ValueError: If an argument is malformed.

    Reference: Efron 1979.

    Example:
        >>> low, high = mean_interval(torch.tensor([0.0, 1.0] * 50))
        >>> 0.35 < low < 0.45 and 0.55 < high < 0.65
        True
    """
    vector = as_vector(values, "values", allow_infinite=True)
    check_simulation(num_resamples, level, "num_resamples")
    return column_intervals(vector[:, None], level, num_resamples, seed)[0]


def calibration_interval(
    probs: Array,
    targets: Array,
    statistic: Statistic = "ece",
    *,
    num_bins: int = 15,
    binning: Binning = "equal_width",
    top_k: int = 1,
    level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of a calibration statistic of the top label, see the module's text; errors end at zero.

    Bins stay where they are. Read it as: how exactly is this error known? Whether it is more than chance is answered by
    `calibration_test` alone: near calibration the intervals of errors hold the true one less often than they say. Of
    95 % intervals 51 to 94 % were seen to hold it at N = 500, and 74 to 81 % at N = 2,000, with confidences off by 0.03
    (80 data sets each, fifteen different confidences).

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).
        statistic: "ece", "mce", "gap", "debiased", "smooth" or "ks".
        num_bins: Number of bins.
        binning: "equal_width" or "equal_mass".
        top_k: How many of the most probable classes count together.
        level: Probability inside the interval.
        num_resamples: Number of resampled data sets, at least 2/(1 − level) − 1.
        seed: Seed of the resampling.

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> low, high = calibration_interval(torch.tensor([[0.9, 0.1]] * 100), torch.tensor([0, 1] * 50), "gap")
        >>> 0.25 < low < 0.4 < high < 0.55
        True
    """
    check_choice(statistic, "statistic", STATISTICS)
    checked = check_binned(probs, num_bins, binning, "confidence", top_k)
    check_simulation(num_resamples, level, "num_resamples")
    profile = exact_profile(*top_confidence(checked, as_targets(targets, checked), top_k))
    return profile_intervals(profile, ((statistic, binning),), num_bins, level, num_resamples, seed)[0]


def profile_intervals(
    profile: Profile,
    statistics: tuple[tuple[str, Binning], ...],
    num_bins: int,
    level: float,
    num_resamples: int,
    seed: int,
) -> list[Interval]:
    """Intervals of several statistics of a profile, all from the same resampled data sets."""
    narrow = narrow_profile(profile, num_bins)
    resampled = resampled_profiles(narrow, num_resamples, seed)
    found = []
    for name, binning in statistics:
        groups = groups_of(narrow, num_bins, binning)
        value = profile_statistic(name, narrow, groups).item()
        low, high = quantile_ends(profile_statistic(name, resampled, groups), level)
        low, high = 2 * value - high, 2 * value - low
        found.append(Interval(low, high) if name in SIGNED else Interval(max(low, 0.0), max(high, 0.0)))
    return found


def classwise_interval(
    cells: ClassCells, probs: Tensor, labels: Tensor, level: float, num_resamples: int, seed: int
) -> Interval | None:
    """The basic interval of the classwise ECE; None where there are more than `MOST_CLASSWISE` probabilities."""
    num_examples, num_classes = probs.shape
    if probs.numel() > MOST_CLASSWISE:
        return None
    residual = probs.clone()
    residual[torch.arange(num_examples), labels] -= 1
    columns = np.repeat(np.arange(num_examples), num_classes)
    where = (cells.index.flatten().numpy(), columns)
    spread = scipy.sparse.csr_array((residual.flatten().numpy(), where), shape=(cells.num_cells, num_examples))
    value = class_statistic("ece", cells, observed_hits(cells, labels)).item()
    drawn = []
    for index in resampled_indices(num_examples, num_resamples, seed):
        offset = num_examples * torch.arange(len(index))[:, None]
        weights = torch.bincount((index + offset).flatten(), minlength=index.numel()).view(index.shape)
        drawn.append(np.abs(spread @ weights.double().numpy().T).sum(axis=0) / probs.numel())
    low, high = quantile_ends(torch.from_numpy(np.concatenate(drawn)), level)
    return Interval(max(2 * value - high, 0.0), max(2 * value - low, 0.0))


def column_intervals(values: Tensor, level: float, num_resamples: int, seed: int) -> list[Interval]:
    """Intervals of the means of several scores of the same examples (N, k), one for each column."""
    if len(values) > LARGE:
        spread = scipy.stats.norm.ppf((1 + level) / 2) * values.std(dim=0) / len(values) ** 0.5
        mean = values.mean(dim=0)
        return [_normal(m.item(), s.item()) for m, s in zip(mean, spread, strict=True)]
    means = torch.cat([values[index].mean(dim=1) for index in resampled_indices(len(values), num_resamples, seed)])
    return [quantile_ends(column, level) for column in means.unbind(dim=1)]


def resampled_indices(num_examples: int, num_resamples: int, seed: int) -> Iterator[Tensor]:
    """Indices of resampled data sets in blocks, each (r, N); R rows altogether."""
    rng = np.random.default_rng(seed)
    rows = max(1, BLOCK // num_examples)
    for first in range(0, num_resamples, rows):
        yield torch.from_numpy(rng.integers(num_examples, size=(min(rows, num_resamples - first), num_examples)))


def quantile_ends(values: Tensor, level: float) -> Interval:
    """The values (R,) that leave (1 − level)/2 outside on each side, or a little less; infinities count."""
    ordered = values.sort().values
    outside = int((1 - level) / 2 * (len(values) + 1) + 1e-9)  # at least one, as the number of resamples was checked
    return Interval(ordered[outside - 1].item(), ordered[-outside].item())


def _normal(mean: float, spread: float) -> Interval:
    """Mean ± spread; an infinite mean is infinite in nearly every resampled data set."""
    if np.isfinite(mean):
        return Interval(mean - spread, mean + spread)
    return Interval(mean, mean)
