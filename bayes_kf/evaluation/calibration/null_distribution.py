"""What chance alone would show: calibration statistics of a perfectly calibrated model of the same confidences.

Labels are drawn from the predicted probabilities themselves, so that every simulated data set is calibrated by
construction and has this sample size; whatever calibration error it shows is chance. A reported error means something
only where it lies outside these.
"""

import math
from typing import NamedTuple

import scipy
import torch
from torch import Tensor

from bayes_kf.evaluation.calibration.confidence_profile import (
    Profile,
    exact_profile,
    groups_of,
    narrow_profile,
    simulated_profile_hits,
    top_confidence,
)
from bayes_kf.evaluation.calibration.errors import (
    CLASSWISE,
    STATISTICS,
    Statistic,
    check_binned,
    class_statistic,
    profile_statistic,
)
from bayes_kf.evaluation.inputs import (
    Array,
    as_probs,
    as_targets,
    check_choice,
    check_fraction,
    check_positive_int,
)
from bayes_kf.evaluation.resampling.binning import Binning, Kind, class_cells, observed_hits, simulated_hits

CLASSWISE_DRAWS = 2 * 10**8  # labels drawn for a classwise band, at most; never fewer than LEAST_CLASSWISE data sets
LEAST_CLASSWISE = 200
NO_ROOM = 1e-12  # a variance of the Brier score, relative to (Σ p²)², that is the rounding of float32 probabilities
FITS = 1e-6  # the excess that such rounding leaves
ROUNDING = 1e-9  # between a value and an end of its band


class CalibrationNull(NamedTuple):
    """Mean and central interval of a statistic under perfect calibration."""

    mean: float
    low: float
    high: float


class CalibrationTest(NamedTuple):
    """A test statistic and its p-value under perfect calibration."""

    statistic: float
    p_value: float


class Calibrated(NamedTuple):
    """A statistic beside what chance alone would show.

    The p-value is the share of simulated data sets that are at least as bad, (1 + k)/(1 + simulations): one-sided for
    the errors, two-sided for the gap.
    """

    value: float
    null_mean: float
    null_low: float
    null_high: float
    p_value: float


