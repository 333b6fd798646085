"""Quantiles of many targets at once, from the function that gives P(y ≤ value) of each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MAX_STEPS = 200  # of the search for a quantile
LEVEL_ATOL = 1e-12  # error of P(y ≤ quantile)
QUANTILE_RTOL = 1e-14  # of a bracket, relative to its first width and to the quantile


def root(below: Callable[[Tensor], Tensor], level: float, low: Tensor, high: Tensor) -> Tensor:
    """The values at which a distribution function is ``level``, between ``low`` and ``high``.

    By the Illinois variant of false position, with a bisection in every third step.
    """
    width = high - low
    at_low, at_high = below(low) - level, below(high) - level
    estimate = high
    for step in range(MAX_STEPS):
        chord = (low * at_high - high * at_low) / (at_high - at_low).clamp_min(torch.finfo(low.dtype).tiny)
        inside = (chord > low) & (chord < high)
        estimate = torch.where(inside & (step % 3 < 2), chord, 0.5 * (low + high))
        at_estimate = below(estimate) - level
        narrow = high - low <= QUANTILE_RTOL * torch.maximum(width, estimate.abs())
        if bool(((at_estimate.abs() <= LEVEL_ATOL) | narrow).all()):
            break
        is_low = at_estimate < 0
        low, high = torch.where(is_low, estimate, low), torch.where(is_low, high, estimate)
        at_low = torch.where(is_low, at_estimate, 0.5 * at_low)  # the weight of an end that stays is halved
        at_high = torch.where(is_low, 0.5 * at_high, at_estimate)
    return estimate


def smallest_count(below: Callable[[Tensor], Tensor], level: float, high: Tensor) -> Tensor:
    """The smallest counts whose distribution function is at least ``level``, at most ``high``, by bisection."""
    low, high = torch.full_like(high, -1.0), high.ceil()  # the function is below the level, and not
    for _ in range(MAX_STEPS):
        middle = (0.5 * (low + high)).floor()
        is_open = (middle > low) & (middle < high)
        if not bool(is_open.any()):
            break
        is_low = below(middle) < level
        low, high = torch.where(is_open & is_low, middle, low), torch.where(is_open & ~is_low, middle, high)
    return high
