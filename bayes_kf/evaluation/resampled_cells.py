"""Bootstrap intervals for two kinds of examples told apart by a score: known and foreign, right and wrong.

What is asked for depends on how many examples of either kind lie in each cell of equal score alone, and data sets drawn
with replacement are counts in these cells. More than `LARGE` examples are first put into at most `MOST_CELLS` cells of
nearly equal mass, equal scores never split, and intervals are moved by what that changes in the value itself.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from bayes_kf.evaluation.bootstrap import Interval, quantile_ends

LARGE = 2**16
MOST_CELLS = 2**14
BLOCK = 2**20  # numbers held at a time while examples are resampled

Statistic = Callable[[Tensor, Tensor], Tensor]


def cell_intervals(
    scores: Tensor,
    is_second: Tensor,
    statistic: Statistic,
    level: float,
    num_resamples: int,
    seed: int,
    *,
    apart: bool,
) -> list[Interval]:
    """Percentile intervals of a statistic; NaN where it is not defined in enough data sets.

    Args:
        scores: Score of each example, (N,).
        is_second: Whether the example is of the second kind, bool (N,).
        statistic: Values (r, S) of data sets given as counts of either kind in cells of ascending score, each (r, K).
        level: Probability inside each interval.
        num_resamples: Number of resampled data sets.
        seed: Seed of the resampling.
        apart: Whether each kind is resampled among itself, so that data sets have the same number of either.
    """
    exact = scores.unique(return_inverse=True)[1]
    narrow = _narrow(exact)
    drawn = torch.cat(
        [statistic(*counts) for counts in _resampled(narrow, is_second, num_resamples, seed, apart=apart)]
    )
    moved = statistic(*_counts(exact, is_second)) - statistic(*_counts(narrow, is_second))  # (1, S)
    return [_ends(column, level) for column in (drawn + moved).unbind(dim=1)]


def _resampled(
    cell: Tensor, is_second: Tensor, num_resamples: int, seed: int, *, apart: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Counts of either kind in resampled data sets, each (r, K), a block of data sets at a time."""
    num_cells = int(cell.max()) + 1
    rows = max(1, BLOCK // min(len(cell), LARGE))
    blocks = [min(rows, num_resamples - first) for first in range(0, num_resamples, rows)]
    if apart:
        groups = cell[~is_second], cell[is_second]
        generators = [np.random.default_rng([seed, k]) for k in range(2)]
        for count in blocks:
            first, second = (_draw(g, num_cells, count, rng) for g, rng in zip(groups, generators, strict=True))
            yield first, second
        return
    both, rng = cell + num_cells * is_second, np.random.default_rng([seed])
    for count in blocks:
        first, second = _draw(both, 2 * num_cells, count, rng).chunk(2, dim=1)
        yield first, second


def _draw(cell: Tensor, num_cells: int, count: int, rng: np.random.Generator) -> Tensor:
    """How often each cell comes when examples, given by their cells (N,), are drawn with replacement, (r, K)."""
    size = len(cell)
    if size > LARGE:
        shares = torch.bincount(cell, minlength=num_cells).double() / size
        return torch.from_numpy(rng.multinomial(size, shares.numpy(), count)).double()
    drawn = cell[torch.from_numpy(rng.integers(size, size=(count, size)))]  # (r, N)
    flat = (drawn + num_cells * torch.arange(count)[:, None]).flatten()
    return torch.bincount(flat, minlength=count * num_cells).view(count, num_cells).double()


def _narrow(cell: Tensor) -> Tensor:
    """The cell of each example, (N,), after cells are joined where examples are many."""
    if len(cell) <= LARGE:
        return cell
    counts = torch.bincount(cell)
    joined = (counts.cumsum(0) - counts) * MOST_CELLS // len(cell)
    return joined.unique(return_inverse=True)[1][cell]


def _counts(cell: Tensor, is_second: Tensor) -> tuple[Tensor, Tensor]:
    """Counts of either kind in each cell, each (1, K)."""
    num_cells = int(cell.max()) + 1
    first, second = (torch.bincount(cell[of_kind], minlength=num_cells) for of_kind in (~is_second, is_second))
    return first.double()[None], second.double()[None]


def _ends(values: Tensor, level: float) -> Interval:
    """Ends of the values (R,) that are defined; NaN where too few are."""
    defined = values[~values.isnan()]
    if (1 - level) / 2 * (len(defined) + 1) < 1 - 1e-9:
        return Interval(math.nan, math.nan)
    return quantile_ends(defined, level)
