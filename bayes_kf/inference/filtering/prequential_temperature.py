"""The temperature, a factor on P in predictions, chosen by the prequential log loss of a stream.

Before each update the filter's linearized predictions are scored at every temperature of a grid. This needs no
validation set and no further pass through the network. Log losses separate temperatures only if they differ much: if P
is small compared with the noise of the labels, the losses are almost equal at all temperatures, and P itself is more
informative. So the chosen temperature is the one nearest to 1 whose loss is not clearly above the smallest. On a long
stream a few thousandths of a nat an example are clear, so a margin may allow a loss that is no more than that. Ours.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.inference.config_groups import PredictiveSettings

GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
MAX_STANDARD_ERRORS = 0.5  # by which the loss of the chosen temperature may be above the smallest loss
MEAN_ALONE = 0.01  # at and below it, the sd of outputs is at most a tenth of P's, which hardly changes predictions
MEAN_ALONE_NOTE = (
    "predictions are those of the mean alone, and epistemic uncertainty is close to zero. The scored data prefer the "
    "mean's predictions to those of the covariance at any larger temperature; `temperature` sets another one."
)
HOT_NOTE = (
    "the covariance is too small for the errors that were scored. Fit with a wider prior (`initial_logit_sd`), or for "
    "more passes."
)


class TemperatureState(NamedTuple):
    """Sums over examples of their log losses ℓ at every temperature, in nats. The names are keys of the state's file.

    Attributes:
        updates: number of updates that were scored, or of their blocks.
        total: Σ ℓ, (K,).
        differences: Σ (ℓ_j − ℓ_k)² of every pair of temperatures, (K, K), in nats²; zero if unknown (files of format 1
            without it).
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


def choose(state: TemperatureState, margin: float = 0.0) -> float:
    """The temperature nearest to 1 whose log loss is not clearly above the smallest; 1 before the first score.

    The loss is above the smallest by at most ``MAX_STANDARD_ERRORS`` standard errors of the difference, paired by
    example. At hotter temperatures than the one with the smallest loss, it may be ``margin`` above it, in nats of all
    examples together.
    """
    if state.updates == 0:
        return 1.0
    least = state.total.min()  # the loss is infinite at a temperature that gave some target no probability
    if not bool(torch.isfinite(least)):
        return GRID[0]
    best = int((state.total == least).nonzero().max())  # the largest among equals
    excess = state.total - least
    allowed = MAX_STANDARD_ERRORS * state.differences[best].sqrt()
    allowed[best:] = allowed[best:].clamp_min(margin)
    return nearest_to_one(excess <= allowed, excess, best)


def nearest_to_one(near: Tensor, excess: Tensor, best: int) -> float:
    """The temperature nearest to 1 among the best one and those whose loss is near it.

    Args:
        near: whether the loss of each temperature is near the smallest, (K,).
        excess: of each loss over the smallest, (K,); temperatures with infinite excess are left out.
        best: index of the smallest loss.
    """
    near = near & torch.isfinite(excess)
    near[best] = True
    return min((t for t, is_near in zip(GRID, near.tolist(), strict=True) if is_near), key=lambda t: abs(math.log(t)))


def is_mean_alone(temperature: float) -> bool:
    """Whether a temperature is so low that predictions are practically those of the mean."""
    return temperature <= MEAN_ALONE


def warn_of_edge(temperature: float) -> None:
    """Warn if a chosen temperature makes predictions those of the mean, or is the largest that was tried."""
    if is_mean_alone(temperature):
        warnings.warn(f"the temperature chosen is {temperature:g}: {MEAN_ALONE_NOTE}", stacklevel=3)
    elif temperature == GRID[-1]:
        warnings.warn(
            f"the temperature chosen is {temperature:g}, the largest that was tried: {HOT_NOTE}", stacklevel=3
        )


def temperature(settings: PredictiveSettings, state: TemperatureState, examples: int) -> float:
    """The configured temperature, or the one that the scores of so many examples choose."""
    chosen = settings.temperature
    return choose(state, settings.temperature_margin * examples) if isinstance(chosen, str) else chosen
