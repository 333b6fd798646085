"""What a belief learns from a linearized piece of a batch: score, whiten, gate, condition, guard; part by part."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.covariance.gaussian_belief import GaussianBelief
from bayes_kf.inference.covariance.observation import Observation, solve_innovation, whiten_observation
from bayes_kf.inference.filtering import predictive_density, tempering
from bayes_kf.inference.filtering.linearization_check import TRUSTED, at_mean, holds, is_small
from bayes_kf.inference.filtering.measurement import Batch, Evidence, Part, Tally
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.filtering.tempering import TemperatureState
from bayes_kf.inference.linearization import parameter_sums
from bayes_kf.inference.linearization.jacobian import congruence, diagonal_blocks
from bayes_kf.inference.measurement_model import noise
from bayes_kf.inference.measurement_model.mode_expansion import expand_at_mode
from bayes_kf.inference.measurement_model.noise import NoiseState
from bayes_kf.inference.measurement_model.output_directions import odds_length

DAMPING_STEP = 0.25  # an update that fails its check is solved again with this much of the precision
MAX_DAMPINGS = 8
LEAST_PART = 16  # examples, to which parts are halved where they are too many for one step
PART_ROWS = 192  # rows that are solved for together; with more, parts of a batch follow each other
STARTLING = 16.0  # innovation over its degrees of freedom, beyond which an estimated σ² is not taken at its word
ROUNDING = 1e-4  # relative change of the objective below which a step is never called worse


class Learned(NamedTuple):
    """What came of a piece of a batch.

    Attributes:
        states: after it.
        examples: how many of its examples were learned; fewer than it has where its linearization did not hold so far.
        holds: whether its linearization held to the end.
    """

    states: list[FilterState]
    examples: int
    holds: bool


def learn(
    config: KalmanConfig, states: Sequence[FilterState], batch: Batch, tallies: Sequence[Tally], most: int | None = None
) -> Learned:
    """Condition on a piece of a batch, in parts of at most ``PART_ROWS`` rows, while its linearization holds.

    Args:
        config: the settings.
        states: one or more that learn from the same piece, part by part.
        batch: the piece. Where the first state's mean is that of its linearization, at least one part is learned.
        tallies: of each state.
        most: examples to learn at most; a part that would go beyond is left.

    A part of 32 examples or more whose step is refused by the guard, or leads to where the linearization does not hold,
    is not taken: its first half is learned instead.
    """
    states = [_begun(config, state, batch) for state in states]
    families = [batch.seen.family] * len(states)
    if batch.seen.directions is None:  # what noise it has may have become known just now
        families = [noise.likelihood(config, state.noise) for state in states]
    learned, holding, size = 0, True, len(batch.widths) if most is None else most
    where, width = next(parts(batch.widths))
    while holding and learned < size and where.stop <= size:
        part = Part.of(batch.seen, batch.jacobian, where, width)
        found = [
            at_mean(batch, where, part._replace(family=family), state.belief.mean, tally)
            for state, family, tally in zip(states, families, tallies, strict=True)
        ]
        holding = all(held for _, held in found)
        if not holding and states[0].belief.mean is not batch.start:
            break
        tried = [
            _learn_part(config, state, batch, where, moved, tally)
            for state, tally, (moved, _) in zip(states, tallies, found, strict=True)
        ]
        count = len(part.targets)
        if count >= 2 * LEAST_PART and not all(one.holds for one in tried):  # too far for all of them together
            where = slice(where.start, where.start + count // 2)
            continue
        holding = all(one.holds or one.damping == 0.0 for one in tried)  # 0: nothing has moved
        for one, tally in zip(tried, tallies, strict=True):
            tally.part(one.observation, one.damping, one.jitter)
        states, learned = [one.state for one in tried], where.stop
        if learned < size:
            where, width = next(parts(batch.widths[learned:]))
            where = slice(where.start + learned, where.stop + learned)
    return Learned([s._replace(examples=s.examples + learned) for s in states], learned, holding)


def _begun(config: KalmanConfig, state: FilterState, batch: Batch) -> FilterState:
    """The state with the noise that it begins a batch with."""

    def output_variance() -> Tensor:
        return state.belief.output_covariance(batch.jacobian).diagonal(dim1=1, dim2=2).mean(0)

    explained = None if batch.known else output_variance  # a mean that knows the targets has residuals of noise
    return state._replace(noise=noise.begin(config, state.noise, batch.outputs, batch.targets, explained))


def _learn_part(
    config: KalmanConfig,
    state: FilterState,
    batch: Batch,
    where: slice,
    part: Part,
    tally: Tally,
) -> _Tried:
    """What learning a part comes to; the state given is not changed."""
    belief = state.belief
    joint = belief.joint_output_covariance(part.jacobian)
    check_finite("the output covariance", joint)
    output_cov = diagonal_blocks(joint, len(part.targets)).to(part.outputs.dtype)
    scores = state.scores if batch.hold_mean else scored(config, state, batch, where, part, output_cov)
    evidence, noise_state, jitter = _evidence(config, state, part, joint, output_cov, batch.known)
    passes, accepts = _Passes(batch, where), None
    if config.damping and not batch.known:
        accepts = _objective(config, state, part, passes, batch.targets[where])
    dampings = MAX_DAMPINGS if len(part.targets) < 2 * LEAST_PART else 0  # rather fewer examples than less precise ones
    after, damping, refused = _condition(config, belief, evidence, accepts, dampings, batch.hold_mean)
    after = after.with_mean(belief.mean) if batch.hold_mean else after
    outputs = passes.known(after.mean)
    held = not refused and (outputs is None or holds(batch, where, part, after.mean, outputs))
    if noise_state.variance is not None and not batch.known:
        residual = batch.targets[where] - part.outputs
        noise_state = noise.absorb(noise_state, residual, output_cov)
    noise_state = noise_state._replace(step=state.noise.step)  # it counts updates, not parts
    state = state._replace(belief=after, noise=noise_state, scores=scores, scaled=True)
    return _Tried(state, evidence.mean, damping, jitter, held)


class _Tried(NamedTuple):
    """What learning a part comes to: the state, the report's numbers, and whether the linearization held."""

    state: FilterState
    observation: Observation
    damping: float
    jitter: float
    holds: bool


