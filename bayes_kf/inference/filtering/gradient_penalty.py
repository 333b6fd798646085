"""R-Kalman: smaller steps if the loss is steep.

A loss L with a gradient penalty, L + (ρ/2)‖∇L‖², prefers flat regions. Here the penalty is a pseudo-observation of the
mean before the update, θ = μ⁻ with precision a = ρ‖g‖² in every direction:

    P̃⁻¹ = P⁻¹ + a I,    g = −∇ (1/B) Σ_b log p(y_b | x_b, θ) at μ⁻,

so that a batch with every example twice has the same penalty. The update of the configured structure then starts from
P̃. g is the gradient of the likelihood's own loss whatever the noise model, curvature or expansion, computed once for
the whole batch before the update: a penalty does not depend on the blocks of a batch. "transient" keeps the mean of the
penalized update alone; covariance, noise and scores are those of the update without a penalty. "permanent" keeps all of
it but the scores, because g depends on the targets, and predictions of a batch must not.

Neither is a posterior of the penalized loss. "transient" has the covariance of a mean that went further, and loses the
information that its shorter step left out, so it is overconfident about its own mean; "permanent" counts pseudo-
observations as data. A batch is conditioned on twice, and if either update is not finite, both are refused.

Ours. The penalized loss is that of gradient-regularized natural gradients (GRNG), of whose own Kalman filter only the
abstract was available.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.config_combinations import SCALED
from bayes_kf.inference.filtering.measurement import Measurement
from bayes_kf.inference.filtering.measurement_update import UpdatedStates, check_finite, measurement_update
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.filtering.update_info import UpdateInfoBuilder
from bayes_kf.inference.linearization.linearizer import Linearizer
from bayes_kf.inference.measurement_model import noise
from bayes_kf.inference.measurement_model.noise import NoiseState
from bayes_kf.models.batch import Batch


class PenalizedState(NamedTuple):
    """A state during an update.

    Attributes:
        unpenalized: the state without a penalty.
        penalized: the state that starts from P̃; None if there is no penalty.
        precision: a = ρ‖g‖².
    """

    unpenalized: FilterState
    penalized: FilterState | None = None
    precision: float = 0.0


def start_update(config: KalmanConfig, linearize: Linearizer, state: FilterState, batch: Batch) -> PenalizedState:
    """The state before a batch, and beside it the state with the precision of the penalty.

    Args:
        config: the settings.
        linearize: of the model.
        state: after the prediction step, before the batch.
        batch: with targets as the likelihood's ``check`` returned them.
    """
    gradient = mean_gradient(config, linearize, state, batch)
    check_finite("the gradient", gradient)
    mean = state.belief.mean
    precision = config.gradient_penalty * float(gradient.square().sum())
    check_finite("the gradient penalty's precision", mean.new_tensor(precision))
    belief = state.belief.add_precision(torch.full_like(mean, precision))
    return PenalizedState(state, state._replace(belief=belief), precision)


def penalized_update(
    config: KalmanConfig,
    state: PenalizedState,
    measurement: Measurement,
    builder: UpdateInfoBuilder,
    max_examples: int | None = None,
) -> tuple[PenalizedState, UpdatedStates]:
    """Both states after a chunk; the report is that of the unpenalized one, with the smaller damping of the two.

    Both use the same examples: if the linearization is inaccurate for one of them, both stop.
    """
    if state.penalized is None:
        updated = measurement_update(config, [state.unpenalized], measurement, [builder], max_examples)
        return PenalizedState(updated.states[0]), updated
    second = UpdateInfoBuilder()
    states = [state.unpenalized, state.penalized]
    updated = measurement_update(config, states, measurement, [builder, second], max_examples)
    builder.add_parallel_update(second)
    return PenalizedState(updated.states[0], updated.states[1], state.precision), updated


def finish_update(config: KalmanConfig, state: PenalizedState) -> FilterState:
    """The state after the batch, from both."""
    plain, penalized = state.unpenalized, state.penalized
    if penalized is None:
        return plain
    if config.gradient_penalty_form == "permanent":
        return penalized._replace(temperature_scores=plain.temperature_scores)
    return plain._replace(belief=plain.belief.with_mean(penalized.belief.mean))


def mean_gradient(config: KalmanConfig, linearize: Linearizer, state: FilterState, batch: Batch) -> Tensor:
    """∇ of a batch's mean −log p(y | θ) at the state's mean, (n,), float64; arguments as for :func:`start_update`."""
    targets = batch.required_targets
    initial = _initial_noise(config, linearize, state, batch)
    family = noise.likelihood(config.noise_settings, initial)

    def cotangent(outputs: Tensor, where: slice) -> Tensor:
        with torch.enable_grad():
            outputs = outputs.requires_grad_(True)
            loss = -family.log_prob(outputs, targets[where]).sum() / len(targets)
        return torch.autograd.grad(loss, outputs)[0]

    return linearize.gradient(state.belief.mean, batch, cotangent)


def _initial_noise(config: KalmanConfig, linearize: Linearizer, state: FilterState, batch: Batch) -> NoiseState:
    """The noise state before the batch; the initial guess of an estimated σ² needs the batch's outputs."""
    if config.likelihood not in SCALED:
        return state.noise
    targets = batch.required_targets
    if config.noise_variance != "estimated" or state.noise.variance is not None:
        return noise.initialize(config.noise_settings, state.noise, targets, targets)
    return noise.initialize(config.noise_settings, state.noise, linearize.outputs(state.belief.mean, batch), targets)
