"""The information form on several processes: each update sums two vectors of length n over the processes.

The precision of a diagonal belief in information form grows by diag(JᵀVJ), and its mean moves by P Jᵀ(y − π). Both are
sums over examples. Every process holds the whole belief. The filter conditions on a whole global batch at once,
expanded at the mean before it (the natural gradient step). If the linearization does not hold for that step
(``linearization_check``), it conditions on the first half of the batch, linearizes again, and conditions on the second
half. Innovations are not computed: they need the Jacobian rows of all processes together.
"""

from __future__ import annotations

import torch

from bayes_kf.distributed.batch_shards import BatchShard
from bayes_kf.distributed.batch_sums import BatchSums
from bayes_kf.distributed.distributed_filter import DistributedFilter
from bayes_kf.inference.config_combinations import OWN_NOISE
from bayes_kf.inference.covariance.diagonal import DiagonalGaussian
from bayes_kf.inference.filtering.linearization_check import (
    MAX_DIVERGENCE,
    TRUST_RADIUS,
    is_small_change,
    linearization_error,
)
from bayes_kf.inference.filtering.measurement import Measurement, MeasurementBlock
from bayes_kf.inference.filtering.measurement_update import check_finite, score_temperatures
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.filtering.step_guard import (
    DAMPING_STEP,
    MAX_DAMPINGS,
    MIN_BLOCK_EXAMPLES,
    OBJECTIVE_RTOL,
    warn_of_refused_steps,
)
from bayes_kf.inference.filtering.update_info import UpdateInfo, UpdateInfoBuilder
from bayes_kf.inference.measurement_model import noise
from bayes_kf.models.batch import Batch

LinearizedPiece = tuple[Measurement, MeasurementBlock]
NEEDED = {"covariance": "diagonal_information", "noise": "exponential_family", "expansion": "mean"}


