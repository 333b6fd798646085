"""The state of a filter between updates, and the error of a refused update."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from bayes_kf.inference.covariance.diagonal import DiagonalGaussian
from bayes_kf.inference.covariance.gaussian_belief import GaussianBelief
from bayes_kf.inference.filtering.prequential_temperature import TemperatureState
from bayes_kf.inference.measurement_model.noise import NoiseState

DIVERGED = (FloatingPointError, torch.linalg.LinAlgError)  # raised by computations that would break a belief


class FilterState(NamedTuple):
    """The state of a filter; never changed in place.

    Attributes:
        belief: N(μ, P) over θ, of the configured covariance structure.
        prior: mean (n,) and variance (n,) of the belief before the first update.
        noise: the state of the noise model.
        temperature_scores: prequential log losses by temperature.
        prior_is_scaled: whether the scale of the prior is final; False only before the first inputs.
        step: number of updates.
        examples: number of examples.
    """

    belief: GaussianBelief
    prior: DiagonalGaussian
    noise: NoiseState
    temperature_scores: TemperatureState
    prior_is_scaled: bool
    step: int
    examples: int


class DivergenceError(FloatingPointError):
    """An update was refused; the state given to it is unchanged.

    Attributes:
        step: index of the refused update, from 0.
        cause: the number that would not have been finite or positive.
        state: the state before the update.
        posterior: None; a ``FitDivergenceError``, which ``fit`` raises, has the posterior before the update.
    """

    posterior: Any = None

    def __init__(self, step: int, cause: str, state: FilterState) -> None:
        super().__init__(f"update {step} refused: {cause}; the state before it is kept")
        self.step, self.cause, self.state = step, cause, state
