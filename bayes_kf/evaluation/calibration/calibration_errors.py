"""Calibration errors: the distance between confidence and accuracy.

Bins of equal width are closed below and open above; the last one is closed on both sides: [0, 1/b), …, [1 − 1/b, 1].
A confidence within 1e-7 below an edge counts as on the edge. A confidence of exactly 1 belongs to the last bin, as in
NumPy's histograms; torchmetrics gives it a bin of its own. Otherwise the two agree.

Bins of equal mass start at the sorted confidences number 0, n/b, 2n/b, …. Equal confidences share a bin, so with many
ties some bins are larger and there may be fewer bins than requested.

With `top_k` the confidence is the total probability of the k most probable classes, and the accuracy is the share of
examples whose label is among them.
"""

from typing import NamedTuple

from torch import Tensor

from bayes_kf.evaluation.calibration.confidence_profile import exact_profile, profile_bins, top_confidence
from bayes_kf.evaluation.calibration.statistics import calibration_statistic, check_binned
from bayes_kf.evaluation.inputs import Array, as_targets
from bayes_kf.evaluation.resampling.binning import Binning, Kind


class ReliabilityBins(NamedTuple):
    """Confidence and accuracy of the top label in each bin; NaN where a bin is empty."""

    edges: Tensor  # (bins + 1,)
    counts: Tensor  # (bins,) int64
    confidence: Tensor  # (bins,)
    accuracy: Tensor  # (bins,)


def reliability_bins(
    probs: Array, targets: Array, num_bins: int = 15, binning: Binning = "equal_width"
) -> ReliabilityBins:
    """Confidence and accuracy of the most probable class in each bin; ties are broken in favour of the first class.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).
        num_bins: Number of bins; for equal mass, the maximum number.
        binning: "equal_width" or "equal_mass", see the description of this module.

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> import torch
        >>> bins = reliability_bins(torch.tensor([[0.8, 0.2], [0.3, 0.7]]), torch.tensor([0, 0]), num_bins=2)
        >>> bins.counts.tolist(), bins.accuracy.tolist()
        ([0, 2], [nan, 0.5])
    """
    checked = check_binned(probs, num_bins, binning, "confidence", 1)
    profile = exact_profile(*top_confidence(checked, as_targets(targets, checked), 1))
    bins = profile_bins(profile, num_bins, binning)
    counts, confidence, hits = (bins.sums(values) for values in profile[1:])
    return ReliabilityBins(bins.edges, counts.long(), confidence / counts, hits / counts)


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

    The classwise ECE compares each class's probability with the frequency of that class and averages the C errors. The
    ECE of a perfectly calibrated model is positive in a finite sample; `calibration_null` gives its null band.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).
        num_bins: Number of bins.
        binning: "equal_width" or "equal_mass", see the description of this module.
        kind: "confidence" (the predicted class only; "top_label" means the same) or "classwise".
        top_k: k of the confidence, the total probability of the k most probable classes; 1 if classwise.

    Raises:
        ValueError: If an argument is malformed.

    Reference: Naeini et al. 2015; Guo et al. 2017; classwise: Kull et al. 2019; equal mass: Nguyen, O'Connor 2015;
    top k: Gupta et al. 2021.

    Example:
        >>> import torch
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
    """MCE: max_b |accuracy_b − confidence_b| over the bins that are not empty.

    Bins with few examples dominate it.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).
        num_bins: Number of bins.
        binning: "equal_width" or "equal_mass", see the description of this module.
        kind: "confidence" or "classwise" (the maximum over all classes).
        top_k: k of the confidence, the total probability of the k most probable classes; 1 if classwise.

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> import torch
        >>> probs = torch.tensor([[0.75, 0.25], [1.0, 0.0]])
        >>> maximum_calibration_error(probs, torch.tensor([1, 0]), num_bins=10)
        0.75
    """
    return calibration_statistic("mce", probs, targets, num_bins, binning, kind, top_k)


def confidence_gap(probs: Array, targets: Array, *, top_k: int = 1) -> float:
    """Mean confidence minus accuracy: positive if over-confident on average, negative if under-confident.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).
        top_k: k of the confidence, the total probability of the k most probable classes.

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> import torch
        >>> confidence_gap(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1]))
        0.25
    """
    return calibration_statistic("gap", probs, targets, top_k=top_k)


def debiased_calibration_error(
    probs: Array, targets: Array, num_bins: int = 15, binning: Binning = "equal_mass", *, top_k: int = 1
) -> float:
    """Root mean square calibration error without the bias from sampling.

    The square root of Σ_b (n_b/N) [(accuracy_b − confidence_b)² − accuracy_b (1 − accuracy_b)/(n_b − 1)], or 0 if the
    sum is negative. The subtracted term estimates the sampling variance of the bin's accuracy. Bins of one example have
    no such estimate and are left out.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).
        num_bins: Number of bins.
        binning: "equal_width" or "equal_mass", see the description of this module.
        top_k: k of the confidence, the total probability of the k most probable classes.

    Raises:
        ValueError: If an argument is malformed.

    Reference: Kumar, Liang, Ma, *Verified uncertainty calibration*, 2019.

    Example:
        >>> import torch
        >>> probs = torch.tensor([[0.9, 0.1]] * 4)
        >>> round(debiased_calibration_error(probs, torch.tensor([0, 0, 1, 1])) ** 2, 4)
        0.0767
    """
    return calibration_statistic("debiased", probs, targets, num_bins, binning, top_k=top_k)


def smooth_calibration_error(probs: Array, targets: Array, *, top_k: int = 1) -> float:
    """smECE: the calibration error with a Gaussian kernel instead of bins; the kernel is as wide as the error.

    The kernel is reflected at zero and one. It is evaluated on 4,096 points, so errors below about 0.001 are imprecise.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).
        top_k: k of the confidence, the total probability of the k most probable classes.

    Raises:
        ValueError: If an argument is malformed.

    Reference: Błasiok, Nakkiran, *Smooth ECE: principled reliability diagrams via kernel smoothing*, 2023.

    Example:
        >>> import torch
        >>> probs = torch.tensor([[0.75, 0.25], [0.75, 0.25]])
        >>> round(smooth_calibration_error(probs, torch.tensor([0, 1])), 4)
        0.25
    """
    return calibration_statistic("smooth", probs, targets, top_k=top_k)


def ks_calibration_error(probs: Array, targets: Array, *, top_k: int = 1) -> float:
    """Largest distance between cumulative confidence and cumulative accuracy over examples sorted by confidence.

    max_c |(1/N) Σ_{i: c_i ≤ c} (c_i − hit_i)|. It needs no bins and is at least |mean confidence − accuracy|.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).
        top_k: k of the confidence, the total probability of the k most probable classes.

    Raises:
        ValueError: If an argument is malformed.

    Reference: Gupta et al., *Calibration of neural networks using splines*, 2021; Arrieta-Ibarra et al. 2022.

    Example:
        >>> import torch
        >>> probs = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
        >>> ks_calibration_error(probs, torch.tensor([0, 0]))
        0.375
    """
    return calibration_statistic("ks", probs, targets, top_k=top_k)
