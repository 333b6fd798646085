"""Confidences in order, and how many of each came true: all that the calibration of the top label looks at.

A *profile* holds cells of (nearly) equal confidence. Where there are no more distinct confidences than `MAX_CELLS` each
is a cell of its own; more are put into about as many narrow cells, finer towards zero and one and where there are many,
when chance is simulated. Inside a cell the variance of the number of hits is then binomial to a part in a thousand or
better, so that simulating a data set takes one binomial number for each cell and not one for each example.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayes_kf.evaluation.resampling.binning import EDGE_TOLERANCE, Binning, equal_width_edges, place

MAX_CELLS = 4096
MASS_CELLS = 1024  # at least, of equal mass
LINEAR_CELLS = 2048
LOGIT_CELLS = 1600  # between −LOGIT_RANGE and LOGIT_RANGE
STREAM_CELLS = 2**16  # of either kind, where sums of a stream are kept
LOGIT_RANGE = 28.0


class Profile(NamedTuple):
    """Cells of confidence in ascending order, none of them empty; each field is (K,)."""

    place: Tensor  # a confidence inside the cell; bins are told apart by it
    counts: Tensor
    confidence_sum: Tensor
    hits: Tensor

    @property
    def num_examples(self) -> float:
        """Number of examples in all cells."""
        return self.counts.sum().item()


class Groups(NamedTuple):
    """Bins of a profile's cells."""

    edges: Tensor  # (G + 1,)
    bins: Tensor  # (K,) the bin of each cell

    @property
    def num_groups(self) -> int:
        """Number of bins, empty ones included."""
        return len(self.edges) - 1

    def sums(self, values: Tensor) -> Tensor:
        """Sums of the cells of each bin, (..., K) → (..., G)."""
        total = torch.zeros(*values.shape[:-1], self.num_groups, dtype=torch.float64)
        return total.index_add_(-1, self.bins, values.expand(*values.shape[:-1], len(self.bins)).double())


def top_confidence(probs: Tensor, targets: Tensor | None, top_k: int) -> tuple[Tensor, Tensor]:
    """Probability given to the `top_k` most probable classes, (N,), and whether the label was among them, (N,).

    Among equal probabilities the first classes count. Without targets nothing is a hit.
    """
    if top_k == 1:
        confidence, chosen = probs.max(dim=1)
        hit = torch.zeros_like(confidence) if targets is None else (chosen == targets).double()
        return confidence.clamp(max=1), hit
    values, order = probs.sort(dim=1, descending=True, stable=True)
    confidence = values[:, :top_k].sum(dim=1).clamp(max=1)
    hit = torch.zeros_like(confidence) if targets is None else (order[:, :top_k] == targets[:, None]).any(1).double()
    return confidence, hit


def exact_profile(confidence: Tensor, hit: Tensor) -> Profile:
    """A cell for each distinct confidence."""
    values, inverse = confidence.unique(return_inverse=True)
    counts = torch.bincount(inverse).double()
    return Profile(values, counts, values * counts, torch.bincount(inverse, weights=hit))


def narrow_edges(num_bins: int) -> Tensor:
    """Edges of narrow cells that never straddle a bin of equal width, (≤ MAX_CELLS,), from zero to one."""
    return _edges(num_bins, LINEAR_CELLS, LOGIT_CELLS)


def stream_edges(num_bins: int) -> Tensor:
    """Edges of the cells of a stream, about 130,000 from zero to one, otherwise as `narrow_edges`."""
    return _edges(num_bins, STREAM_CELLS, STREAM_CELLS)


def _edges(num_bins: int, num_linear: int, num_logit: int) -> Tensor:
    """Edges at even steps of the confidence, at even steps of its logit, and where bins of equal width begin."""
    logits = torch.linspace(-LOGIT_RANGE, LOGIT_RANGE, num_logit + 1, dtype=torch.float64)
    bins = equal_width_edges(num_bins)[1:-1] - EDGE_TOLERANCE
    linear = torch.linspace(0, 1, num_linear + 1, dtype=torch.float64)
    return torch.cat([linear, logits.sigmoid(), bins]).unique()


def narrow_profile(profile: Profile, num_bins: int) -> Profile:
    """The same with about `MAX_CELLS` cells at most; as it is where it has no more.

    Cells also begin wherever a bin of equal mass does, and at even steps of mass, so that confidences that lie close
    together are told apart.
    """
    if len(profile.counts) <= MAX_CELLS:
        return profile
    total, steps = int(profile.num_examples), num_bins * math.ceil(MASS_CELLS / num_bins)  # all bins' starts are steps
    starts = torch.arange(steps) * total // steps
    cells = torch.searchsorted(profile.counts.cumsum(0), starts.double(), right=True).unique()
    index = place(profile.place, torch.cat([narrow_edges(num_bins), profile.place[cells]]).unique())
    used, inverse = index.unique(return_inverse=True)
    sums = [torch.bincount(inverse, weights=values) for values in profile[1:]]
    lowest = torch.ones(len(used), dtype=torch.float64).scatter_reduce(0, inverse, profile.place, "amin")
    return Profile(lowest, *sums)


def groups_of(profile: Profile, num_bins: int, binning: Binning) -> Groups:
    """Bins of equal width or of equal mass, see `calibration`."""
    if binning == "equal_width":
        edges = equal_width_edges(num_bins)
        return Groups(edges, place(profile.place + EDGE_TOLERANCE, edges))
    starts = torch.arange(num_bins) * int(profile.num_examples) // num_bins
    cell = torch.searchsorted(profile.counts.cumsum(0), starts.double(), right=True).unique()
    index = torch.searchsorted(cell, torch.arange(len(profile.counts)), right=True) - 1
    return Groups(torch.cat([profile.place[cell], profile.place[-1:]]), index)


def simulated_profile_hits(profile: Profile, num_simulations: int, seed: int) -> Tensor:
    """Hits in each cell of perfectly calibrated data sets, (R, K)."""
    shares = (profile.confidence_sum / profile.counts).clamp(0, 1)
    rng = np.random.default_rng(seed)
    counts = profile.counts.long().numpy()
    return torch.from_numpy(rng.binomial(counts, shares.numpy(), (num_simulations, len(counts)))).double()
