"""Null distributions of calibration statistics: their values for a perfectly calibrated model.

The simulation draws labels from the predicted probabilities themselves, so every simulated data set is calibrated by
construction and has the same size and the same confidences as the observed one. An observed error is evidence of
miscalibration only if it lies outside the band of the simulated errors.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.evaluation.calibration.calibration_errors import reliability_bins
from bayes_kf.evaluation.calibration.confidence_profile import (
    Profile,
    coarse_profile,
    exact_profile,
    profile_bins,
    simulate_profile_hits,
    top_confidence,
)
from bayes_kf.evaluation.calibration.statistics import (
    CLASSWISE,
    STATISTICS,
    Statistic,
    check_binned,
    class_statistic,
    profile_statistic,
)
from bayes_kf.evaluation.inputs import Array, as_targets, check_choice
from bayes_kf.evaluation.resampling.binning import Binning, Kind, classwise_bins, observed_hits, simulate_hits
from bayes_kf.evaluation.resampling.null_test import (
    CalibrationNull,
    NullComparison,
    NullSettings,
    check_simulation,
    compare_to_null,
    null_quantiles,
    summarize_null,
)

MAX_LABEL_DRAWS = 2 * 10**8  # labels drawn for a classwise band; it bounds the time
MIN_CLASSWISE_SIMULATIONS = 200  # simulated even where they need more labels than that


class BinsWithBands(NamedTuple):
    """The B bins of a reliability diagram that are not empty."""

    edges: Tensor  # (B, 2)
    counts: Tensor  # examples, (B,) as the following
    confidence: Tensor  # mean
    accuracy: Tensor
    low: Tensor  # of the null band of the accuracy
    high: Tensor


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
    """Mean and central `level` interval of a calibration statistic for a perfectly calibrated model (its null band).

    If there are more than 4,096 distinct confidences, the simulation first groups them into about as many narrow cells.
    A classwise simulation draws at most 2e8 labels: it uses fewer data sets where `num_simulations` would need more,
    but at least 200.

    Args:
        probs: Class probabilities, (N, C); no labels are needed.
        statistic: "ece" or "mce"; for the kind "confidence" also "gap" (mean confidence minus accuracy), "debiased",
            "smooth" or "ks".
        num_bins: Number of bins; "gap", "smooth" and "ks" ignore it.
        binning: "equal_width" or "equal_mass".
        kind: "confidence" or "classwise".
        top_k: k of the confidence, the total probability of the k most probable classes.
        num_simulations: Number of simulated data sets, at least 2/(1 − level) − 1.
        level: Probability inside the null band.
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
        bins = classwise_bins(checked, num_bins, binning)
        hits = simulate_hits(bins, checked, _num_classwise_simulations(num_simulations, len(checked)), seed)
        return summarize_null(class_statistic(statistic, bins, hits), level)
    profile = coarse_profile(exact_profile(*top_confidence(checked, None, top_k)), num_bins)
    hits = simulate_profile_hits(profile, num_simulations, seed)
    return summarize_null(
        profile_statistic(statistic, profile._replace(hits=hits), profile_bins(profile, num_bins, binning)), level
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
) -> NullComparison:
    """A calibration statistic with its null band (perfect calibration) and its p-value.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).
        statistic: "ece" or "mce"; for the kind "confidence" also "gap" (mean confidence minus accuracy), "debiased",
            "smooth" or "ks".
        num_bins: Number of bins; "gap", "smooth" and "ks" ignore it.
        binning: "equal_width" or "equal_mass".
        kind: "confidence" or "classwise".
        top_k: k of the confidence, the total probability of the k most probable classes.
        num_simulations: Number of simulated data sets, at least 2/(1 − level) − 1; see `calibration_null`.
        level: Probability inside the null band.
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
    labels, settings = as_targets(targets, checked), NullSettings(num_bins, num_simulations, seed)
    if kind == "classwise":
        return classwise_tests(checked, labels, (statistic,), settings, binning, level)[0]
    profile = exact_profile(*top_confidence(checked, labels, top_k))
    return profile_tests(profile, ((statistic, binning),), settings, level)[0]


def reliability_band(
    probs: Array,
    *,
    num_bins: int = 15,
    binning: Binning = "equal_width",
    num_simulations: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Null band of each bin's accuracy: lower and upper ends for a perfectly calibrated model, each (bins,).

    The band holds for each bin alone: on average, one of twenty bins of a calibrated model lies outside its 95 % band.
    The bins are those of `reliability_bins`; empty bins have NaN.

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
    bins = profile_bins(exact, num_bins, binning)
    narrow = coarse_profile(exact, num_bins)
    hits = simulate_profile_hits(narrow, num_simulations, seed)
    cell = (torch.searchsorted(exact.confidence, narrow.confidence, right=True) - 1).clamp(min=0)
    accuracy = bins._replace(cell_bins=bins.cell_bins[cell]).sums(hits) / bins.sums(exact.counts)  # (R, bins)
    low, high = null_quantiles(accuracy, ((1 - level) / 2, (1 + level) / 2))
    return low, high


def bins_with_bands(
    probs: Array,
    targets: Array,
    *,
    num_bins: int,
    num_simulations: int,
    seed: int,
    binning: Binning = "equal_width",
) -> BinsWithBands:
    """The bins of a reliability diagram with the null band of each, see `reliability_bins` and `reliability_band`."""
    bins = reliability_bins(probs, targets, num_bins, binning)
    low, high = reliability_band(probs, num_bins=num_bins, binning=binning, num_simulations=num_simulations, seed=seed)
    used = bins.counts > 0
    edges = torch.stack([bins.edges[:-1], bins.edges[1:]], dim=1)
    columns = (edges, bins.counts, bins.confidence, bins.accuracy, low, high)
    return BinsWithBands(*(column[used] for column in columns))


def profile_tests(
    profile: Profile,
    statistics: tuple[tuple[str, Binning], ...],
    settings: NullSettings,
    level: float,
    simulate: Callable[[Profile], Tensor] | None = None,
) -> list[NullComparison]:
    """Statistics of a profile, each with its null band; one simulation serves them all.

    Args:
        profile: Of the data.
        statistics: Names and binnings.
        settings: Of the bins and the simulation.
        level: Probability inside each null band.
        simulate: Gives the hits of each cell in simulated data sets, (R, K); by default those of independent examples.
    """
    narrow = coarse_profile(profile, settings.num_bins)
    if simulate is None:
        hits = simulate_profile_hits(narrow, settings.num_simulations, settings.seed)
    else:
        hits = simulate(narrow)
    comparisons = []
    for name, binning in statistics:
        bins = profile_bins(narrow, settings.num_bins, binning)
        value = profile_statistic(name, profile, profile_bins(profile, settings.num_bins, binning))
        observed_first = narrow._replace(hits=torch.cat([narrow.hits[None], hits]))  # together: on the same smooth grid
        errors = profile_statistic(name, observed_first, bins)
        compared, null = errors[0], errors[1:]
        if name == "smooth":  # the coarser grid of several data sets shifts very small errors
            compared, null = value, (null + value - compared).clamp(min=0)
        comparisons.append(compare_to_null(value, null, level, compared=compared))
    return comparisons


def classwise_tests(
    probs: Tensor,
    labels: Tensor,
    statistics: tuple[str, ...],
    settings: NullSettings,
    binning: Binning,
    level: float,
) -> list[NullComparison]:
    """Classwise statistics, each with its null band; one simulation serves them all."""
    bins = classwise_bins(probs, settings.num_bins, binning)
    observed = observed_hits(bins, labels)
    num_simulations = _num_classwise_simulations(settings.num_simulations, len(probs))
    simulated = simulate_hits(bins, probs, num_simulations, settings.seed)
    comparisons = []
    for name in statistics:
        value = class_statistic(name, bins, observed)
        comparisons.append(compare_to_null(value, class_statistic(name, bins, simulated), level))
    return comparisons


def _num_classwise_simulations(num_simulations: int, num_examples: int) -> int:
    """Number of data sets whose labels are simulated."""
    return min(num_simulations, max(MIN_CLASSWISE_SIMULATIONS, MAX_LABEL_DRAWS // num_examples))


def _checked(probs: Array, statistic: str, num_bins: int, binning: Binning, kind: Kind, top_k: int) -> Tensor:
    """Checked probabilities; raises a ValueError unless the statistic exists for this kind."""
    check_choice(statistic, "statistic", STATISTICS)
    if kind == "classwise" and statistic not in CLASSWISE:
        raise ValueError(f'`kind` must be "confidence" for the statistic "{statistic}", got "classwise".')
    return check_binned(probs, num_bins, binning, kind, top_k)