class _Passes:
    """Forward passes of a part; the last one is kept."""

    def __init__(self, batch: Batch, where: slice) -> None:
        self._batch, self._where = batch, where
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, mean: Tensor) -> Tensor:
        """Its outputs at a mean, (b, m)."""
        self._last = mean, self._batch.outputs_at(mean, self._where)
        return self._last[1]

    def known(self, mean: Tensor) -> Tensor | None:
        """The same where the last pass was there."""
        return self._last[1] if self._last is not None and self._last[0] is mean else None


def _evidence(
    config: KalmanConfig, state: FilterState, part: Part, joint: Tensor, output_cov: Tensor, known: bool
) -> tuple[Evidence, NoiseState, float]:
    """What the belief is conditioned on, the noise state after it, and the jitter that its noise took."""
    family, outputs, point = part.family, part.outputs, part.start if known else part.outputs
    white, noise_state = noise.whiten(config, state.noise, family, point, part.targets, output_cov)
    factor, residual = white.factor, white.residual
    if point is not outputs:  # expanded where the batch was linearized
        residual = residual + (factor @ (point - outputs).to(factor).unsqueeze(-1)).squeeze(-1)
    innovation = float(solve_innovation(congruence(factor, joint), residual.flatten()).squared)
    expanded = config.expansion == "mode" and config.noise == "exponential_family"
    if expanded and not known and family.name != "gaussian":
        factor, residual, point = expand_at_mode(family, outputs.double(), part.targets, joint)
    observation = whiten_observation(factor, residual, part.jacobian, part.degrees, innovation)
    if part.probes is None:
        return Evidence(observation, None), noise_state, white.jitter
    probed = part.pulled.left_multiply(part.probes.factor(point.to(outputs)))
    nothing = outputs.new_zeros(probed.size * probed.num_rows)
    return Evidence(observation, Observation(probed, nothing)), noise_state, white.jitter