def calibration_null(
    probs: Array,
    statistic: Statistic = "ece",
    *,
    num_bins: int = 15,
    binning: Binning = "equal_width",
    kind: Kind = "confidence",
    top_k: int = 1,
    num_simulations: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> CalibrationNull:
    """Mean and central `level` interval of a statistic if the model were perfectly calibrated.

    More than 4,096 distinct confidences are put into as many narrow cells first. Classwise, fewer data sets are
    simulated where more than 2e8 labels would have to be drawn, though never fewer than 200.

    Args:
        probs: Class probabilities, (N, C); no labels are needed.
        statistic: "ece", "mce", and of the top label only "gap" (mean confidence minus accuracy), "debiased", "smooth",
            "ks".
        num_bins: Number of bins; "gap", "smooth" and "ks" have none.
        binning: "equal_width" or "equal_mass".
        kind: "confidence" or "classwise".
        top_k: How many of the most probable classes count together.
        num_simulations: Number of simulated data sets, at least 2/(1 − level) − 1.
        level: Probability inside the interval.
        seed: Seed of the simulation.

    Raises:
        ValueError: If an argument is malformed.

    Reference: Bröcker, Smith, *Increasing the reliability of reliability diagrams*, 2007; Vaicenavicius et al. 2019.

    Example:
        >>> null = calibration_null(torch.full((100, 4), 0.25), num_bins=10)
        >>> 0 <= null.low < null.mean < null.high < 0.15
        True
    """
    checked = _checked(probs, statistic, num_bins, binning, kind, top_k)
    check_simulation(num_simulations, level)
    if kind == "classwise":
        cells = class_cells(checked, num_bins, binning)
        hits = simulated_hits(cells, checked, _affordable(num_simulations, len(checked)), seed)
        return _summary(class_statistic(statistic, cells, hits), level)
    profile = narrow_profile(exact_profile(*top_confidence(checked, None, top_k)), num_bins)
    hits = simulated_profile_hits(profile, num_simulations, seed)
    return _summary(
        profile_statistic(statistic, profile._replace(hits=hits), groups_of(profile, num_bins, binning)), level
    )


def calibration_test(
    probs: Array,
    targets: Array,
    statistic: Statistic = "ece",
    *,
    num_bins: int = 15,
    binning: Binning = "equal_width",
    kind: Kind = "confidence",
    top_k: int = 1,
    num_simulations: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Calibrated:
    """A calibration statistic, its interval under perfect calibration, and a p-value.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).
        statistic: "ece", "mce", and of the top label only "gap" (mean confidence minus accuracy), "debiased", "smooth",
            "ks".
        num_bins: Number of bins; "gap", "smooth" and "ks" have none.
        binning: "equal_width" or "equal_mass".
        kind: "confidence" or "classwise".
        top_k: How many of the most probable classes count together.
        num_simulations: Number of simulated data sets, at least 2/(1 − level) − 1; see `calibration_null`.
        level: Probability inside the interval.
        seed: Seed of the simulation.

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> result = calibration_test(torch.tensor([[0.9, 0.1]] * 50), torch.tensor([0, 1] * 25))
        >>> round(result.value, 3), result.value > result.null_high, result.p_value < 0.01
        (0.4, True, True)
    """
    checked = _checked(probs, statistic, num_bins, binning, kind, top_k)
    check_simulation(num_simulations, level)
    labels = as_targets(targets, checked)
    if kind == "classwise":
        return classwise_test(checked, labels, (statistic,), num_bins, binning, num_simulations, seed, level)[0]
    profile = exact_profile(*top_confidence(checked, labels, top_k))
    return profile_tests(profile, ((statistic, binning),), num_bins, num_simulations, seed, level)[0]


def spiegelhalter_test(probs: Array, targets: Array) -> CalibrationTest:
    """Spiegelhalter's test of calibration: is the Brier score what the probabilities themselves expect?

    The statistic is the Brier score minus its expectation under labels drawn from the probabilities, in standard
    deviations; the p-value is two-sided and asymptotic. Positive: worse than expected, as over-confident models are.
    For two classes it is Spiegelhalter's z; over more classes the same idea with the Brier score over all of them is
    ours. Predictions that leave no room for chance (every probability 0, 1 or 1/C) give statistic 0 and p-value 1
    where the labels fit, and an infinite statistic and p-value 0 where they do not.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).

    Raises:
        ValueError: If an argument is malformed.

    Reference: Spiegelhalter, *Probabilistic prediction in patient management and clinical trials*, 1986.

    Example:
        >>> test = spiegelhalter_test(torch.tensor([[0.9, 0.1]] * 50), torch.tensor([0, 1] * 25))
        >>> test.statistic > 5, test.p_value < 1e-6
        (True, True)
    """
    checked = as_probs(probs)
    excess, variance = spiegelhalter_parts(checked, as_targets(targets, checked))
    return spiegelhalter_from(excess.sum().item(), variance.sum().item())


def reliability_band(
    probs: Array,
    *,
    num_bins: int = 15,
    binning: Binning = "equal_width",
    num_simulations: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Lowest and highest accuracy that a perfectly calibrated model would show in each bin, each (bins,).

    The band holds bin by bin: of twenty bins of a calibrated model one lies outside its 95 % band on average. Bins are
    those of `reliability_bins`; empty ones have NaN.

    Args:
        probs: Class probabilities, (N, C).
        num_bins: Number of bins.
        binning: "equal_width" or "equal_mass".
        num_simulations: Number of simulated data sets, at least 2/(1 − level) − 1.
        level: Probability inside the band of each bin.
        seed: Seed of the simulation.

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> low, high = reliability_band(torch.full((100, 2), 0.5), num_bins=1)
        >>> 0.35 < low.item() < 0.45 and 0.55 < high.item() < 0.65
        True
    """
    checked = check_binned(probs, num_bins, binning, "confidence", 1)
    check_simulation(num_simulations, level)
    exact = exact_profile(*top_confidence(checked, None, 1))
    groups = groups_of(exact, num_bins, binning)
    narrow = narrow_profile(exact, num_bins)
    hits = simulated_profile_hits(narrow, num_simulations, seed)
    index = (torch.searchsorted(exact.place, narrow.place, right=True) - 1).clamp(min=0)
    shares = groups._replace(bins=groups.bins[index]).sums(hits) / groups.sums(exact.counts)  # (R, bins)
    low, high = shares.quantile(_positions(level, num_simulations), dim=0)
    return low, high


def profile_tests(
    profile: Profile,
    statistics: tuple[tuple[str, Binning], ...],
    num_bins: int,
    num_simulations: int,
    seed: int,
    level: float,
) -> list[Calibrated]:
    """Statistics of a profile beside what chance alone would show, all from one simulation."""
    narrow = narrow_profile(profile, num_bins)
    hits = simulated_profile_hits(narrow, num_simulations, seed)
    found = []
    for name, binning in statistics:
        groups = groups_of(narrow, num_bins, binning)
        value = profile_statistic(name, profile, groups_of(profile, num_bins, binning))
        together = narrow._replace(hits=torch.cat([narrow.hits[None], hits]))  # as the smooth error has another grid
        errors = profile_statistic(name, together, groups)
        compared, null = errors[0], errors[1:]
        if name == "smooth":  # what the coarser grid changes would be seen in very small errors
            compared, null = value, (null + value - compared).clamp(min=0)
        found.append(compare(value, compared, null, level))
    return found


def classwise_test(
    probs: Tensor,
    labels: Tensor,
    statistics: tuple[str, ...],
    num_bins: int,
    binning: Binning,
    num_simulations: int,
    seed: int,
    level: float,
) -> list[Calibrated]:
    """Classwise statistics beside what chance alone would show, all from one simulation."""
    cells = class_cells(probs, num_bins, binning)
    observed = observed_hits(cells, labels)
    simulated = simulated_hits(cells, probs, _affordable(num_simulations, len(probs)), seed)
    found = []
    for name in statistics:
        value = class_statistic(name, cells, observed)
        found.append(compare(value, value, class_statistic(name, cells, simulated), level))
    return found


def spiegelhalter_parts(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each example's Brier score minus its expectation under its own probabilities, and its variance, each (N,).

    Both are zero, and not their rounding, where every probability is 0 or as large as the others.
    """
    shares = probs / probs.sum(dim=1, keepdim=True)
    squares = shares.square().sum(dim=1)
    excess = 2 * (squares - shares.gather(1, labels[:, None])[:, 0])
    variance = 4 * (shares.pow(3).sum(dim=1) - squares.square())
    no_room = variance <= NO_ROOM * squares.square()
    return excess.masked_fill(no_room & (excess.abs() < FITS), 0.0), variance.masked_fill(no_room, 0.0)


def spiegelhalter_from(excess: float, variance: float) -> CalibrationTest:
    """The test from the sums of both parts."""
    if variance > 0:
        z = excess / math.sqrt(variance)
        return CalibrationTest(z, 2 * float(scipy.stats.norm.sf(abs(z))))
    fits = abs(excess) < FITS
    return CalibrationTest(0.0 if fits else math.copysign(math.inf, excess), 1.0 if fits else 0.0)


def side(value: float, low: float, high: float) -> int:
    """Where a value lies: 1 above its band, −1 below it, 0 inside, where what only rounding tells apart is equal."""
    return int(value > high + ROUNDING) - int(value < low - ROUNDING)


def compare(value: Tensor, compared: Tensor, null: Tensor, level: float) -> Calibrated:
    """A value beside simulated ones (R,); `compared` is the value in the cells that the simulation used."""
    as_bad = null.abs() >= compared.abs() - 1e-12  # equal up to the order of summation
    p_value = (1 + as_bad.sum().item()) / (1 + len(null))
    summary = _summary(null, level)
    return Calibrated(value.item(), summary.mean, summary.low, summary.high, p_value)


def _affordable(num_simulations: int, num_examples: int) -> int:
    """How many data sets of labels are drawn."""
    return min(num_simulations, max(LEAST_CLASSWISE, CLASSWISE_DRAWS // num_examples))


def _summary(simulated: Tensor, level: float) -> CalibrationNull:
    """Mean and central interval of simulated values (R,).

    Where more of them than the lower tail are the least one (zero, as debiased errors often are), the interval begins
    there and the whole tail is above.
    """
    low, high = simulated.quantile(_positions(level, len(simulated)))
    if (simulated == simulated.min()).double().mean() > (1 - level) / 2:
        low = simulated.min()
        high = simulated.quantile(_position(level, len(simulated)))
    return CalibrationNull(simulated.mean().item(), low.item(), high.item())


def _checked(probs: Array, statistic: str, num_bins: int, binning: Binning, kind: Kind, top_k: int) -> Tensor:
    """Checked probabilities, for a statistic that exists for this kind."""
    check_choice(statistic, "statistic", STATISTICS)
    if kind == "classwise" and statistic not in CLASSWISE:
        raise ValueError(f'`kind` must be "confidence" for the statistic "{statistic}", got "classwise".')
    return check_binned(probs, num_bins, binning, kind, top_k)


def check_simulation(num_simulations: int, level: float, name: str = "num_simulations") -> None:
    """Refuses a number of simulations or a level that gives no interval."""
    check_positive_int(num_simulations, name)
    check_fraction(level, "level")
    needed = math.ceil(2 / (1 - level) - 1 - 1e-9)
    if num_simulations < needed:
        raise ValueError(f"`{name}` must be at least {needed} for level {level}, got {num_simulations}.")


def _positions(level: float, num_simulations: int) -> Tensor:
    """Where to read both quantiles of a central interval."""
    return torch.stack([_position(share, num_simulations) for share in ((1 - level) / 2, (1 + level) / 2)])


def _position(share: float, num_simulations: int) -> Tensor:
    """Where to read a quantile: one more draw lies below the k-th of R with probability k/(R + 1)."""
    position = (share * (num_simulations + 1) - 1) / (num_simulations - 1)
    return torch.tensor(position, dtype=torch.float64).clamp(0, 1)  # clamps rounding only, as checked
