"""The confidence profile: confidences in ascending order with counts and hits, which determine top-label calibration.

A *hit* is an example whose label is among its k most probable classes. A profile stores cells of (nearly) equal
confidence. Up to `MAX_CELLS` distinct confidences have a cell each. For the simulation of a null distribution, more of
them are merged into about `MAX_CELLS` narrow cells, which are finer near zero and one and where many confidences lie.
The number of hits of such a cell is binomial up to a relative error of 1e-3 in its variance, so a simulated data set
takes one binomial number per cell instead of one label per example.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayes_kf.evaluation.resampling.binning import EDGE_TOLERANCE, Binning, bin_index, equal_width_edges

MAX_CELLS = 4096
MASS_CELLS = 1024  # minimum number of cells of equal mass
LINEAR_CELLS = 2048  # cells at even steps of the confidence
LOGIT_CELLS = 1600  # cells at even steps of its logit, between −LOGIT_RANGE and LOGIT_RANGE
STREAM_CELLS = 2**16  # of either kind, for the sums of a stream
LOGIT_RANGE = 28.0


class Profile(NamedTuple):
    """Cells of confidence in ascending order, none of them empty; each field is (K,)."""

    confidence: Tensor  # one confidence of the cell, which decides the cell's bin
    counts: Tensor
    confidence_sum: Tensor
    hits: Tensor

    @property
    def num_examples(self) -> float:
        """Number of examples in all cells."""
        return self.counts.sum().item()


class ProfileBins(NamedTuple):
    """Bins of a profile's cells."""

    edges: Tensor  # (B + 1,)
    cell_bins: Tensor  # (K,) the bin of each cell

    @property
    def num_bins(self) -> int:
        """Number of bins, with empty ones."""
        return len(self.edges) - 1

    def sums(self, values: Tensor) -> Tensor:
        """Sums over the cells of each bin, (..., K) → (..., B)."""
        total = torch.zeros(*values.shape[:-1], self.num_bins, dtype=torch.float64)
        return total.index_add_(-1, self.cell_bins, values.expand(*values.shape[:-1], len(self.cell_bins)).double())


def top_confidence(probs: Tensor, targets: Tensor | None, top_k: int) -> tuple[Tensor, Tensor]:
    """Total probability of the `top_k` most probable classes, (N,), and whether the label is among them, (N,).

    Ties are broken in favour of the first classes. Without targets, no example is a hit.
    """
    if top_k == 1:
        confidence, predicted = probs.max(dim=1)
        hit = torch.zeros_like(confidence) if targets is None else (predicted == targets).double()
        return confidence.clamp(max=1), hit
    largest = np.partition(probs.numpy(), -top_k, axis=1)[:, -top_k:]  # a fifth of the time of torch.topk
    confidence = torch.from_numpy(largest.sum(axis=1)).clamp(max=1)
    if targets is None:
        return confidence, torch.zeros_like(confidence)
    own = probs.gather(1, targets[:, None])
    before = (probs > own).sum(dim=1)
    tied = ((probs == own).sum(dim=1) > 1).nonzero()[:, 0]
    first = torch.arange(probs.shape[1]) < targets[tied, None]
    before[tied] += ((probs[tied] == own[tied]) & first).sum(dim=1)
    return confidence, (before < top_k).double()


def exact_profile(confidence: Tensor, hit: Tensor, weights: Tensor | None = None) -> Profile:
    """A profile with one cell for each distinct confidence; counts and hits are weighted if weights are given."""
    if weights is not None:
        confidence, hit, weights = confidence[weights > 0], (weights * hit)[weights > 0], weights[weights > 0]
    values, inverse = confidence.unique(return_inverse=True)
    counts = torch.bincount(inverse, weights).double()
    return Profile(values, counts, values * counts, torch.bincount(inverse, weights=hit))


def narrow_edges(num_bins: int) -> Tensor:
    """Edges of narrow cells from zero to one, (≤ MAX_CELLS,); no cell crosses an edge of an equal-width bin."""
    return _edges(num_bins, LINEAR_CELLS, LOGIT_CELLS)


def stream_edges(num_bins: int) -> Tensor:
    """Edges of the cells of a stream: like `narrow_edges`, but about 130,000 of them."""
    return _edges(num_bins, STREAM_CELLS, STREAM_CELLS)


def _edges(num_bins: int, num_linear: int, num_logit: int) -> Tensor:
    """Edges at even steps of the confidence, at even steps of its logit, and at the edges of equal-width bins."""
    logits = torch.linspace(-LOGIT_RANGE, LOGIT_RANGE, num_logit + 1, dtype=torch.float64)
    bins = equal_width_edges(num_bins)[1:-1] - EDGE_TOLERANCE
    linear = torch.linspace(0, 1, num_linear + 1, dtype=torch.float64)
    return torch.cat([linear, logits.sigmoid(), bins]).unique()


def coarse_profile(profile: Profile, num_bins: int) -> Profile:
    """The profile with at most about `MAX_CELLS` cells; a smaller one is returned as it is.

    Cells also start where an equal-mass bin starts and at even steps of mass, so that close confidences stay apart.
    """
    if len(profile.counts) <= MAX_CELLS:
        return profile
    total, steps = int(profile.num_examples), num_bins * math.ceil(MASS_CELLS / num_bins)  # bins start at some steps
    starts = torch.arange(steps) * total // steps
    cells = torch.searchsorted(profile.counts.cumsum(0), starts.double(), right=True).unique()
    edges = torch.cat([narrow_edges(num_bins), profile.confidence[cells]]).unique()
    used, inverse = bin_index(profile.confidence, edges).unique(return_inverse=True)
    sums = [torch.bincount(inverse, weights=values) for values in profile[1:]]
    lowest = torch.ones(len(used), dtype=torch.float64).scatter_reduce(0, inverse, profile.confidence, "amin")
    return Profile(lowest, *sums)


def profile_bins(profile: Profile, num_bins: int, binning: Binning) -> ProfileBins:
    """Bins of equal width or of equal mass, as `calibration.errors` defines them."""
    if binning == "equal_width":
        edges = equal_width_edges(num_bins)
        return ProfileBins(edges, bin_index(profile.confidence + EDGE_TOLERANCE, edges))
    starts = torch.arange(num_bins) * int(profile.num_examples) // num_bins
    cell = torch.searchsorted(profile.counts.cumsum(0), starts.double(), right=True).unique()
    index = torch.searchsorted(cell, torch.arange(len(profile.counts)), right=True) - 1
    return ProfileBins(torch.cat([profile.confidence[cell], profile.confidence[-1:]]), index)


def simulate_profile_hits(profile: Profile, num_simulations: int, seed: int) -> Tensor:
    """Hits of each cell in data sets of a perfectly calibrated model, (num_simulations, K)."""
    shares = (profile.confidence_sum / profile.counts).clamp(0, 1)
    rng = np.random.default_rng(seed)
    counts = profile.counts.long().numpy()
    return torch.from_numpy(rng.binomial(counts, shares.numpy(), (num_simulations, len(counts)))).double()
