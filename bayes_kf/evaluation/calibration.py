"""Calibration errors: how far confidence and accuracy lie apart.

Bins of equal width are closed below and open above, the last one closed on both sides: [0, 1/b), …, [1 − 1/b, 1]. A
confidence within 1e-7 below an edge counts as on it. (torchmetrics gives confidence exactly 1 a bin of its own; here,
as in NumPy's histograms, it belongs to the last one. Otherwise the two agree.)

Bins of equal mass start at the sorted confidences number 0, n/b, 2n/b, …; equal confidences are never split, so bins
with many ties are larger and there may be fewer bins than asked for.
"""

from typing import NamedTuple

from torch import Tensor

from bayes_kf.evaluation._inputs import Array, as_probs, as_targets, check_choice, check_positive_int
from bayes_kf.evaluation.binning import BINNINGS, KINDS, Binning, Cells, Kind, make_cells, observed_hits


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
        >>> import torch
        >>> bins = reliability_bins(torch.tensor([[0.8, 0.2], [0.3, 0.7]]), torch.tensor([0, 0]), num_bins=2)
        >>> bins.counts.tolist(), bins.accuracy.tolist()
        ([0, 2], [nan, 0.5])
    """
    checked, cells = checked_cells(probs, num_bins, binning, "top_label")
    hits = observed_hits(cells, checked, as_targets(targets, checked))
    edges = cells.edges[0]
    used = slice(0, len(edges) - 1)
    counts = cells.counts[used]
    return ReliabilityBins(edges, counts.long(), cells.confidence_sum[used] / counts, hits[used] / counts)


def expected_calibration_error(
    probs: Array, targets: Array, num_bins: int = 15, binning: Binning = "equal_width", kind: Kind = "top_label"
) -> float:
    """ECE: Σ_b (n_b/N) |accuracy_b − confidence_b|, between 0 and 1.

    Classwise, every class's probability is compared with how often that class comes, and the C errors are averaged.
    Chance alone makes this positive: read it beside `calibration_null`.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).
        num_bins: Number of bins.
        binning: "equal_width" or "equal_mass", see the module's text.
        kind: "top_label" or "classwise".

    Raises:
        ValueError: If an argument is malformed.

    Reference: Naeini et al. 2015; Guo et al. 2017; classwise: Kull et al. 2019; equal mass: Nguyen, O'Connor 2015.

    Example:
        >>> import torch
        >>> probs = torch.tensor([[0.75, 0.25], [0.75, 0.25]])
        >>> expected_calibration_error(probs, torch.tensor([0, 1]))
        0.25
    """
    return _statistic_value("ece", probs, targets, num_bins, binning, kind)


def maximum_calibration_error(
    probs: Array, targets: Array, num_bins: int = 15, binning: Binning = "equal_width", kind: Kind = "top_label"
) -> float:
    """MCE: the largest |accuracy_b − confidence_b| of the bins that are not empty; bins with few examples rule it.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).
        num_bins: Number of bins.
        binning: "equal_width" or "equal_mass", see the module's text.
        kind: "top_label" or "classwise" (the largest over all classes).

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> import torch
        >>> probs = torch.tensor([[0.75, 0.25], [1.0, 0.0]])
        >>> maximum_calibration_error(probs, torch.tensor([1, 0]), num_bins=10)
        0.75
    """
    return _statistic_value("mce", probs, targets, num_bins, binning, kind)


def confidence_gap(probs: Array, targets: Array) -> float:
    """Mean confidence minus accuracy: positive when over-confident on average, negative when under-confident.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> import torch
        >>> confidence_gap(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1]))
        0.25
    """
    return _statistic_value("gap", probs, targets, 1, "equal_width", "top_label")


def checked_cells(probs: Array, num_bins: int, binning: Binning, kind: Kind) -> tuple[Tensor, Cells]:
    """Checked probabilities and their cells."""
    check_positive_int(num_bins, "num_bins")
    check_choice(binning, "binning", BINNINGS)
    check_choice(kind, "kind", KINDS)
    checked = as_probs(probs)
    return checked, make_cells(checked, num_bins, binning, kind)


def statistic_of(name: str, cells: Cells, hits: Tensor) -> Tensor:
    """The statistic "ece", "mce" or "gap" for hits (..., cells), as (...)."""
    difference = cells.confidence_sum - hits  # (..., cells)
    if name == "ece":
        return difference.abs().sum(dim=-1) / cells.index.numel()
    if name == "gap":
        return difference.sum(dim=-1) / cells.index.numel()
    used = cells.counts > 0
    return (difference[..., used].abs() / cells.counts[used]).amax(dim=-1)


def _statistic_value(name: str, probs: Array, targets: Array, num_bins: int, binning: Binning, kind: Kind) -> float:
    """The statistic of the labels that came."""
    checked, cells = checked_cells(probs, num_bins, binning, kind)
    hits = observed_hits(cells, checked, as_targets(targets, checked))
    return statistic_of(name, cells, hits).item()
