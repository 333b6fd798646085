"""Calibration statistics by name, of one data set or of many simulated ones."""

from typing import Literal

import torch
from torch import Tensor

from bayes_kf.evaluation.calibration.confidence_profile import (
    Profile,
    ProfileBins,
    exact_profile,
    profile_bins,
    top_confidence,
)
from bayes_kf.evaluation.calibration.smooth_ece import smooth_error
from bayes_kf.evaluation.inputs import Array, as_probs, as_targets, check_choice, check_positive_int
from bayes_kf.evaluation.resampling.binning import (
    BINNINGS,
    KIND_ALIAS,
    KINDS,
    Binning,
    ClasswiseBins,
    Kind,
    classwise_bins,
    observed_hits,
)

Statistic = Literal["ece", "mce", "gap", "debiased", "smooth", "ks"]
STATISTICS = ("ece", "mce", "gap", "debiased", "smooth", "ks")
CLASSWISE = ("ece", "mce")


def calibration_statistic(
    name: str,
    probs: Array,
    targets: Array,
    num_bins: int = 15,
    binning: Binning = "equal_width",
    kind: Kind = "confidence",
    top_k: int = 1,
) -> float:
    """The statistic of this name for the observed labels."""
    checked = check_binned(probs, num_bins, binning, kind, top_k)
    labels = as_targets(targets, checked)
    if kind == "classwise":
        bins = classwise_bins(checked, num_bins, binning)
        return class_statistic(name, bins, observed_hits(bins, labels)).item()
    profile = exact_profile(*top_confidence(checked, labels, top_k))
    return profile_statistic(name, profile, profile_bins(profile, num_bins, binning)).item()


def check_binned(probs: Array, num_bins: int, binning: Binning, kind: Kind, top_k: int) -> Tensor:
    """Checked probabilities; raises a ValueError if a setting is malformed or does not fit them."""
    check_positive_int(num_bins, "num_bins")
    check_choice(binning, "binning", BINNINGS)
    if kind != KIND_ALIAS:
        check_choice(kind, "kind", KINDS)
    checked = as_probs(probs)
    check_positive_int(top_k, "top_k")
    if top_k > checked.shape[1]:
        raise ValueError(f"`top_k` must be at most the number of classes, {checked.shape[1]}, got {top_k}.")
    if kind == "classwise" and top_k > 1:
        raise ValueError(f'`top_k` must be 1 for the kind "classwise", got {top_k}.')
    return checked


def profile_statistic(name: str, profile: Profile, bins: ProfileBins) -> Tensor:
    """The statistic of this name, (...), of one or several data sets: counts, sums and hits are (..., K).

    With d_b = |accuracy_b − confidence_b| in a bin of n_b examples: "ece" Σ_b (n_b/N) d_b, "mce" max_b d_b, "debiased"
    the root of Σ_b (n_b/N) [d_b² − accuracy_b (1 − accuracy_b)/(n_b − 1)]. Without bins: "gap", "ks", "smooth".
    """
    confidence, counts, confidence_sum, hits = profile
    residual = confidence_sum - hits  # (..., K)
    total = counts.sum(dim=-1)
    if name == "gap":
        return residual.sum(dim=-1) / total
    if name == "ks":
        return residual.cumsum(dim=-1).abs().amax(dim=-1) / total
    if name == "smooth":
        return smooth_error(confidence, residual / total[..., None])
    difference, size = bins.sums(residual), bins.sums(counts)
    if name == "ece":
        return difference.abs().sum(dim=-1) / total
    if name == "mce":
        return (difference.abs() / size.clamp(min=1)).amax(dim=-1)
    accuracy = bins.sums(hits) / size.clamp(min=1)
    sampling_var = accuracy * (1 - accuracy) / (size - 1).clamp(min=1)
    excess = torch.where(size > 1, size * ((difference / size.clamp(min=1)).square() - sampling_var), 0.0)
    return (excess.sum(dim=-1) / total).clamp(min=0).sqrt()


def class_statistic(name: str, bins: ClasswiseBins, hits: Tensor) -> Tensor:
    """The statistic "ece" or "mce" over all classes for hits (..., bins), as (...)."""
    difference = (bins.confidence_sum - hits).abs()  # (..., bins)
    if name == "ece":
        return difference.sum(dim=-1) / bins.index.numel()
    return (difference / bins.counts.clamp(min=1)).amax(dim=-1)
