"""Scores of predicted quantiles and intervals."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bayes_kf.evaluation.inputs import Array, as_float, as_vector, check_fraction


def pinball_loss(quantiles: Array, targets: Array, levels: Sequence[float]) -> float:
    """Mean pinball loss of predicted quantiles, in the targets' unit; lower is better, proper for quantiles.

    Args:
        quantiles: Predicted quantiles, (N, K).
        targets: Observed targets, (N,).
        levels: Level of each column, (K,), between 0 and 1.

    Raises:
        ValueError: If an argument is malformed.

    Reference: Koenker, Bassett, *Regression quantiles*, 1978.

    Example:
        >>> pinball_loss(torch.tensor([[0.0, 1.0]]), torch.tensor([2.0]), [0.5, 0.9])
        0.95
    """
    return _pinball(quantiles, targets, levels).mean().item()


def crps_quantiles(quantiles: Array, targets: Array, levels: Sequence[float]) -> float:
    """CRPS from predicted quantiles: twice the integral of the pinball loss over the levels.

    The levels stand for the whole distribution: each counts with the share of levels that are nearest to it. So
    equally spaced levels, such as 1/2K, 3/2K, …, count alike.

    Args:
        quantiles: Predicted quantiles, (N, K).
        targets: Observed targets, (N,).
        levels: Level of each column, (K,), increasing.

    Raises:
        ValueError: If an argument is malformed.

    Reference: Laio, Tamea, *Verification tools for probabilistic forecasts of continuous hydrological variables*, 2007.

    Example:
        >>> levels = [0.125, 0.375, 0.625, 0.875]
        >>> crps_quantiles(torch.tensor([[0.5, 1.5, 2.5, 3.5]]), torch.tensor([2.0]), levels)
        0.375
    """
    losses = _pinball(quantiles, targets, levels)
    given = torch.as_tensor(levels, dtype=torch.float64)
    if bool((given.diff() <= 0).any()):
        raise ValueError("`levels` must increase, got others.")
    middles = torch.cat([torch.zeros(1), (given[1:] + given[:-1]) / 2, torch.ones(1)]).double()
    return 2 * (losses.mean(dim=0) * middles.diff()).sum().item()


def interval_score(low: Array, high: Array, targets: Array, *, level: float) -> float:
    """Winkler's score of central intervals, in the targets' unit; lower is better.

    It is the width plus 2/α times the distance of the target from the interval, with α = 1 − level.

    Args:
        low: Lower ends, (N,).
        high: Upper ends, (N,).
        targets: Observed targets, (N,).
        level: Level of the intervals.

    Raises:
        ValueError: If an argument is malformed or an interval ends below its start.

    Reference: Winkler, *A decision-theoretic approach to interval estimation*, 1972; Gneiting, Raftery 2007.

    Example:
        >>> interval_score(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0]), torch.tensor([0.5, 1.5]), level=0.5)
        2.0
    """
    check_fraction(level, "level")
    given = [(low, "low"), (high, "high"), (targets, "targets")]
    least, most, observed = (as_vector(values, name) for values, name in given)
    if not len(least) == len(most) == len(observed):
        raise ValueError(f"`high` and `targets` must have shape ({len(least)},) as `low` has, got others.")
    if bool((most < least).any()):
        raise ValueError("`high` must not be below `low`, got an interval that is.")
    outside = (least - observed).clamp_min(0) + (observed - most).clamp_min(0)
    return (most - least + 2 / (1 - level) * outside).mean().item()


def _pinball(quantiles: Array, targets: Array, levels: Sequence[float]) -> Tensor:
    """The pinball loss of every quantile, (N, K)."""
    predicted, observed = as_float(quantiles, "quantiles"), as_vector(targets, "targets")
    given = as_vector(torch.as_tensor(levels, dtype=torch.float64), "levels")
    if predicted.shape != (len(observed), len(given)):
        raise ValueError(
            f"`quantiles` must have shape ({len(observed)}, {len(given)}), a column for each level, "
            f"got {tuple(predicted.shape)}."
        )
    if given.min() <= 0 or given.max() >= 1:
        raise ValueError(f"`levels` must lie between 0 and 1, got values in {given.min():.3g}..{given.max():.3g}.")
    difference = observed[:, None] - predicted
    return torch.maximum(given * difference, (given - 1) * difference)
