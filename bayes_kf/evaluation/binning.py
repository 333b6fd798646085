"""Predictions sorted into cells of similar confidence, and the labels that fall into them.

A *group* is one binned comparison: a single one for the top label, one for each class classwise. A *cell* is one bin of
one group. All calibration statistics are functions of the confidence in each cell and of its *hits*: how many of its
examples turned out to have the label in question. Hits of the real labels and of simulated ones go the same way.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Binning = Literal["equal_width", "equal_mass"]
Kind = Literal["top_label", "classwise"]
BINNINGS = ("equal_width", "equal_mass")
KINDS = ("top_label", "classwise")

EDGE_TOLERANCE = 1e-7  # so that 0.7 lies on the edge 0.7 whether it came as float32 or float64
ROW_BLOCK = 2**20  # numbers held at a time while labels are drawn: it bounds memory, and it is part of the seed
DRAW_BLOCK = 2**20


@dataclass(frozen=True)
class Cells:
    """Which cells each example lies in, and the confidence that was put there."""

    edges: tuple[Tensor, ...]  # for each group (bins + 1,), ascending
    index: Tensor  # (N, G) int64, cell of each example in each group; cells of group g start at g * num_bins
    counts: Tensor  # (G * num_bins,) examples in each cell
    confidence_sum: Tensor  # (G * num_bins,) sum of their confidences

    @property
    def num_cells(self) -> int:
        """Number of cells of all groups together, empty ones included."""
        return len(self.counts)


def make_cells(probs: Tensor, num_bins: int, binning: Binning, kind: Kind) -> Cells:
    """Cells of checked probabilities (N, C)."""
    confidences = probs.max(dim=1, keepdim=True).values if kind == "top_label" else probs  # (N, G)
    columns = [_bin_column(column, num_bins, binning) for column in confidences.unbind(dim=1)]
    num_groups = len(columns)
    index = torch.stack([bins for _, bins in columns], dim=1) + num_bins * torch.arange(num_groups)
    flat, num_cells = index.flatten(), num_groups * num_bins
    return Cells(
        edges=tuple(edges for edges, _ in columns),
        index=index,
        counts=torch.bincount(flat, minlength=num_cells).double(),
        confidence_sum=torch.bincount(flat, weights=confidences.flatten(), minlength=num_cells),
    )


def observed_hits(cells: Cells, probs: Tensor, targets: Tensor) -> Tensor:
    """Hits in each cell from the labels that came, (cells,)."""
    hit = _hit_cells(cells.index, probs.argmax(dim=1), targets[:, None], cells.num_cells)
    return _count(hit, cells.num_cells)[0]


def simulated_hits(cells: Cells, probs: Tensor, num_simulations: int, seed: int) -> Tensor:
    """Hits in each cell when labels are drawn from the probabilities themselves, (num_simulations, cells)."""
    generator = torch.Generator().manual_seed(seed)
    hits = torch.zeros(num_simulations, cells.num_cells, dtype=torch.float64)
    rows = max(1, ROW_BLOCK // probs.shape[1])
    top_label = cells.index.shape[1] == 1
    for start in range(0, len(probs), rows):
        block, index = probs[start : start + rows], cells.index[start : start + rows]
        top = block.argmax(dim=1)
        cumulative = block.cumsum(dim=1)
        draws = max(1, DRAW_BLOCK // len(block))
        for first in range(0, num_simulations, draws):
            count = min(draws, num_simulations - first)
            uniform = torch.rand(len(block), count, generator=generator)  # (n, r)
            labels = _draw_top(block, top, uniform) if top_label else _draw_labels(cumulative, uniform)
            hits[first : first + count] += _count(_hit_cells(index, top, labels, cells.num_cells), cells.num_cells)
    return hits


def _bin_column(confidence: Tensor, num_bins: int, binning: Binning) -> tuple[Tensor, Tensor]:
    """Edges (bins + 1,) and the bin of each value (N,); bins are closed below, the last one on both sides."""
    if binning == "equal_width":
        edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64)
        confidence = confidence + EDGE_TOLERANCE
    else:
        ordered = confidence.sort().values
        starts = torch.arange(num_bins) * len(ordered) // num_bins
        edges = torch.cat([ordered[starts].unique(), ordered[-1:]])  # equal values are one edge: ties stay together
    bins = torch.searchsorted(edges[:-1].contiguous(), confidence.contiguous(), right=True) - 1
    return edges, bins


def _draw_top(probs: Tensor, top: Tensor, uniform: Tensor) -> Tensor:
    """The top label with its probability, else −1, (n, r): all that top-label statistics look at."""
    confidence = probs.gather(1, top[:, None])
    return torch.where(uniform < confidence, top[:, None], -1)


def _draw_labels(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """Labels by inversion of each row's distribution function, (n, r); classes of probability zero never come."""
    return torch.searchsorted(cumulative, uniform.double() * cumulative[:, -1:], right=True)


def _hit_cells(index: Tensor, top: Tensor, labels: Tensor, num_cells: int) -> Tensor:
    """Cell that each label (n, r) hits, or `num_cells` for none."""
    if index.shape[1] == 1:
        return torch.where(labels == top[:, None], index, num_cells)
    return index.gather(1, labels)


def _count(hit: Tensor, num_cells: int) -> Tensor:
    """Number of hits in each cell for each column of `hit` (n, r), as (r, cells)."""
    num_draws = hit.shape[1]
    flat = (hit + (num_cells + 1) * torch.arange(num_draws)).flatten()
    return torch.bincount(flat, minlength=num_draws * (num_cells + 1)).view(num_draws, num_cells + 1)[:, :-1]