def _condition(
    config: KalmanConfig,
    belief: GaussianBelief,
    evidence: Evidence,
    accepts: Callable[[GaussianBelief], bool] | None,
    dampings: int,
    hold_mean: bool,
) -> tuple[GaussianBelief, float, bool]:
    """Condition, with the gate before and the guard after; the belief, the precision factor, and if any was refused.

    Where no precision was small enough for the guard, of at most ``dampings`` smaller ones, the belief is as it was,
    and the factor 0.
    """
    damping = 1.0
    if config.gate_quantile is not None:
        from scipy.special import gammaincinv

        bound = 2.0 * float(gammaincinv(0.5 * evidence.mean.degrees_of_freedom, config.gate_quantile))  # of χ²
        damping = min(1.0, bound / max(evidence.mean.innovation, bound))
    elif config.noise_variance == "estimated":
        bound = STARTLING * evidence.mean.degrees_of_freedom
        damping = min(1.0, bound / max(evidence.mean.innovation, bound))
    after = evidence.condition(belief, damping, accumulate=hold_mean)
    attempts = 0
    while accepts is not None and not accepts(after):
        if attempts == dampings:
            if dampings:
                check_finite("the mean", after.mean)
                warn_untaken()
            return belief, 0.0, True
        attempts, damping = attempts + 1, damping * DAMPING_STEP
        after = evidence.condition(belief, damping, accumulate=hold_mean)
    check_finite("the mean", after.mean)
    scales = after.scales()
    check_finite("the variance", scales)
    if not parameter_sums.all_shards_agree(bool((scales > 0).all())):
        raise FloatingPointError(f"{int((scales <= 0).sum())} variances would not be positive")
    return after, damping, attempts > 0


def _objective(
    config: KalmanConfig,
    state: FilterState,
    part: Part,
    outputs_at: Callable[[Tensor], Tensor],
    targets: Tensor,
) -> Callable[[GaussianBelief], bool]:
    """Whether a step lowers −log p(y | μ) + ½ δᵀP⁻¹δ, the objective that it solves by linearization.

    A step that moves no output by more than ``TRUSTED`` is taken without the forward pass that this needs.
    """
    belief, family = state.belief, noise.likelihood(config, state.noise)

    @functools.cache
    def before() -> Tensor:
        if part.exact:
            return -part.family.log_prob(part.outputs, part.targets).sum()
        return -family.log_prob(outputs_at(belief.mean), targets).sum()

    def accepts(after: GaussianBelief) -> bool:
        if not parameter_sums.all_shards_agree(bool(torch.isfinite(after.mean).all())):
            return False
        step = after.mean - belief.mean
        if is_small(part.jacobian.matvec(step), family, TRUSTED):
            return True
        penalty = 0.5 * belief.quadratic(step)
        del step
        allowed = before()
        allowed = allowed + ROUNDING * (1.0 + allowed.abs())
        moved = outputs_at(after.mean)
        if not bool(torch.isfinite(moved).all()):
            return False
        loss = -family.log_prob(moved, targets).sum()
        return bool(loss + penalty <= allowed)

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
) -> TemperatureState:
    """The scores with this part's, or as they were where the temperature is given.

    Where only the label's log odds were seen, the outputs are taken to vary independently and alike.
    """
    if not isinstance(config.temperature, str):
        return state.scores
    first = state.examples + where.start  # `where` counts from the first of this piece of the batch
    if config.curvature == "sampled":
        family, targets = noise.likelihood(config, state.noise), batch.targets[where]
        outputs = _outputs_now(state, batch, where)
        variance = output_cov.flatten() / odds_length(batch.outputs[where], targets)
        losses = predictive_density.isotropic_log_loss(family, outputs, variance, targets, tempering.GRID, first)
    else:
        losses = predictive_density.log_loss(part.family, part.outputs, output_cov, part.targets, tempering.GRID, first)
    return tempering.add(state.scores, losses)


def _outputs_now(state: FilterState, batch: Batch, where: slice) -> Tensor:
    """All outputs of a part at the present mean, where its Jacobian is that of the label's log odds alone, (B, m).

    By a forward pass where the belief has moved since the batch was linearized: log odds are concave in the outputs, so
    that their first order promises every label too much.
    """
    if state.belief.mean is batch.start:
        return batch.outputs[where]
    outputs = batch.outputs_at(state.belief.mean, where)
    check_finite("the outputs", outputs)
    return outputs


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


def check_finite(what: str, tensor: Tensor) -> None:
    """Raise FloatingPointError where a value is not finite."""
    if parameter_sums.all_shards_agree(bool(torch.isfinite(tensor.sum()))):  # cheap
        return
    if not parameter_sums.all_shards_agree(bool(torch.isfinite(tensor).all())):
        raise FloatingPointError(f"{int((~torch.isfinite(tensor)).sum())} values of {what} would not be finite")
