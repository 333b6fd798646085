"""Calibration of the top label for examples with weights or clusters, see `SampleDesign`."""

import math

import scipy
import torch
from torch import Tensor

from bayes_kf.evaluation.calibration.confidence_profile import (
    Profile,
    exact_profile,
    profile_bins,
    top_confidence,
)
from bayes_kf.evaluation.calibration.intervals import bounded_interval
from bayes_kf.evaluation.calibration.null_distribution import BinsWithBands, profile_tests
from bayes_kf.evaluation.calibration.score_summary import LEVEL, STATISTICS
from bayes_kf.evaluation.calibration.spiegelhalter import spiegelhalter_parts
from bayes_kf.evaluation.resampling.binning import EDGE_TOLERANCE, bin_index
from bayes_kf.evaluation.resampling.null_test import NullSettings, null_quantiles
from bayes_kf.evaluation.resampling.sample_design import SampleDesign
from bayes_kf.evaluation.score import Interval, Score

UNKNOWN = ("ece_debiased",)  # its correction is for independent examples


def designed_scores(
    probs: Tensor, labels: Tensor, top_k: int, settings: NullSettings, design: SampleDesign
) -> dict[str, Score]:
    """Calibration scores with null bands; of the k most probable classes the ECE alone if k > 1.

    With too few clusters the bands hold every value.
    """
    confidence, hit = top_confidence(probs, labels, top_k)
    selected = {name: value for name, value in STATISTICS.items() if name not in UNKNOWN}
    selected = selected if top_k == 1 else {f"ece_top{top_k}": STATISTICS["ece"]}

    def simulate(narrow: Profile) -> Tensor:
        cells = (torch.searchsorted(narrow.confidence, confidence, right=True) - 1).clamp(min=0)
        return narrow.confidence_sum + design.simulated(confidence, hit, cells, settings)

    profile = exact_profile(confidence, hit, design.weights)
    tests = profile_tests(profile, tuple(selected.values()), settings, LEVEL, simulate)
    count, total, squares, _ = design.equivalent(confidence - hit)
    gap = bounded_interval(total, squares, count, -1.0, 1.0, LEVEL)
    intervals = {"confidence_gap": gap}
    if not design.has_bands:
        bands = {name: Interval(-1.0 if name == "confidence_gap" else 0.0, 1.0) for name in selected}
        return {
            name: Score(test.value, intervals.get(name), bands[name])
            for name, test in zip(selected, tests, strict=True)
        }
    return {name: test.score(intervals.get(name)) for name, test in zip(selected, tests, strict=True)}


def designed_spiegelhalter(probs: Tensor, labels: Tensor, design: SampleDesign) -> Score:
    """Spiegelhalter's z with the variance between clusters, or of weighted examples under calibration."""
    excess, variance = spiegelhalter_parts(probs, labels)
    if not design.has_bands:
        return Score(math.nan)
    if design.is_clustered:
        spread = design.cluster_sums(design.weights * excess).square().sum()
    else:
        spread = (design.weights.square() * variance).sum()
    z = float((design.weights * excess).sum() / spread.sqrt()) if spread > 0 else 0.0
    return Score(z, p_value=2 * float(scipy.stats.norm.sf(abs(z))))


def designed_bins(
    probs: Tensor, labels: Tensor, settings: NullSettings, design: SampleDesign, level: float = LEVEL
) -> BinsWithBands:
    """Bins of equal width of the confidence, with null bands."""
    confidence, hit = top_confidence(probs, labels, 1)
    profile = exact_profile(confidence, hit, design.weights)
    bins = profile_bins(profile, settings.num_bins, "equal_width")
    cells = bin_index(confidence + EDGE_TOLERANCE, bins.edges)
    weight, said, right = (bins.sums(values) for values in profile[1:])
    counts = torch.bincount(cells, minlength=bins.num_bins)
    used = weight > 0
    mean = said / weight
    simulated = design.simulated(confidence, hit, cells, settings)
    padded = torch.zeros(len(simulated), bins.num_bins, dtype=torch.float64)
    padded[:, : simulated.shape[1]] = simulated
    low, high = null_quantiles(mean + padded / weight, ((1 - level) / 2, (1 + level) / 2))
    if not design.has_bands:
        low, high = torch.zeros_like(low), torch.ones_like(high)
    edges = torch.stack([bins.edges[:-1], bins.edges[1:]], dim=1)
    columns = (edges, counts, mean, right / weight, low.clamp(0, 1), high.clamp(0, 1))
    return BinsWithBands(*(column[used] for column in columns))
