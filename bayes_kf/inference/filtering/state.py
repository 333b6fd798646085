"""What a filter knows between updates, and what an update reports."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayes_kf.inference.covariance.diagonal import DiagonalGaussian
from bayes_kf.inference.covariance.gaussian_belief import GaussianBelief
from bayes_kf.inference.filtering.tempering import TemperatureState
from bayes_kf.inference.measurement_model.noise import NoiseState

DIVERGED = (FloatingPointError, torch.linalg.LinAlgError)  # what computing raises where a belief would break


class FilterState(NamedTuple):
    """All that a filter knows; never changed in place.

    Attributes:
        belief: N(μ, P) over θ, of the configured covariance structure.
        prior: mean (n,) and variance (n,) that the belief started from.
        noise: what the noise model remembers.
        scores: prequential log losses by temperature.
        scaled: whether the prior's scale is settled; False only before the first inputs were seen.
        step: updates made.
        examples: examples seen.
    """

    belief: GaussianBelief
    prior: DiagonalGaussian
    noise: NoiseState
    scores: TemperatureState
    scaled: bool
    step: int
    examples: int


class UpdateInfo(NamedTuple):
    """What one update saw and did.

    Attributes:
        outputs: η at the mean before the update, (B, m).
        log_loss: −log p(y | η), per example, (B,), in nats, before the update.
        correct: per example, (B,), before the update; None for regression.
        innovation: ν = uᵀS⁻¹u at the prior outputs. When the filter is consistent, its mean is about
            ``degrees_of_freedom``, and it is χ² for Gaussian targets; for classes it has heavier tails.
        degrees_of_freedom: of ν.
        damping: factor ≤ 1 put on the observation's precision by gate and guard; 1 as a rule, 0 where the belief did
            not learn from some examples, since no step toward them lowered the objective (there is a warning then).
        jitter: relative jitter of the noise covariance; 0 as a rule.
        lumped: largest probability that an example's lumped classes have together ("truncated" curvature); else 0.
        step_norm: Euclidean length of the step of the mean.
        penalty: ρ‖g‖², the precision that a ``gradient_penalty`` added to every parameter's for this update; else 0.
        seconds: wall time.
        relinearized: how often the rest of the batch was linearized again at the mean that its earlier examples had led
            to, since the outputs there were not those of the linearization any more; 0 as a rule, and for linear
            models.
        linearized_again: what that cost: examples that went forward and backward once more.
        checked: examples that went forward once more, without a graph, to find out.
    """

    outputs: Tensor
    log_loss: Tensor
    correct: Tensor | None
    innovation: float
    degrees_of_freedom: int
    damping: float
    jitter: float
    lumped: float
    step_norm: float
    penalty: float
    seconds: float
    relinearized: int = 0
    linearized_again: int = 0
    checked: int = 0


class DivergenceError(FloatingPointError):
    """An update was refused; the state given to it is unchanged.

    Attributes:
        step: index of the refused update, from 0.
        cause: what would have broken.
        state: the state before the update.
        posterior: None; a ``FitDivergenceError``, which ``fit`` raises, has the posterior before the update.
    """

    posterior: Any = None

    def __init__(self, step: int, cause: str, state: FilterState) -> None:
        super().__init__(f"update {step} refused: {cause}; the state before it is kept")
        self.step, self.cause, self.state = step, cause, state
