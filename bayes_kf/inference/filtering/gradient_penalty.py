"""R-Kalman: smaller steps where the loss is steep.

A loss L with a gradient penalty, L + (ρ/2)‖∇L‖², prefers flat places. Here the penalty is a pseudo-observation of the
mean before the update, θ = μ⁻ with precision a = ρ‖g‖² in every direction:

    P̃⁻¹ = P⁻¹ + a I,    g = −∇ (1/B) Σ_b log p(y_b | x_b, θ) at μ⁻,

so that a batch of twice the same examples has the same penalty. What follows is an update of the configured structure
that starts from P̃. g is the gradient of the likelihood's own loss whatever the noise model, curvature or expansion,
taken once for the whole batch before any of it is learned from: a penalty does not depend on the parts that a batch
goes through in. "transient" keeps the mean of that update alone; covariance, noise and scores are those of the update
without a penalty. "permanent" keeps all of it but the scores: g knows the targets, and what a batch is predicted with
must not.

Neither is a posterior of the penalized loss. "transient" has the covariance of a mean that went further than it did,
and loses what it did not learn from a batch, so it is too sure about its own mean; "permanent" counts pseudo-
observations as data. A batch is conditioned on twice, and where either update is not finite there is none.

Ours. The penalized loss is that of gradient-regularized natural gradients (GRNG), of whose own Kalman filter only the
abstract was at hand.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filtering import measurement_update as learning
from bayes_kf.inference.filtering.measurement import Batch, Tally
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.linearization.linearizer import Linearizer
from bayes_kf.inference.measurement_model import noise
from bayes_kf.inference.measurement_model.noise import NoiseState
from bayes_kf.models.batch import Inputs, batch_size, some_examples


class Sides(NamedTuple):
    """A state on its way through a batch.

    Attributes:
        plain: as it learns without a penalty.
        tight: as it learns from P̃; None where there is no penalty.
        precision: a = ρ‖g‖².
    """

    plain: FilterState
    tight: FilterState | None = None
    precision: float = 0.0


def begin(config: KalmanConfig, linearize: Linearizer, state: FilterState, inputs: Inputs, targets: Tensor) -> Sides:
    """The state before a batch, and beside it the one with the penalty's precision added.

    Args:
        config: the settings.
        linearize: of the model.
        state: after the dynamics, before the batch.
        inputs: the whole batch.
        targets: as the likelihood's ``check`` returned them.
    """
    gradient = mean_gradient(config, linearize, state, inputs, targets)
    learning.check_finite("the gradient", gradient)
    mean = state.belief.mean
    precision = config.gradient_penalty * float(gradient.square().sum())
    learning.check_finite("the gradient penalty's precision", mean.new_tensor(precision))
    tight = state.belief.add_precision(torch.full_like(mean, precision))
    return Sides(state, state._replace(belief=tight), precision)


def learn(
    config: KalmanConfig, sides: Sides, batch: Batch, tally: Tally, most: int | None = None
) -> tuple[Sides, learning.Learned]:
    """Both sides after a piece of the batch; the report is that of the plain one, and how either was damped.

    Both learn the same examples: where the linearization does not hold for one of them, neither goes on.
    """
    if sides.tight is None:
        learned = learning.learn(config, [sides.plain], batch, [tally], most)
        return Sides(learned.states[0]), learned
    own = Tally()
    learned = learning.learn(config, [sides.plain, sides.tight], batch, [tally, own], most)
    tally.also(own)
    plain, tight = learned.states
    return Sides(plain, tight, sides.precision), learned


def end(config: KalmanConfig, sides: Sides) -> FilterState:
    """What is kept of both sides."""
    plain, tight = sides.plain, sides.tight
    if tight is None:
        return plain
    if config.gradient_penalty_form == "permanent":
        return tight._replace(scores=plain.scores)
    return plain._replace(belief=plain.belief.with_mean(tight.belief.mean))


def mean_gradient(
    config: KalmanConfig, linearize: Linearizer, state: FilterState, inputs: Inputs, targets: Tensor
) -> Tensor:
    """∇ of a batch's mean −log p(y | θ) at the state's mean, (n,), in float64; arguments as for :func:`begin`."""
    mean = state.belief.mean
    family = noise.likelihood(config, _noise(config, linearize, state, inputs, targets))

    def cotangent(outputs: Tensor, where: slice) -> Tensor:
        with torch.enable_grad():
            outputs = outputs.requires_grad_(True)
            loss = -family.log_prob(outputs, targets[where]).sum() / len(targets)
        return torch.autograd.grad(loss, outputs)[0]

    return linearize.gradient(mean, inputs, cotangent)


def _noise(
    config: KalmanConfig, linearize: Linearizer, state: FilterState, inputs: Inputs, targets: Tensor
) -> NoiseState:
    """The noise state that the batch begins with; an estimated σ² needs its outputs for the first guess."""
    if config.likelihood != "gaussian":
        return state.noise
    if config.noise_variance != "estimated" or state.noise.variance is not None:
        return noise.begin(config, state.noise, targets, targets)
    mean, size = state.belief.mean, batch_size(inputs)
    step = linearize.max_chunk_size(mean, inputs)
    parts = [some_examples(inputs, slice(first, first + step), size) for first in range(0, size, step)]
    outputs = torch.cat([linearize.adapter.outputs(mean, part) for part in parts])
    return noise.begin(config, state.noise, outputs, targets)