class DataParallelFilter(DistributedFilter):
    """A filter in information form over the processes of a group; each holds the whole belief.

    Each process sends 2n numbers in an update, whatever the size of the batch; :class:`ShardedFilter` sends Jacobian
    rows. The result equals that of ``KalmanConfig(covariance="diagonal_information", expansion="mean")`` on one process
    that conditions on all examples at once. A single process divides batches of more than 192 rows; this filter divides
    a batch only if its linearization does not hold. The random numbers for temperature scores and curvature probes
    differ from those of one process. ``info`` describes the examples of this process and has no innovation.

    Args:
        model: the same on every process.
        config: the settings above, without a gate or an estimated noise variance.
        group: of torch.distributed; by default that of ``init_process_group``.

    Raises:
        ValueError: for another config.
        RuntimeError: if torch.distributed is not initialized, or the models or settings of the processes differ.
    """

    NEEDS_EXAMPLE = False

    def shard(self, state: FilterState) -> FilterState:
        """The state itself: every process holds all of it."""
        return state

    def gather(self, state: FilterState) -> FilterState:
        """The state itself."""
        return state

    def _own_prior(self, prior: DiagonalGaussian) -> DiagonalGaussian:
        return prior

    def _check_config(self) -> None:
        if self.config.likelihood in OWN_NOISE:
            raise ValueError(
                f"`likelihood` must not be one of {', '.join(OWN_NOISE)} for a DataParallelFilter, which expands "
                f"at the mean, got {self.config.likelihood!r}."
            )
        for name, value in NEEDED.items():
            if getattr(self.config, name) != value:
                raise ValueError(
                    f"`{name}` must be {value!r} for a DataParallelFilter, got {getattr(self.config, name)!r}."
                )
        if self.config.gate_quantile is not None:
            raise ValueError(f"`gate_quantile` must be None for a DataParallelFilter, got {self.config.gate_quantile}.")
        if self.config.noise_variance == "estimated":
            raise ValueError("`noise_variance` must be a number for a DataParallelFilter, got 'estimated'.")

    def _update(self, state: FilterState, batch: BatchShard) -> tuple[FilterState, UpdateInfo]:
        before, builder = self.kf._predict(state), UpdateInfoBuilder()
        after, damping, linearizations = self._measurement_update(before, batch, builder, is_whole=True)
        after = after._replace(noise=before.noise._replace(step=before.noise.step + 1), step=before.step + 1)
        step_norm = float((after.belief.mean - before.belief.mean).norm())
        return after, builder.build(step_norm, relinearized=linearizations - 1)._replace(damping=damping)

    def _measurement_update(
        self, state: FilterState, batch: BatchShard, builder: UpdateInfoBuilder, is_whole: bool
    ) -> tuple[FilterState, float, int]:
        """The state after a global batch, the smallest damping, and the number of linearizations.

        The update takes the batch at once. If its linearization does not hold, it takes the two halves in turn.

        Args:
            state: before the batch.
            batch: this process's shard of it.
            builder: of the update.
            is_whole: whether ``batch`` is the whole batch of the update; if so, ``builder`` records its outputs.
        """
        pieces, sums = self._linearize(state, batch, builder, is_whole)
        size = sums.examples
        belief, damping, holds = self._condition(state, pieces, sums, builder)
        if holds or size < 2 * MIN_BLOCK_EXAMPLES:
            is_scored = isinstance(self.config.temperature, str)
            scores = sums.added_scores(state.temperature_scores) if is_scored else state.temperature_scores
            return state._replace(belief=belief, temperature_scores=scores, examples=state.examples + size), damping, 1
        smallest, linearizations = 1.0, 1
        for where in (slice(0, size // 2), slice(size // 2, size)):
            half = batch.subset(where, self.group.rank)
            state, damping, more = self._measurement_update(state, half, builder, is_whole=False)
            smallest, linearizations = min(smallest, damping), linearizations + more
        return state, smallest, linearizations

    def _linearize(
        self, before: FilterState, batch: BatchShard, builder: UpdateInfoBuilder, is_whole: bool
    ) -> tuple[list[LinearizedPiece], BatchSums]:
        """This process's linearized pieces of a global batch, and the sums over all processes."""
        pieces: list[LinearizedPiece] = []
        own, failure = BatchSums.zeros(before.belief.mean), None
        try:
            if batch.sizes[self.group.rank] and batch.inputs is not None:
                pieces, own = self._linearize_local(before, batch, builder, is_whole)
        except Exception as raised:  # of any kind, or the other processes would wait for this one
            failure = raised
        self.group.raise_together(failure)
        sums = own.over_processes(self.group, sum(batch.sizes))
        check_finite("the precision", sums.precision)
        check_finite("the gradient", sums.gradient)
        return pieces, sums

    def _linearize_local(
        self, before: FilterState, batch: BatchShard, builder: UpdateInfoBuilder, is_whole: bool
    ) -> tuple[list[LinearizedPiece], BatchSums]:
        """This process's linearized pieces of a global batch, and the sums over its examples."""
        assert batch.inputs is not None
        local = Batch(batch.inputs, batch.targets, batch.sizes[self.group.rank])
        self.kf.linearize.prepare(before.belief.mean, local)
        pieces: list[LinearizedPiece] = []
        first, own = sum(batch.sizes[: self.group.rank]), BatchSums.zeros(before.belief.mean)
        shifted = before._replace(examples=before.examples + first)  # so that no two processes draw the same probes
        checked = local.with_targets(self.kf._check_targets(shifted, local))
        for piece in list(self.kf._measure(shifted, checked, before.belief.mean)):
            if is_whole:
                builder.add_outputs(
                    piece.outputs, piece.targets, noise.likelihood(self.config.noise_settings, before.noise)
                )
            builder.add_linearization(len(piece.targets), piece.projected.lumped)
            numbered = shifted._replace(examples=shifted.examples + own.examples)
            block = piece.block(slice(0, len(piece.targets)), max(piece.rows_per_example))
            pieces.append((piece, block))
            own = self._add_piece(own, numbered, piece, block)
        return pieces, own

    def _add_piece(self, sums: BatchSums, state: FilterState, piece: Measurement, block: MeasurementBlock) -> BatchSums:
        """The sums with one more piece of this process's examples."""
        everything = slice(0, len(piece.targets))
        output_cov = state.belief.output_covariance(block.jacobian).to(block.outputs.dtype)
        scores = score_temperatures(
            self.config,
            state._replace(temperature_scores=sums.temperature_scores),
            piece,
            everything,
            block,
            output_cov,
        )
        factor, residual = block.family.whiten(block.outputs.double(), block.targets)
        whitened = block.jacobian.left_multiply(factor)
        curvature = (
            whitened if block.probes is None else block.directions.left_multiply(block.probes.factor(block.outputs))
        )
        return BatchSums(
            sums.precision + curvature.column_squares(),
            sums.gradient + whitened.rmatvec(residual.to(whitened.like)),
            sums.log_prob + block.family.log_prob(block.outputs, block.targets).double().sum(),
            scores,
            sums.examples + len(piece.targets),
        )

    def _condition(
        self,
        state: FilterState,
        pieces: list[LinearizedPiece],
        sums: BatchSums,
        builder: UpdateInfoBuilder,
    ) -> tuple[DiagonalGaussian, float, bool]:
        """The belief after the batch, its damping, and whether the linearization holds and no step was rejected.

        A batch that can be halved is not damped. A smaller batch is damped until the objective decreases; if it never
        does, the belief stays the same.
        """
        damping, prior = 1.0, _diagonal_belief(state)
        max_dampings = MAX_DAMPINGS if sums.examples < 2 * MIN_BLOCK_EXAMPLES else 0
        for attempt in range(max_dampings + 1):
            variance = prior.variance / (1.0 + damping * sums.precision * prior.variance)
            after = prior._replace(mean=prior.mean + variance * damping * sums.gradient, variance=variance)
            accepted, holds = (
                self._check_step(state, after, pieces, sums, builder) if self.config.damping else (True, True)
            )
            if accepted:
                break
            if attempt == max_dampings:
                if max_dampings:
                    check_finite("the mean", after.mean)
                    warn_of_refused_steps()
                return prior, 0.0, False
            damping *= DAMPING_STEP
        check_finite("the mean", after.mean)
        check_finite("the variance", after.variance)
        return after, damping, holds

    def _check_step(
        self,
        state: FilterState,
        after: DiagonalGaussian,
        pieces: list[LinearizedPiece],
        sums: BatchSums,
        builder: UpdateInfoBuilder,
    ) -> tuple[bool, bool]:
        """Whether a step lowers −log p(y | μ) + ½ δᵀP⁻¹δ over all processes, and its linearization holds.

        A step that changes no output by ``TRUST_RADIUS`` or more passes without a forward pass.
        """
        family, step = noise.likelihood(self.config.noise_settings, state.noise), after.mean - state.belief.mean
        is_finite = bool(torch.isfinite(after.mean).all())
        is_trusted = is_finite and all(
            is_small_change(piece.jacobian.matvec(step), family, piece.outputs, TRUST_RADIUS) for piece, _ in pieces
        )
        if sum(self.group.all_gather_int(int(not is_trusted), self.adapter.device)) == 0:
            return True, True
        local = torch.zeros(2, dtype=torch.float64, device=self.adapter.device)  # log loss, divergence from linear
        for piece, block in pieces if is_finite else []:
            everything = slice(0, len(piece.targets))
            outputs = piece.outputs_at(after.mean, everything)
            builder.add_check(len(piece.targets))
            local[0] -= family.log_prob(outputs, piece.targets).double().sum()
            local[1] += linearization_error(piece, everything, block, after.mean, outputs) * len(piece.targets)
        loss, divergence = self.group.all_reduce(local if is_finite else local + torch.inf).tolist()
        penalty = 0.5 * float((step.square() / _diagonal_belief(state).variance).sum())
        before = -float(sums.log_prob)
        is_lower = loss + penalty <= before + OBJECTIVE_RTOL * (1.0 + abs(before))
        return is_lower, divergence / sums.examples < MAX_DIVERGENCE


def _diagonal_belief(state: FilterState) -> DiagonalGaussian:
    """The belief of a state, which is diagonal by ``NEEDED``."""
    assert isinstance(state.belief, DiagonalGaussian)
    return state.belief
