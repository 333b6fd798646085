"""A positive number that held-out data chose, and how sure they are of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LEVEL = 0.9  # of the interval


class Choice(NamedTuple):
    """The most probable value, and an interval of probability 0.9.

    Attributes:
        value: the chosen number.
        low: the lower end.
        high: the upper end.
        at_edge: whether the value is the smallest or the largest that was tried.
        log_density: there, up to the constant of the density that was maximized.
    """

    value: float
    low: float
    high: float
    at_edge: bool
    log_density: float

    def as_tensor(self) -> Tensor:
        """Value, low and high, (3,), for a history."""
        return torch.tensor([self.value, self.low, self.high], dtype=torch.float64)


def most_probable(log_density: Callable[[float], float], values: Sequence[float], evaluations: int = 8) -> Choice:
    """The maximum of a density of log x between the first and the last of ``values``, ascending, and its interval.

    The density is evaluated at all ``values``, and then between the neighbours of the best one.

    Args:
        log_density: of log x, up to a constant.
        values: a grid, equally spaced in log x.
        evaluations: between the neighbours, at most; with 1 at the top of the parabola through the three.
    """
    grid = torch.tensor(values, dtype=torch.float64).log()
    heights = torch.tensor([log_density(value) for value in values], dtype=torch.float64)
    heights = heights.nan_to_num(-torch.inf, posinf=-torch.inf)
    best = int(heights.argmax())
    shares = (heights - heights.max()).exp()
    cumulated = torch.cat([shares.new_zeros(1), torch.cumulative_trapezoid(shares, grid)])
    cumulated = cumulated / cumulated[-1] if float(cumulated[-1]) > 0 else torch.linspace(0, 1, len(grid)).double()
    low, high = (_crossing(grid, cumulated, share) for share in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    if best in (0, len(values) - 1):
        return Choice(values[best], min(low, values[best]), max(high, values[best]), True, float(heights[best]))
    value = math.exp(_between(log_density, grid[best - 1 : best + 2], heights[best - 1 : best + 2], evaluations))
    height = log_density(value)
    if height < float(heights[best]):
        value, height = values[best], float(heights[best])
    return Choice(value, min(low, value), max(high, value), False, height)


def _between(log_density: Callable[[float], float], grid: Tensor, heights: Tensor, evaluations: int) -> float:
    """log x of the maximum near the middle one of three points, (3,) each."""
    if evaluations == 1:  # the top of the parabola
        left, middle, right = heights.tolist()
        if not math.isfinite(left + right):
            return float(grid[1])
        return float(grid[1]) + 0.5 * (left - right) / (left - 2.0 * middle + right) * float(grid[2] - grid[1])
    from scipy.optimize import minimize_scalar  # loads slowly

    return float(
        minimize_scalar(
            lambda x: -log_density(math.exp(x)),
            bounds=(float(grid[0]), float(grid[2])),
            method="bounded",
            options={"xatol": 0.02, "maxiter": evaluations},
        ).x
    )


def near_best(losses: Sequence[Tensor], standard_errors: float, least: float = 0.0) -> Tensor:
    """Which candidates are not clearly worse than the best one, (K,): the best one, and those near it.

    The mean loss of the others exceeds that of the best one by at most so many standard errors of the difference,
    paired by example.

    Args:
        losses: of each candidate, (N,), of the same examples; a candidate whose mean is not finite is not near.
        standard_errors: how many.
        least: a difference of the means up to which a candidate is near, whatever its standard error.
    """
    stacked = torch.stack(list(losses)).double()
    means = stacked.mean(1).nan_to_num(torch.inf)
    best = int(means.argmin())
    error = (stacked - stacked[best]).std(1, correction=0) / max(1, stacked.shape[1] - 1) ** 0.5
    near = (means - means[best] <= (standard_errors * error).clamp_min(least)) & torch.isfinite(means)
    near[best] = True
    return near


def _crossing(grid: Tensor, cumulated: Tensor, share: float) -> float:
    """x where the cumulated probability reaches ``share``, by linear interpolation in log x."""
    right = int((cumulated >= share).to(torch.int8).argmax())
    if right == 0:
        return float(grid[0].exp())
    step = cumulated[right] - cumulated[right - 1]
    part = (share - cumulated[right - 1]) / step if float(step) > 0 else 1.0
    return float((grid[right - 1] + part * (grid[right] - grid[right - 1])).exp())
