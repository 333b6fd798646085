"""The temperature, a factor on P in predictions, chosen by the prequential log loss of a stream.

Before each update the filter's own linearized predictions are scored at every temperature of a grid. No validation set,
no extra pass through the network. Log losses tell large differences alone: where P is small beside the noise of the
labels they are almost the same at all temperatures, and P says more than they do. So the temperature is the one nearest
to 1, where predictions are those of P itself, that the scores do not clearly speak against. Ours.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
WITHIN = 0.5  # standard errors by which a stream or held-out data must prefer another temperature to one nearer to 1
MEAN_ALONE = 0.01  # temperature up to which a belief's spread is a tenth of its own, and nothing of it is left to see
MEAN_ALONE_NOTE = (
    "predictions are those of the mean alone, and epistemic uncertainty is close to zero. The scored data prefer the "
    "mean's predictions to those of the covariance at any larger temperature; `temperature` sets another one."
)


class TemperatureState(NamedTuple):
    """Sums over the examples scored of their log losses ℓ at every temperature, in nats.

    Attributes:
        updates: number of updates scored, or of their parts, where they were learned in parts.
        total: Σ ℓ, (K,).
        differences: Σ (ℓ_j − ℓ_k)² of every pair of temperatures, (K, K), in nats²; zero where unknown (folders of
            format 1 without it).
    """

    updates: int
    total: Tensor
    differences: Tensor


def init(device: torch.device) -> TemperatureState:
    """The state before the first update."""
    size = len(GRID)
    zeros = torch.zeros(size, size + 1, dtype=torch.float64, device=device)
    return TemperatureState(0, zeros[:, 0].clone(), zeros[:, 1:].clone())


def add(state: TemperatureState, losses: Tensor) -> TemperatureState:
    """The sums with the losses of B more examples, (K, B)."""
    squares = (losses.unsqueeze(1) - losses).square().nan_to_num(math.inf).sum(-1)
    return TemperatureState(state.updates + 1, state.total + losses.sum(1), state.differences + squares)


def choose(state: TemperatureState) -> float:
    """The temperature nearest to 1 of those that the scores do not clearly speak against; 1 before anything was scored.

    Its log loss lies above the least by at most ``WITHIN`` standard errors of the difference, paired by example.
    """
    if state.updates == 0:
        return 1.0
    least = state.total.min()  # a temperature that gave some target no probability is at infinity, and out
    if not bool(torch.isfinite(least)):
        return GRID[0]
    best = int((state.total == least).nonzero().max())  # the largest among equals
    excess = state.total - least
    return nearest_to_one(excess <= WITHIN * state.differences[best].sqrt(), excess, best)


def nearest_to_one(near: Tensor, excess: Tensor, best: int) -> float:
    """The temperature nearest to 1 of the best one and those that are near and have a finite excess, (K,) each."""
    near = near & torch.isfinite(excess)
    near[best] = True
    return min((t for t, is_near in zip(GRID, near.tolist(), strict=True) if is_near), key=lambda t: abs(math.log(t)))


def is_mean_alone(temperature: float) -> bool:
    """Whether a temperature is so low that predictions are those of the mean."""
    return temperature <= MEAN_ALONE


def warn_of_mean_alone(temperature: float) -> None:
    """Where a temperature that was chosen leaves predictions to the mean."""
    if is_mean_alone(temperature):
        warnings.warn(f"the temperature chosen is {temperature:g}: {MEAN_ALONE_NOTE}", stacklevel=3)


def temperature(setting: float | str, state: TemperatureState) -> float:
    """The configured temperature, or the one that the scores choose."""
    return choose(state) if isinstance(setting, str) else setting
