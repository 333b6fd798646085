"""Bins, and every class's probability sorted into them.

Classwise, a *cell* is one bin of one class: the probabilities that the class was given there, and its *hits*, how
many of those examples were of the class. An example lies in one cell of every class and hits one of them, so classes
do not vary independently: chance is simulated by drawing labels.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Binning = Literal["equal_width", "equal_mass"]
Kind = Literal["confidence", "classwise", "top_label"]
BINNINGS = ("equal_width", "equal_mass")
KINDS = ("confidence", "classwise")
FORMER_KIND = "top_label"  # of "confidence"; elsewhere it means calibration within each predicted class

EDGE_TOLERANCE = 1e-7  # so that 0.7 lies on the edge 0.7 whether it came as float32 or float64
ROW_BLOCK = 2**20  # numbers held at a time while labels are drawn: it bounds memory, and it is part of the seed
DRAW_BLOCK = 2**20


@dataclass(frozen=True)
class ClassCells:
    """Which cells each example lies in, one for each class, and the probability that was put there."""

    num_bins: int
    index: Tensor  # (N, C) int64; cells of class c start at c * num_bins
    counts: Tensor  # (C * num_bins,) examples in each cell
    confidence_sum: Tensor  # (C * num_bins,) sum of the probabilities

    @property
    def num_cells(self) -> int:
        """Number of cells of all classes together, empty ones included."""
        return len(self.counts)


def equal_width_edges(num_bins: int) -> Tensor:
    """Edges from zero to one, (bins + 1,)."""
    return torch.linspace(0, 1, num_bins + 1, dtype=torch.float64)


def place(values: Tensor, edges: Tensor) -> Tensor:
    """The bin of each value: closed below and open above, the last one closed on both sides."""
    index = torch.searchsorted(edges[:-1].contiguous(), values.contiguous(), right=True) - 1
    return index.clamp(min=0)


def class_cells(probs: Tensor, num_bins: int, binning: Binning) -> ClassCells:
    """Cells of checked probabilities (N, C)."""
    num_classes = probs.shape[1]
    if binning == "equal_width":
        index = ((probs + EDGE_TOLERANCE) * num_bins).long().clamp_(max=num_bins - 1)
    else:
        index = torch.stack([_equal_mass(column, num_bins) for column in probs.unbind(dim=1)], dim=1)
    index += num_bins * torch.arange(num_classes)
    flat, num_cells = index.flatten(), num_classes * num_bins
    return ClassCells(
        num_bins=num_bins,
        index=index,
        counts=torch.bincount(flat, minlength=num_cells).double(),
        confidence_sum=torch.bincount(flat, weights=probs.flatten(), minlength=num_cells),
    )


def observed_hits(cells: ClassCells, targets: Tensor) -> Tensor:
    """Hits in each cell from the labels that came, (cells,)."""
    return _count(cells.index.gather(1, targets[:, None]), cells.num_cells)[0]


def simulated_hits(cells: ClassCells, probs: Tensor, num_simulations: int, seed: int) -> Tensor:
    """Hits in each cell when labels are drawn from the probabilities themselves, (num_simulations, cells)."""
    generator = torch.Generator().manual_seed(seed)
    hits = torch.zeros(num_simulations, cells.num_cells, dtype=torch.float64)
    rows = max(1, ROW_BLOCK // probs.shape[1])
    for start in range(0, len(probs), rows):
        block, index = probs[start : start + rows], cells.index[start : start + rows]
        cumulative = block.cumsum(dim=1)
        draws = max(1, DRAW_BLOCK // len(block))
        for first in range(0, num_simulations, draws):
            count = min(draws, num_simulations - first)
            labels = _draw_labels(cumulative, torch.rand(len(block), count, generator=generator))
            hits[first : first + count] += _count(index.gather(1, labels), cells.num_cells)
    return hits


def _equal_mass(values: Tensor, num_bins: int) -> Tensor:
    """The bin of each value (N,); equal values are never split."""
    ordered = values.sort().values
    starts = torch.arange(num_bins) * len(ordered) // num_bins
    edges = torch.cat([ordered[starts].unique(), ordered[-1:]])
    return place(values, edges)


def _draw_labels(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """Labels by inversion of each row's distribution function, (n, r); classes of probability zero never come."""
    return torch.searchsorted(cumulative, uniform.double() * cumulative[:, -1:], right=True)


def _count(hit: Tensor, num_cells: int) -> Tensor:
    """Number of hits in each cell for each column of `hit` (n, r), as (r, cells)."""
    num_draws = hit.shape[1]
    flat = (hit + num_cells * torch.arange(num_draws)).flatten()
    return torch.bincount(flat, minlength=num_draws * num_cells).view(num_draws, num_cells)
