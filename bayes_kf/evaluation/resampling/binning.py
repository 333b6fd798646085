"""Bins of probabilities, and simulated labels counted in them.

Classwise binning sorts the probabilities of every class into bins of that class. A *hit* of a bin is an example in it
whose label is the class. Every example is in one bin of each class and is a hit of one of them, so the classes are not
independent; their null distribution is simulated by drawing labels.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Binning = Literal["equal_width", "equal_mass"]
Kind = Literal["confidence", "classwise", "top_label"]
BINNINGS = ("equal_width", "equal_mass")
KINDS = ("confidence", "classwise")
KIND_ALIAS = "top_label"  # for "confidence"; elsewhere it means calibration within each predicted class

EDGE_TOLERANCE = 1e-7  # puts 0.7 on the edge 0.7 in float32 and in float64
ROW_BLOCK = 2**20  # probabilities per block of drawn labels: bounds memory; changing it changes the draws of a seed
DRAW_BLOCK = 2**20  # labels per block, likewise


@dataclass(frozen=True)
class ClasswiseBins:
    """The bins of every class that the examples are in, and the sums of each bin."""

    num_bins: int  # of one class
    index: Tensor  # (N, C) int64; the bins of class c start at c * num_bins
    counts: Tensor  # (C * num_bins,) examples in each bin
    confidence_sum: Tensor  # (C * num_bins,) sum of the probabilities

    @property
    def num_bins_total(self) -> int:
        """Number of bins of all classes together, with empty ones."""
        return len(self.counts)


def equal_width_edges(num_bins: int) -> Tensor:
    """Edges from zero to one, (num_bins + 1,)."""
    return torch.linspace(0, 1, num_bins + 1, dtype=torch.float64)


def bin_index(values: Tensor, edges: Tensor) -> Tensor:
    """The bin of each value: bins are closed below and open above; the last one is closed on both sides."""
    index = torch.searchsorted(edges[:-1].contiguous(), values.contiguous(), right=True) - 1
    return index.clamp(min=0)


def classwise_bins(probs: Tensor, num_bins: int, binning: Binning) -> ClasswiseBins:
    """The classwise bins of checked probabilities (N, C)."""
    num_classes = probs.shape[1]
    if binning == "equal_width":
        index = ((probs + EDGE_TOLERANCE) * num_bins).long().clamp_(max=num_bins - 1)
    else:
        index = torch.stack([_equal_mass_index(column, num_bins) for column in probs.unbind(dim=1)], dim=1)
    index += num_bins * torch.arange(num_classes)
    flat, total = index.flatten(), num_classes * num_bins
    return ClasswiseBins(
        num_bins=num_bins,
        index=index,
        counts=torch.bincount(flat, minlength=total).double(),
        confidence_sum=torch.bincount(flat, weights=probs.flatten(), minlength=total),
    )


def observed_hits(bins: ClasswiseBins, targets: Tensor) -> Tensor:
    """Hits of each bin for the observed labels, (bins,)."""
    return _count_hits(bins.index.gather(1, targets[:, None]), bins.num_bins_total)[0]


def simulate_hits(bins: ClasswiseBins, probs: Tensor, num_simulations: int, seed: int) -> Tensor:
    """Hits of each bin for labels drawn from the probabilities themselves, (num_simulations, bins)."""
    generator = torch.Generator().manual_seed(seed)
    hits = torch.zeros(num_simulations, bins.num_bins_total, dtype=torch.float64)
    rows = max(1, ROW_BLOCK // probs.shape[1])
    for start in range(0, len(probs), rows):
        block, index = probs[start : start + rows], bins.index[start : start + rows]
        cumulative = block.cumsum(dim=1)
        draws = max(1, DRAW_BLOCK // len(block))
        for first in range(0, num_simulations, draws):
            count = min(draws, num_simulations - first)
            labels = _draw_labels(cumulative, torch.rand(len(block), count, generator=generator))
            hits[first : first + count] += _count_hits(index.gather(1, labels), bins.num_bins_total)
    return hits


def sample_labels(probs: Tensor, num_draws: int, seed: int) -> Tensor:
    """Labels drawn from the probabilities (N, C) themselves, (N, num_draws)."""
    generator = torch.Generator().manual_seed(seed)
    return _draw_labels(probs.cumsum(dim=1), torch.rand(len(probs), num_draws, generator=generator))


def _equal_mass_index(values: Tensor, num_bins: int) -> Tensor:
    """The equal-mass bin of each value (N,); equal values share a bin."""
    ordered = values.sort().values
    starts = torch.arange(num_bins) * len(ordered) // num_bins
    edges = torch.cat([ordered[starts].unique(), ordered[-1:]])
    return bin_index(values, edges)


def _draw_labels(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """Labels by inversion of each row's distribution function, (n, R); a class of probability zero is never drawn."""
    return torch.searchsorted(cumulative, uniform.double() * cumulative[:, -1:], right=True)


def _count_hits(hit_bins: Tensor, num_bins_total: int) -> Tensor:
    """Number of hits of each bin for each column of `hit_bins` (n, R), as (R, bins)."""
    num_draws = hit_bins.shape[1]
    flat = (hit_bins + num_bins_total * torch.arange(num_draws)).flatten()
    return torch.bincount(flat, minlength=num_draws * num_bins_total).view(num_draws, num_bins_total)
