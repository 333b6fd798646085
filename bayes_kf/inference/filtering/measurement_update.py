"""The measurement update from a linearized chunk, block by block: score, whiten, gate, condition, guard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.config_groups import NoiseSettings
from bayes_kf.inference.covariance.gaussian_belief import GaussianBelief
from bayes_kf.inference.covariance.observation import Observation, solve_innovation, whiten_observation
from bayes_kf.inference.filtering import prequential_temperature
from bayes_kf.inference.filtering.linearization_check import (
    MAX_DIVERGENCE,
    linearization_error,
    move_to_mean,
)
from bayes_kf.inference.filtering.measurement import Measurement, MeasurementBlock, ObservationPair, next_block
from bayes_kf.inference.filtering.prequential_temperature import TemperatureState
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.filtering.step_guard import DAMPING_STEP, MIN_BLOCK_EXAMPLES, StepGuard, warn_of_refused_steps
from bayes_kf.inference.filtering.update_info import UpdateInfoBuilder
from bayes_kf.inference.linearization.jacobian import congruence, diagonal_blocks
from bayes_kf.inference.measurement_model import noise, predictive_density
from bayes_kf.inference.measurement_model.innovation_gate import gate_precision
from bayes_kf.inference.measurement_model.mode_expansion import expand_at_mode
from bayes_kf.inference.measurement_model.moment_matching import match_moments
from bayes_kf.inference.measurement_model.noise import NoiseState
from bayes_kf.inference.measurement_model.output_directions import log_odds_direction_square
from bayes_kf.models.likelihood import Gaussian, StudentT, Tokens
from bayes_kf.processes import parameter_sums


class UpdatedStates(NamedTuple):
    """The result of a measurement update from a chunk.

    Attributes:
        states: after the update.
        num_examples: examples used, from the first on; fewer than the chunk has if the linearization became inaccurate.
        accurate: whether the linearization was accurate to the end.
    """

    states: list[FilterState]
    num_examples: int
    accurate: bool


def measurement_update(
    config: KalmanConfig,
    states: Sequence[FilterState],
    measurement: Measurement,
    builders: Sequence[UpdateInfoBuilder],
    max_examples: int | None = None,
) -> UpdatedStates:
    """The states given a chunk, conditioned on its blocks one after the other while the linearization is accurate.

    A block of 32 examples or more is halved if the guard refuses its step, or if the linearization is inaccurate after
    the step.

    Args:
        config: the settings.
        states: one or more states that are updated from the same chunk, block by block.
        measurement: the chunk. If the first state's mean is the point of the linearization, at least one block is used.
        builders: of the report, one per state.
        max_examples: number of examples to use at most; a block that would go beyond is left out.
    """
    states, families = list(states), []
    for number, state in enumerate(states):
        states[number] = state = _initialize_noise(config, state, measurement)
        family = measurement.projected.family
        if measurement.projected.directions is None:  # σ² may just have been initialized
            family = noise.likelihood(config.noise_settings, state.noise)
        families.append(family)
    done, accurate = 0, True
    limit = len(measurement.rows_per_example) if max_examples is None else max_examples
    where, num_rows = next_block(measurement.rows_per_example)
    while accurate and done < limit and where.stop <= limit:
        block, blocks = measurement.block(where, num_rows), []
        for state, family, builder in zip(states, families, builders, strict=True):
            moved, ok = move_to_mean(measurement, where, block._replace(family=family), state.belief.mean, builder)
            blocks.append(moved)
            accurate = accurate and ok
        if not accurate and states[0].belief.mean is not measurement.point:
            break
        updates, too_long = [], False
        for state, moved in zip(states, blocks, strict=True):
            update = _update_block(config, state, measurement, where, moved)
            updates.append(update)
            too_long = too_long or not update.accurate
        count = where.stop - where.start
        if too_long and count >= 2 * MIN_BLOCK_EXAMPLES:  # try the first half
            where = slice(where.start, where.start + count // 2)
            accurate = accurate or done == 0  # at least one block is used
            continue
        accurate, done = True, where.stop
        for number, (update, builder) in enumerate(zip(updates, builders, strict=True)):
            accurate = accurate and (update.accurate or update.damping == 0.0)  # 0: the belief has not moved
            observation = update.observation
            builder.add_block(observation.innovation, observation.degrees_of_freedom, update.damping, update.jitter)
            states[number] = update.state
        if done < limit:
            where, num_rows = next_block(measurement.rows_per_example, done)
    for number, state in enumerate(states):
        states[number] = state._replace(examples=state.examples + done)
    return UpdatedStates(states, done, accurate)


def _initialize_noise(config: KalmanConfig, state: FilterState, measurement: Measurement) -> FilterState:
    """The state with the noise before the chunk."""

    def output_variance() -> Tensor:
        return state.belief.output_covariance(measurement.jacobian).diagonal(dim1=1, dim2=2).mean(0)

    explained = None if measurement.fitted_point else output_variance  # residuals of a fitted mean are noise alone
    initial = noise.initialize(config.noise_settings, state.noise, measurement.outputs, measurement.targets, explained)
    return state._replace(noise=initial)


class _BlockUpdate(NamedTuple):
    """An update from one block: the state, numbers for the report, and whether the linearization was accurate."""

    state: FilterState
    observation: Observation
    damping: float
    jitter: float
    accurate: bool


def _update_block(
    config: KalmanConfig, state: FilterState, measurement: Measurement, where: slice, block: MeasurementBlock
) -> _BlockUpdate:
    """The update from one block; the state given is not changed."""
    belief = state.belief
    joint_cov = belief.joint_output_covariance(block.jacobian)
    check_finite("the output covariance", joint_cov)
    output_cov = diagonal_blocks(joint_cov, len(block.targets)).to(block.outputs.dtype)
    scores = state.temperature_scores
    if not measurement.hold_mean:
        scores = score_temperatures(config, state, measurement, where, block, output_cov)
    pair, noise_state, jitter = _observe(
        config.noise_settings, state.noise, block, joint_cov, output_cov, measurement.fitted_point
    )
    guard = None
    if config.damping and not measurement.fitted_point:
        guard = StepGuard(config.noise_settings, state, measurement, where, block)
    precision = gate_precision(pair.mean, config.gate_quantile, config.noise_variance == "estimated")
    after, damping, accurate = _condition(belief, pair, guard, precision, measurement.hold_mean)
    if guard is not None and guard.last_mean is after.mean and guard.last_outputs is not None and accurate:
        error = linearization_error(measurement, where, block, after.mean, guard.last_outputs)
        accurate = error < MAX_DIVERGENCE  # False for NaN
    if noise_state.variance is not None and not measurement.fitted_point:
        residual = measurement.targets[where] - block.outputs
        dof = config.student_dof if config.likelihood == "student_t" else None
        noise_state = noise.update_variance(noise_state, residual, output_cov, dof)
    noise_state = noise_state._replace(step=state.noise.step)  # it counts updates, not blocks
    state = FilterState(after, state.prior, noise_state, scores, True, state.step, state.examples)
    return _BlockUpdate(state, pair.mean, damping, jitter, accurate)


def _observe(
    settings: NoiseSettings,
    state: NoiseState,
    block: MeasurementBlock,
    joint_cov: Tensor,
    output_cov: Tensor,
    fitted_point: bool,
) -> tuple[ObservationPair, NoiseState, float]:
    """The whitened observations of a block, the noise state after it, and the jitter of the noise covariance."""
    family, outputs = block.family, block.outputs
    point = block.outputs_at_point if fitted_point else outputs
    (W, u, jitter), after = noise.whiten(settings, state, family, point, block.targets, output_cov)
    if point is not outputs:  # relative to the outputs at the mean
        u = u + (W @ (point - outputs).to(W).unsqueeze(-1)).squeeze(-1)
    innovation = float(solve_innovation(congruence(W, joint_cov), u.flatten()).squared)
    at_mode = settings.expansion == "mode" and settings.noise == "exponential_family"
    if at_mode and not fitted_point and not isinstance(family, Gaussian | Tokens):
        if isinstance(family, StudentT):
            W, u, point = match_moments(family, outputs.double(), block.targets, joint_cov)
        else:
            W, u, point = expand_at_mode(family, outputs.double(), block.targets, joint_cov)
    observation = whiten_observation(W, u, block.jacobian, block.degrees_of_freedom, innovation)
    if block.probes is None:
        return ObservationPair(observation, None), after, jitter
    factor = block.probes.factor(point.to(outputs))
    probed = block.directions.left_multiply(factor)
    zeros = outputs.new_zeros(probed.size * probed.num_rows)
    if isinstance(family, Tokens):
        observation = _with_probes(observation, W, u, block, factor)
    return ObservationPair(observation, Observation(probed, zeros)), after, jitter


def _with_probes(
    observation: Observation, factor: Tensor, residual: Tensor, block: MeasurementBlock, probes: Tensor
) -> Observation:
    """The observation of text with the probes, which observe 0, so that their precision bounds the step of the mean.

    Args:
        observation: along the gradients of the log-likelihoods.
        factor: its W, (B, 1, 1).
        residual: its u, (B, 1).
        block: the block.
        probes: the factor of the probes, (B, K, 1 + K).
    """
    along = torch.nn.functional.pad(factor.to(probes), (0, probes.shape[2] - 1))
    u = torch.nn.functional.pad(residual.to(probes), (0, probes.shape[1])).flatten()
    jacobian = block.directions.left_multiply(torch.cat([along, probes], 1))
    return replace(observation, jacobian=jacobian, residual=u)


def _condition(
    belief: GaussianBelief, pair: ObservationPair, guard: StepGuard | None, precision: float, hold_mean: bool
) -> tuple[GaussianBelief, float, bool]:
    """The belief after the observations, the factor on their precision, and whether the guard accepted the first step.

    A refused step is solved again with less precision. If the guard refuses all of them, the belief is unchanged and
    the factor is 0.
    """
    after, attempts = pair.update(belief, precision, accumulate=hold_mean), 0
    while guard is not None and not guard.accepts(after):
        if attempts == guard.max_dampings:
            if attempts:
                check_finite("the mean", after.mean)
                warn_of_refused_steps()
            return belief, 0.0, False
        attempts, precision = attempts + 1, precision * DAMPING_STEP
        after = pair.update(belief, precision, accumulate=hold_mean)
    check_belief(after)
    return (after.with_mean(belief.mean) if hold_mean else after), precision, attempts == 0


def score_temperatures(
    config: KalmanConfig,
    state: FilterState,
    measurement: Measurement,
    where: slice,
    block: MeasurementBlock,
    output_cov: Tensor,
) -> TemperatureState:
    """The temperature scores with those of a block; unchanged if the temperature is configured, and for text.

    If the block has only the label's log odds, the outputs are taken to vary independently, with one variance.
    """
    if not isinstance(config.temperature, str) or config.likelihood == "tokens":
        return state.temperature_scores
    first = state.examples + where.start  # `where` counts from the first example of the chunk
    if config.curvature == "sampled":
        family, targets = noise.likelihood(config.noise_settings, state.noise), measurement.targets[where]
        outputs = _outputs_at_mean(state, measurement, where)
        variance = output_cov.flatten() / log_odds_direction_square(measurement.outputs[where], targets)
        losses = predictive_density.isotropic_log_loss(
            family, outputs, variance, targets, prequential_temperature.GRID, first
        )
    else:
        losses = predictive_density.log_loss(
            block.family, block.outputs, output_cov, block.targets, prequential_temperature.GRID, first
        )
    return prequential_temperature.add(state.temperature_scores, losses)


def _outputs_at_mean(state: FilterState, measurement: Measurement, where: slice) -> Tensor:
    """All outputs of a block at the present mean, (b, m), if its Jacobian is that of the label's log odds alone.

    They take a forward pass if the mean has moved since the linearization: log odds are concave in the outputs, so
    first-order log odds would be too large for every label.
    """
    if state.belief.mean is measurement.point:
        return measurement.outputs[where]
    outputs = measurement.outputs_at(state.belief.mean, where)
    check_finite("the outputs", outputs)
    return outputs


def check_finite(what: str, tensor: Tensor) -> None:
    """Raise FloatingPointError if a value is not finite."""
    if parameter_sums.all_shards_agree(bool(torch.isfinite(tensor.sum()))):  # cheap: finite only if every value is
        return
    if not parameter_sums.all_shards_agree(bool(torch.isfinite(tensor).all())):
        raise FloatingPointError(f"{int((~torch.isfinite(tensor)).sum())} values of {what} would not be finite")


def check_belief(belief: GaussianBelief) -> None:
    """Raise FloatingPointError if a value of the belief is not finite, or a variance not positive."""
    scales = belief.scales()
    if parameter_sums.all_shards_agree(bool(torch.isfinite(belief.mean.sum() + scales.sum()) & (scales > 0).all())):
        return
    check_finite("the mean", belief.mean)
    check_finite("the variance", scales)
    if not parameter_sums.all_shards_agree(bool((scales > 0).all())):
        raise FloatingPointError(f"{int((scales <= 0).sum())} variances would not be positive")
