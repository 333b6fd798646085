"""What a belief learns from a linearized piece of a batch: score, whiten, gate, condition, guard; part by part."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from scipy.special import gammaincinv
from torch import Tensor

from bayes_kf.inference import diagonal, noise, sharding, tempering
from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.curvature import odds_length
from bayes_kf.inference.evidence import Batch, Evidence, Part, Tally
from bayes_kf.inference.jacobian import blocks, both_sides
from bayes_kf.inference.mode import expand_at_mode
from bayes_kf.inference.observation import Observation, whitened
from bayes_kf.inference.state import FilterState
from bayes_kf.models.likelihood import Gaussian, Likelihood

DAMPING_STEP = 0.25  # an update that fails its check is solved again with this much of the precision
MAX_DAMPINGS = 8
PART_ROWS = 192  # rows that are solved for together; with more, parts of a batch follow each other
STARTLING = 16.0  # innovation over its degrees of freedom, beyond which an estimated σ² is not taken at its word
TRUSTED = 1.0  # change of an output (a logit, or the sd of a Gaussian's noise) up to which a step is not checked
ROUNDING = 1e-4  # relative change of the objective below which a step is never called worse


def learn(config: KalmanConfig, state: FilterState, batch: Batch, tally: Tally) -> FilterState:
    """Condition on a piece of a batch, in parts of at most ``PART_ROWS`` rows."""

    def output_variance() -> Tensor:
        return config.structure.output_covariance(state.belief, batch.jacobian).diagonal(dim1=1, dim2=2).mean(0)

    explained = None if batch.known else output_variance  # a mean that knows the targets has residuals of noise
    begun = noise.begin(config, state.noise, batch.outputs, batch.targets, explained)
    state = state._replace(noise=begun)
    if batch.seen.directions is None:  # what noise it has may have become known just now
        batch = batch._replace(seen=batch.seen._replace(family=noise.likelihood(config, state.noise)))
    for where, width in parts(batch.widths):
        part = Part.of(batch.seen, batch.jacobian, where, width)
        if state.belief.mean is not batch.start:
            part = part.moved(state.belief.mean - batch.start)
        state = _learn_part(config, state, batch, where, part, tally)
    return state._replace(examples=state.examples + len(batch.targets))


def _learn_part(
    config: KalmanConfig,
    state: FilterState,
    batch: Batch,
    where: slice,
    part: Part,
    tally: Tally,
) -> FilterState:
    belief = state.belief
    joint = config.structure.joint_output_covariance(belief, part.jacobian)
    check_finite("the output covariance", joint)
    output_cov = blocks(joint, len(part.targets)).to(part.outputs.dtype)
    scores = state.scores if batch.known else scored(config, state, batch, where, part, output_cov)
    evidence, noise_state, jitter = _evidence(config, state, part, joint, output_cov, batch.known)
    accepts = None
    if config.damping and not batch.known:
        accepts = _objective(config, state, part, lambda mean: batch.outputs_at(mean, where), batch.targets[where])
    after, damping = _condition(config, belief, evidence, accepts, batch.hold_mean)
    after = after._replace(mean=belief.mean) if batch.hold_mean else after
    if noise_state.variance is not None and not batch.known:
        residual = batch.targets[where] - part.outputs
        noise_state = noise.absorb(noise_state, residual, output_cov)
    tally.part(evidence.mean, damping, jitter)
    noise_state = noise_state._replace(step=state.noise.step)  # it counts updates, not parts
    return state._replace(belief=after, noise=noise_state, scores=scores, scaled=True)


def _evidence(
    config: KalmanConfig, state: FilterState, part: Part, joint: Tensor, output_cov: Tensor, known: bool
) -> tuple[Evidence, noise.State, float]:
    """What the belief is conditioned on, the noise state after it, and the jitter that its noise took."""
    family, outputs, point = part.family, part.outputs, part.start if known else part.outputs
    white, noise_state = noise.whiten(config, state.noise, family, point, part.targets, output_cov)
    factor, residual = white.factor, white.residual
    if point is not outputs:  # expanded where the batch was linearized
        residual = residual + (factor @ (point - outputs).to(factor).unsqueeze(-1)).squeeze(-1)
    innovation = float(diagonal.innovation(both_sides(factor, joint), residual.flatten())[2])
    expanded = config.expansion == "mode" and config.noise == "exponential_family"
    if expanded and not known and family.name != "gaussian":
        factor, residual, point = expand_at_mode(family, outputs.double(), part.targets, joint)
    observation = whitened(factor, residual, part.jacobian, part.degrees, innovation)
    if part.probes is None:
        return Evidence(observation, None), noise_state, white.jitter
    probed = part.pulled.multiplied(part.probes.factor(point.to(outputs)))
    nothing = outputs.new_zeros(probed.size * probed.num_rows)
    return Evidence(observation, Observation(probed, nothing)), noise_state, white.jitter


def _condition(
    config: KalmanConfig,
    belief: Any,
    evidence: Evidence,
    accepts: Callable[[Any], bool] | None,
    hold_mean: bool,
) -> tuple[Any, float]:
    """Condition, with the gate before and the guard after; the belief and the precision factor.

    Where no precision was small enough for the guard, the belief is as it was, and the factor 0.
    """
    structure, damping = config.structure, 1.0
    if hold_mean and structure.accumulate is not None:  # the prior may be chosen afterwards
        structure = structure._replace(condition=structure.accumulate)
    if config.gate_quantile is not None:
        bound = 2.0 * float(gammaincinv(0.5 * evidence.mean.degrees_of_freedom, config.gate_quantile))  # of χ²
        damping = min(1.0, bound / max(evidence.mean.innovation, bound))
    elif config.noise_variance == "estimated":
        bound = STARTLING * evidence.mean.degrees_of_freedom
        damping = min(1.0, bound / max(evidence.mean.innovation, bound))
    after = evidence.condition(structure, belief, damping)
    attempts = 0
    while accepts is not None and not accepts(after):
        if attempts == MAX_DAMPINGS:
            check_finite("the mean", after.mean)
            warn_untaken()
            return belief, 0.0
        attempts, damping = attempts + 1, damping * DAMPING_STEP
        after = evidence.condition(structure, belief, damping)
    check_finite("the mean", after.mean)
    scales = structure.scales(after)
    check_finite("the variance", scales)
    if not sharding.agreed(bool((scales > 0).all())):
        raise FloatingPointError(f"{int((scales <= 0).sum())} variances would not be positive")
    return after, damping


def _objective(
    config: KalmanConfig,
    state: FilterState,
    part: Part,
    outputs_at: Callable[[Tensor], Tensor],
    targets: Tensor,
) -> Callable[[Any], bool]:
    """Whether a step lowers −log p(y | μ) + ½ δᵀP⁻¹δ, the objective that it solves by linearization.

    A step that moves no output by more than ``TRUSTED`` is taken without the forward pass that this needs.
    """
    belief, family = state.belief, noise.likelihood(config, state.noise)
    before = -part.family.log_prob(part.outputs, part.targets).sum()

    def accepts(after: Any) -> bool:
        if not sharding.agreed(bool(torch.isfinite(after.mean).all())):
            return False
        step = after.mean - belief.mean
        if is_small(part.jacobian.matvec(step), family, TRUSTED):
            return True
        penalty = 0.5 * config.structure.quadratic(belief, step)
        del step
        moved = outputs_at(after.mean)
        if not bool(torch.isfinite(moved).all()):
            return False
        loss = -family.log_prob(moved, targets).sum()
        return bool(loss + penalty <= before + ROUNDING * (1.0 + before.abs()))

    return accepts


def warn_untaken() -> None:
    """Where the belief did not learn from examples."""
    warnings.warn(
        "no step toward some examples lowered −log p(y | μ) + ½ δᵀP⁻¹δ, not even with "
        f"{DAMPING_STEP**MAX_DAMPINGS:.1g} of their precision: the belief did not learn from them (`damping` 0 in the "
        "update's info). The model is far from linear within the belief; a narrower prior may help.",
        stacklevel=2,
    )


def scored(
    config: KalmanConfig, state: FilterState, batch: Batch, where: slice, part: Part, output_cov: Tensor
) -> tempering.State:
    """The scores with this part's, or as they were where the temperature is given.

    Where only the label's log odds were seen, the outputs are taken to vary independently and alike.
    """
    if not isinstance(config.temperature, str):
        return state.scores
    seed = config.seed + state.step
    if config.curvature == "sampled":
        outputs, targets = batch.outputs[where], batch.targets[where]
        variance = output_cov.flatten() / odds_length(outputs, targets)
        family = noise.likelihood(config, state.noise)
        losses = tempering.isotropic_log_losses(family, outputs, variance, targets, seed)
    else:
        losses = tempering.log_losses(part.family, part.outputs, output_cov, part.targets, seed)
    return tempering.add(state.scores, losses)


def parts(widths: list[int]) -> Iterator[tuple[slice, int]]:
    """Examples that are solved for together, of at most ``PART_ROWS`` rows, and the rows that each of them has.

    Args:
        widths: rows of each example.
    """
    first, width = 0, 0
    for number, rows in enumerate(widths):
        if number > first and (number + 1 - first) * max(width, rows) > PART_ROWS:
            yield slice(first, number), width
            first, width = number, 0
        width = max(width, rows)
    yield slice(first, len(widths)), width


def is_small(change: Tensor, family: Likelihood, most: float) -> bool:
    """Whether no output changes by ``most`` or more, in logits or in sds of Gaussian noise."""
    unit = family.noise_variance.sqrt().to(change) if isinstance(family, Gaussian) else 1.0
    return bool((change / unit).abs().max() < most)


def check_finite(what: str, tensor: Tensor) -> None:
    """Raise FloatingPointError where a value is not finite."""
    if sharding.agreed(bool(torch.isfinite(tensor.sum()))):  # a sum is cheap, and finite only if every value is
        return
    if not sharding.agreed(bool(torch.isfinite(tensor).all())):
        raise FloatingPointError(f"{int((~torch.isfinite(tensor)).sum())} values of {what} would not be finite")
