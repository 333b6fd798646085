"""Calibration errors: how far confidence and accuracy lie apart.

Bins of equal width are closed below and open above, the last one closed on both sides: [0, 1/b), …, [1 − 1/b, 1]. A
confidence within 1e-7 below an edge counts as on it. (torchmetrics gives confidence exactly 1 a bin of its own; here,
as in NumPy's histograms, it belongs to the last one. Otherwise the two agree.)

Bins of equal mass start at the sorted confidences number 0, n/b, 2n/b, …; equal confidences are never split, so bins
with many ties are larger and there may be fewer bins than asked for.

With `top_k` the confidence is the probability of the k most probable classes together, and it comes true where the
label is among them.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bayes_kf.evaluation.calibration.confidence_profile import Groups, Profile, exact_profile, groups_of, top_confidence
from bayes_kf.evaluation.calibration.smooth_ece import smooth_error
from bayes_kf.evaluation.inputs import Array, as_probs, as_targets, check_choice, check_positive_int
from bayes_kf.evaluation.resampling.binning import (
    BINNINGS,
    FORMER_KIND,
    KINDS,
    Binning,
    ClassCells,
    Kind,
    class_cells,
    observed_hits,
)

Statistic = Literal["ece", "mce", "gap", "debiased", "smooth", "ks"]
STATISTICS = ("ece", "mce", "gap", "debiased", "smooth", "ks")
CLASSWISE = ("ece", "mce")


class ReliabilityBins(NamedTuple):
    """Confidence and accuracy of the top label in each bin; NaN where a bin is empty."""

    edges: Tensor  # (bins + 1,)
    counts: Tensor  # (bins,) int64
    confidence: Tensor  # (bins,)
    accuracy: Tensor  # (bins,)


def reliability_bins(
    probs: Array, targets: Array, num_bins: int = 15, binning: Binning = "equal_width"
) -> ReliabilityBins:
    """Confidence and accuracy of the most probable class, bin by bin; among equal probabilities the first class counts.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).
        num_bins: Number of bins; with bins of equal mass, the largest number.
        binning: "equal_width" or "equal_mass", see the module's text.

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> bins = reliability_bins(torch.tensor([[0.8, 0.2], [0.3, 0.7]]), torch.tensor([0, 0]), num_bins=2)
        >>> bins.counts.tolist(), bins.accuracy.tolist()
        ([0, 2], [nan, 0.5])
    """
    checked = check_binned(probs, num_bins, binning, "confidence", 1)
    profile = exact_profile(*top_confidence(checked, as_targets(targets, checked), 1))
    groups = groups_of(profile, num_bins, binning)
    counts, confidence, hits = (groups.sums(values) for values in profile[1:])
    return ReliabilityBins(groups.edges, counts.long(), confidence / counts, hits / counts)


def expected_calibration_error(
    probs: Array,
    targets: Array,
    num_bins: int = 15,
    binning: Binning = "equal_width",
    kind: Kind = "confidence",
    *,
    top_k: int = 1,
) -> float:
    """ECE: Σ_b (n_b/N) |accuracy_b − confidence_b|, between 0 and 1.

    Classwise, every class's probability is compared with how often that class comes, and the C errors are averaged.
    Chance alone makes this positive: read it beside `calibration_null`.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).
        num_bins: Number of bins.
        binning: "equal_width" or "equal_mass", see the module's text.
        kind: "confidence", of the predicted class alone ("top_label" is accepted too), or "classwise".
        top_k: How many of the most probable classes count together, at most C; top label only.

    Raises:
        ValueError: If an argument is malformed.

    Reference: Naeini et al. 2015; Guo et al. 2017; classwise: Kull et al. 2019; equal mass: Nguyen, O'Connor 2015;
    top k: Gupta et al. 2021.

    Example:
        >>> probs = torch.tensor([[0.75, 0.25], [0.75, 0.25]])
        >>> expected_calibration_error(probs, torch.tensor([0, 1]))
        0.25
    """
    return calibration_statistic("ece", probs, targets, num_bins, binning, kind, top_k)


def maximum_calibration_error(
    probs: Array,
    targets: Array,
    num_bins: int = 15,
    binning: Binning = "equal_width",
    kind: Kind = "confidence",
    *,
    top_k: int = 1,
) -> float:
    """MCE: the largest |accuracy_b − confidence_b| of the bins that are not empty; bins with few examples rule it.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).
        num_bins: Number of bins.
        binning: "equal_width" or "equal_mass", see the module's text.
        kind: "confidence" or "classwise" (the largest over all classes).
        top_k: How many of the most probable classes count together, at most C; top label only.

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> probs = torch.tensor([[0.75, 0.25], [1.0, 0.0]])
        >>> maximum_calibration_error(probs, torch.tensor([1, 0]), num_bins=10)
        0.75
    """
    return calibration_statistic("mce", probs, targets, num_bins, binning, kind, top_k)


def confidence_gap(probs: Array, targets: Array, *, top_k: int = 1) -> float:
    """Mean confidence minus accuracy: positive when over-confident on average, negative when under-confident.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).
        top_k: How many of the most probable classes count together, at most C.

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> confidence_gap(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1]))
        0.25
    """
    return calibration_statistic("gap", probs, targets, top_k=top_k)


def debiased_calibration_error(
    probs: Array, targets: Array, num_bins: int = 15, binning: Binning = "equal_mass", *, top_k: int = 1
) -> float:
    """Root mean square calibration error, less the part that chance adds.

    The root of Σ_b (n_b/N) [(accuracy_b − confidence_b)² − accuracy_b (1 − accuracy_b)/(n_b − 1)], or 0 where that
    sum is negative.

    What is taken off is the sampling variance of each bin's accuracy. Bins of one example have no such estimate and do
    not count.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).
        num_bins: Number of bins.
        binning: "equal_width" or "equal_mass", see the module's text.
        top_k: How many of the most probable classes count together, at most C.

    Raises:
        ValueError: If an argument is malformed.

    Reference: Kumar, Liang, Ma, *Verified uncertainty calibration*, 2019.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1]] * 4)
        >>> round(debiased_calibration_error(probs, torch.tensor([0, 0, 1, 1])) ** 2, 4)
        0.0767
    """
    return calibration_statistic("debiased", probs, targets, num_bins, binning, top_k=top_k)


def smooth_calibration_error(probs: Array, targets: Array, *, top_k: int = 1) -> float:
    """smECE: the calibration error with a Gaussian kernel in place of bins, as wide as the error itself.

    The kernel is reflected at zero and one. It lives on a grid of 4,096 points, so errors below about 0.001 are coarse.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).
        top_k: How many of the most probable classes count together, at most C.

    Raises:
        ValueError: If an argument is malformed.

    Reference: Błasiok, Nakkiran, *Smooth ECE: principled reliability diagrams via kernel smoothing*, 2023.

    Example:
        >>> probs = torch.tensor([[0.75, 0.25], [0.75, 0.25]])
        >>> round(smooth_calibration_error(probs, torch.tensor([0, 1])), 4)
        0.25
    """
    return calibration_statistic("smooth", probs, targets, top_k=top_k)


def ks_calibration_error(probs: Array, targets: Array, *, top_k: int = 1) -> float:
    """Largest distance between cumulative confidence and cumulative accuracy, examples sorted by confidence.

    max_c |(1/N) Σ_{i: c_i ≤ c} (c_i − hit_i)|. Free of bins, and at least |mean confidence − accuracy|.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).
        top_k: How many of the most probable classes count together, at most C.

    Raises:
        ValueError: If an argument is malformed.

    Reference: Gupta et al., *Calibration of neural networks using splines*, 2021; Arrieta-Ibarra et al. 2022.

    Example:
        >>> probs = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
        >>> ks_calibration_error(probs, torch.tensor([0, 0]))
        0.375
    """
    return calibration_statistic("ks", probs, targets, top_k=top_k)


def calibration_statistic(
    name: str,
    probs: Array,
    targets: Array,
    num_bins: int = 15,
    binning: Binning = "equal_width",
    kind: Kind = "confidence",
    top_k: int = 1,
) -> float:
    """The statistic of this name from the labels that came."""
    checked = check_binned(probs, num_bins, binning, kind, top_k)
    labels = as_targets(targets, checked)
    if kind == "classwise":
        cells = class_cells(checked, num_bins, binning)
        return class_statistic(name, cells, observed_hits(cells, labels)).item()
    profile = exact_profile(*top_confidence(checked, labels, top_k))
    return profile_statistic(name, profile, groups_of(profile, num_bins, binning)).item()


def check_binned(probs: Array, num_bins: int, binning: Binning, kind: Kind, top_k: int) -> Tensor:
    """Checked probabilities, and settings that fit them."""
    check_positive_int(num_bins, "num_bins")
    check_choice(binning, "binning", BINNINGS)
    if kind != FORMER_KIND:
        check_choice(kind, "kind", KINDS)
    checked = as_probs(probs)
    check_positive_int(top_k, "top_k")
    if top_k > checked.shape[1]:
        raise ValueError(f"`top_k` must be at most the number of classes, {checked.shape[1]}, got {top_k}.")
    if kind == "classwise" and top_k > 1:
        raise ValueError(f'`top_k` must be 1 for the kind "classwise", got {top_k}.')
    return checked


def profile_statistic(name: str, profile: Profile, groups: Groups) -> Tensor:
    """The statistic of this name for a profile whose counts, sums and hits are (..., K), as (...)."""
    place, counts, confidence_sum, hits = profile
    residual = confidence_sum - hits  # (..., K)
    total = counts.sum(dim=-1)
    if name == "gap":
        return residual.sum(dim=-1) / total
    if name == "ks":
        return residual.cumsum(dim=-1).abs().amax(dim=-1) / total
    if name == "smooth":
        return smooth_error(place, residual / total[..., None])
    difference, size = groups.sums(residual), groups.sums(counts)
    if name == "ece":
        return difference.abs().sum(dim=-1) / total
    if name == "mce":
        return (difference.abs() / size.clamp(min=1)).amax(dim=-1)
    accuracy = groups.sums(hits) / size.clamp(min=1)
    chance = accuracy * (1 - accuracy) / (size - 1).clamp(min=1)
    excess = torch.where(size > 1, size * ((difference / size.clamp(min=1)).square() - chance), 0.0)
    return (excess.sum(dim=-1) / total).clamp(min=0).sqrt()


def class_statistic(name: str, cells: ClassCells, hits: Tensor) -> Tensor:
    """The statistic "ece" or "mce" over all classes for hits (..., cells), as (...)."""
    difference = (cells.confidence_sum - hits).abs()  # (..., cells)
    if name == "ece":
        return difference.sum(dim=-1) / cells.index.numel()
    return (difference / cells.counts.clamp(min=1)).amax(dim=-1)
