"""The information form on several processes: two vectors of length n are summed, and nothing else of that size is sent.

The precision of a diagonal belief in information form grows by diag(JᵀVJ), its mean moves by P Jᵀ(y − π): both are sums
over examples, whoever has them. Every process holds the whole belief. A global batch is learned from at once, expanded
at the mean before it, as the natural gradient does. Where that is too far for one step (``trust``), its first half is
learned instead, and then the second, linearized again. Innovations, which need rows of different processes beside each
other, are not known.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.distributed.batch_shards import Share
from bayes_kf.distributed.distributed_filter import FilterOfMany
from bayes_kf.inference.covariance.diagonal import DiagonalGaussian
from bayes_kf.inference.filtering import tempering
from bayes_kf.inference.filtering.linearization_check import (
    MAX_DIVERGENCE,
    TRUST_RADIUS,
    is_small_change,
    linearization_error,
)
from bayes_kf.inference.filtering.measurement import Measurement, MeasurementBlock
from bayes_kf.inference.filtering.measurement_update import (
    DAMPING_STEP,
    MAX_DAMPINGS,
    MIN_BLOCK_EXAMPLES,
    OBJECTIVE_RTOL,
    check_finite,
    score_temperatures,
    warn_of_refused_steps,
)
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.filtering.tempering import TemperatureState
from bayes_kf.inference.filtering.update_info import UpdateInfo, UpdateInfoBuilder
from bayes_kf.inference.measurement_model import noise

WANTED = {"covariance": "diagonal_information", "noise": "exponential_family", "expansion": "mean"}


class Sums(NamedTuple):
    """Sums over the examples of one process, or of all.

    Attributes:
        precision: diag(JᵀVJ), (n,).
        gradient: Jᵀ(y − π), (n,).
        log_prob: Σ log p(y | μ).
        temperature_scores: log losses by temperature and their squared differences.
        examples: how many.
    """

    precision: Tensor
    gradient: Tensor
    log_prob: Tensor
    temperature_scores: TemperatureState
    examples: int


class DataParallelFilter(FilterOfMany):
    """A filter in information form over the processes of a group, the belief whole on each.

    Sends 2n numbers a process and update, whatever the batch, where :class:`ShardedFilter` sends rows. The result is
    that of ``KalmanConfig(covariance="diagonal_information", expansion="mean")`` on one process that is given all
    examples at once (there, batches of more than 192 rows are learned in parts, one after the other; here, only those
    that are too far for one step). Draws that price
    temperatures and probe curvature are others than there. ``info`` is about this process's examples, and knows no
    innovation.

    Args:
        model: the same on every process.
        config: the settings; as above, without a gate or an estimated noise variance.
        group: of torch.distributed; by default that of ``init_process_group``.

    Raises:
        ValueError: for another config.
        RuntimeError: where torch.distributed was not initialized, or the processes' models or settings differ.
    """

    NEEDS_AN_EXAMPLE = False

    def shard(self, state: FilterState) -> FilterState:
        """The state as it is: every process holds all of it."""
        return state

    def gather(self, state: FilterState) -> FilterState:
        """The state as it is."""
        return state

    def _check(self) -> None:
        for name, value in WANTED.items():
            if getattr(self.config, name) != value:
                raise ValueError(
                    f"`{name}` must be {value!r} for sums over processes, got {getattr(self.config, name)!r}."
                )
        if self.config.gate_quantile is not None or self.config.noise_variance == "estimated":
            raise ValueError("`gate_quantile` and `noise_variance` must be None and a number for sums over processes.")

    def _update(self, state: FilterState, share: Share) -> tuple[FilterState, UpdateInfo]:
        before, builder = self.kf._predict(state), UpdateInfoBuilder()
        after, damping, steps = self._learned(before, share, builder, whole=True)
        after = after._replace(noise=before.noise._replace(step=before.noise.step + 1), step=before.step + 1)
        info = builder.build(float((after.belief.mean - before.belief.mean).norm()), relinearized=steps - 1)
        return after, info._replace(damping=damping)

    def _learned(
        self, state: FilterState, share: Share, builder: UpdateInfoBuilder, whole: bool
    ) -> tuple[FilterState, float, int]:
        """The state after a global batch, the least damping of its steps, and how often it was linearized.

        At once, or where that is too far for one step, its halves one after the other.

        Args:
            state: before it.
            share: of the batch.
            builder: of the update.
            whole: whether this is the update's batch and no part of it, so that ``builder`` takes in its outputs.
        """
        batches, sums = self._linearized(state, share, builder, whole)
        size = sums.examples
        belief, damping, held = self._condition(state, batches, sums, builder)
        if held or size < 2 * MIN_BLOCK_EXAMPLES:
            scores = (
                _joined(state.temperature_scores, sums.temperature_scores)
                if isinstance(self.config.temperature, str)
                else state.temperature_scores
            )
            return state._replace(belief=belief, temperature_scores=scores, examples=state.examples + size), damping, 1
        least, steps = 1.0, 1
        for where in (slice(0, size // 2), slice(size // 2, size)):
            state, damping, more = self._learned(state, share.some(where, self.group.rank), builder, whole=False)
            least, steps = min(least, damping), steps + more
        return state, least, steps

    def _linearized(
        self, before: FilterState, share: Share, builder: UpdateInfoBuilder, whole: bool
    ) -> tuple[list[tuple[Measurement, MeasurementBlock]], Sums]:
        """This process's pieces of a global batch, and the sums over all processes."""
        size, first = share.sizes[self.group.rank], sum(share.sizes[: self.group.rank])
        pieces: list[tuple[Measurement, MeasurementBlock]] = []
        failed = None
        own = Sums(torch.zeros_like(before.belief.mean), torch.zeros_like(before.belief.mean), *self._nothing(), 0)
        try:
            if size and share.inputs is not None:
                self.kf.linearize.prepare(before.belief.mean, share.inputs)
                shifted = before._replace(examples=before.examples + first)  # so that no two draw the same probes
                targets = self.kf._check_targets(shifted, size, share.targets)
                for batch in list(self.kf._measure(shifted, share.inputs, targets, before.belief.mean)):
                    if whole:
                        builder.add_outputs(
                            batch.outputs, batch.targets, noise.likelihood(self.config.noise_settings, before.noise)
                        )
                    builder.add_linearization(len(batch.targets), batch.projected.lumped)
                    numbered = shifted._replace(examples=shifted.examples + own.examples)
                    part = batch.block(slice(0, len(batch.targets)), max(batch.rows_per_example))
                    pieces.append((batch, part))
                    own = self._added(own, numbered, batch, part)
        except Exception as raised:  # whatever it is, the others must not wait for this process
            failed = raised
        self.shares.all_or_none(failed)
        sums = self._summed(own, sum(share.sizes))
        check_finite("the precision", sums.precision)
        check_finite("the gradient", sums.gradient)
        return pieces, sums

    def _nothing(self) -> tuple[Tensor, TemperatureState]:
        device = self.adapter.device
        return torch.zeros((), dtype=torch.float64, device=device), tempering.init(device)

    def _added(self, sums: Sums, state: FilterState, batch: Measurement, part: MeasurementBlock) -> Sums:
        """The sums with a piece of this process's examples."""
        everything = slice(0, len(batch.targets))
        output_cov = state.belief.output_covariance(part.jacobian).to(part.outputs.dtype)
        scores = score_temperatures(
            self.config, state._replace(temperature_scores=sums.temperature_scores), batch, everything, part, output_cov
        )
        factor, residual = part.family.whiten(part.outputs.double(), part.targets)
        seen = part.jacobian.left_multiply(factor)
        curved = seen if part.probes is None else part.directions.left_multiply(part.probes.factor(part.outputs))
        return Sums(
            sums.precision + curved.column_squares(),
            sums.gradient + seen.rmatvec(residual.to(seen.like)),
            sums.log_prob + part.family.log_prob(part.outputs, part.targets).double().sum(),
            scores,
            sums.examples + len(batch.targets),
        )

    def _summed(self, own: Sums, examples: int) -> Sums:
        size = len(tempering.GRID)
        numbers = [own.log_prob.view(1), own.temperature_scores.total, own.temperature_scores.differences.flatten()]
        log_prob, total, differences = self.group.total(torch.cat(numbers)).split([1, size, size**2])
        scores = TemperatureState(0, total, differences.view(size, size))
        return Sums(self.group.total(own.precision), self.group.total(own.gradient), log_prob[0], scores, examples)

    def _condition(
        self,
        state: FilterState,
        pieces: list[tuple[Measurement, MeasurementBlock]],
        sums: Sums,
        builder: UpdateInfoBuilder,
    ) -> tuple[DiagonalGaussian, float, bool]:
        """The belief after the batch, its damping, and whether the linearization held, without a refused step.

        A batch that can be halved is not damped. A smaller one is, until the objective falls; where it never does, the
        belief stays as it was.
        """
        damping, prior = 1.0, _diagonal(state)
        dampings = MAX_DAMPINGS if sums.examples < 2 * MIN_BLOCK_EXAMPLES else 0
        for attempt in range(dampings + 1):
            variance = prior.variance / (1.0 + damping * sums.precision * prior.variance)
            found = prior._replace(mean=prior.mean + variance * damping * sums.gradient, variance=variance)
            accepted, held = self._judged(state, found, pieces, sums, builder) if self.config.damping else (True, True)
            if accepted:
                break
            if attempt == dampings:
                if dampings:
                    check_finite("the mean", found.mean)
                    warn_of_refused_steps()
                return prior, 0.0, False
            damping *= DAMPING_STEP
        check_finite("the mean", found.mean)
        check_finite("the variance", found.variance)
        return found, damping, held

    def _judged(
        self,
        state: FilterState,
        found: DiagonalGaussian,
        pieces: list[tuple[Measurement, MeasurementBlock]],
        sums: Sums,
        builder: UpdateInfoBuilder,
    ) -> tuple[bool, bool]:
        """Whether a step lowers −log p(y | μ) + ½ δᵀP⁻¹δ over all processes, and the linearization holds after it.

        Both without a look where it moves no output far.
        """
        family, step = noise.likelihood(self.config.noise_settings, state.noise), found.mean - state.belief.mean
        finite = bool(torch.isfinite(found.mean).all())
        small = finite and all(
            is_small_change(batch.jacobian.matvec(step), family, TRUST_RADIUS) for batch, _ in pieces
        )
        if sum(self.group.numbers(int(not small), self.adapter.device)) == 0:
            return True, True
        sent = torch.zeros(2, dtype=torch.float64, device=self.adapter.device)  # log loss, and how far from linear
        for batch, part in pieces if finite else []:
            everything = slice(0, len(batch.targets))
            moved = batch.outputs_at(found.mean, everything)
            builder.add_check(len(batch.targets))
            sent[0] -= family.log_prob(moved, batch.targets).double().sum()
            sent[1] += linearization_error(batch, everything, part, found.mean, moved) * len(batch.targets)
        loss, apart = self.group.total(sent if finite else sent + torch.inf).tolist()
        penalty = 0.5 * float((step.square() / _diagonal(state).variance).sum())
        before = -float(sums.log_prob)
        return loss + penalty <= before + OBJECTIVE_RTOL * (1.0 + abs(before)), apart / sums.examples < MAX_DIVERGENCE


def _diagonal(state: FilterState) -> DiagonalGaussian:
    """The belief of a state, whose structure ``WANTED`` makes diagonal."""
    assert isinstance(state.belief, DiagonalGaussian)
    return state.belief


def _joined(scores: TemperatureState, new: TemperatureState) -> TemperatureState:
    """The scores with those of one more batch."""
    return TemperatureState(scores.updates + 1, scores.total + new.total, scores.differences + new.differences)
