"""The exact filter on several processes: each linearizes its share of a batch and holds its share of the belief.

An update of a global batch, whose examples lie process after process, is that of one process on the whole batch up to
the order in which sums are made:

1. the mean is gathered (n numbers) and every process linearizes its own examples;
2. outputs, targets and directions are shared (B·m numbers), rows of the Jacobian sent to who holds their columns
   (B·c·n numbers in all, all-to-all);
3. every process conditions its shard of the belief on all rows; Gram matrices (B·c)² and the like are summed.

Where the rest of a batch is linearized again, 1 to 3 are done again for it.

A process holds n/R of every vector and factor of the belief, and of the rows B·c·n/R. Ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from bayes_kf.distributed.batch_shards import Share
from bayes_kf.distributed.distributed_filter import FilterOfMany
from bayes_kf.distributed.parameter_shards import Columns
from bayes_kf.distributed.row_exchange import columns_for_rows
from bayes_kf.inference.covariance.diagonal import DiagonalGaussian
from bayes_kf.inference.filtering.gradient_penalty import PenalizedState
from bayes_kf.inference.filtering.measurement import Measurement
from bayes_kf.inference.filtering.measurement_update import check_finite
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.filtering.update_info import UpdateInfo
from bayes_kf.inference.linearization import parameter_sums
from bayes_kf.inference.linearization.row_buffer import Directions
from bayes_kf.inference.measurement_model import noise
from bayes_kf.inference.measurement_model.output_directions import num_rows, project_outputs

SHARDED = ("diagonal", "diagonal_information", "diagonal_mixed", "low_rank")


class ShardedFilter(FilterOfMany):
    """A :class:`KalmanFilter` over the processes of a group; the model lies on each, the belief is divided among them.

    Every process makes the same calls, each with its own examples. Results are those of one filter that is given all
    examples, process after process, but for rounding. Only where "truncated" curvature meets a batch of more than 192
    rows may parts of the batch, which are learned one after the other, be cut elsewhere.

    Args:
        model: the same on every process.
        config: the settings, the same on every process. ``covariance`` is one of the diagonal forms or "low_rank".
        group: of torch.distributed; by default that of ``init_process_group``.

    Raises:
        ValueError: for a config that cannot be divided.
        RuntimeError: where torch.distributed was not initialized, or the processes' models or settings differ.

    Example (``torchrun --nproc-per-node 4 script.py``)::

        torch.distributed.init_process_group()
        kf = bkf.distributed.ShardedFilter(model, bkf.KalmanConfig())
        state = kf.init(some_inputs)
        for inputs, targets in my_share_of_the_loader:
            state, info = kf.update(state, inputs, targets)
        posterior = kf.posterior(state)  # whole, on every process
    """

    def _prepare(self) -> None:
        self.columns = Columns(self.adapter, self.group.size, self.group.rank)

    def shard(self, state: FilterState) -> FilterState:
        """This process's share of a whole state: of one that was saved, say."""
        return _over(state, self.columns.shard)

    def gather(self, state: FilterState) -> FilterState:
        """The whole state, on every process."""
        return _over(state, self._gathered)

    def _check(self) -> None:
        if self.config.covariance not in SHARDED:
            wanted = ", ".join(SHARDED)
            raise ValueError(f"`covariance` must be one of {wanted} to be divided, got {self.config.covariance!r}.")

    def _update(self, state: FilterState, share: Share) -> tuple[FilterState, UpdateInfo]:
        with parameter_sums.sharded(self.group.total):
            before = self.kf._predict(state)
        start, size = before.belief.mean, sum(share.sizes)
        targets = self.group.rows(share.targets, share.sizes)

        def observe(now: FilterState, where: slice, mean: Tensor) -> Iterator[Measurement]:
            with parameter_sums.unsharded():
                batch = self._observed(now, share.some(where, self.group.rank) if where != slice(0, size) else share)
            yield batch

        def outputs(where: slice) -> Tensor:
            raise AssertionError("all of a global batch is linearized where it begins")

        with parameter_sums.sharded(self.group.total):
            return self.kf._update_measured(PenalizedState(before), start, targets, observe, outputs)

    def _observed(self, state: FilterState, share: Share) -> Measurement:
        """The global batch over this process's columns, linearized at the state's mean."""
        kf, sizes = self.kf, share.sizes
        assert share.inputs is not None  # an example is always at hand
        mean, here = self._gathered(state.belief.mean), slice(0, sizes[self.group.rank])
        linearized, failed = None, None
        try:
            linearized = kf.linearize(mean, share.inputs)
        except Exception as error:  # whatever it is, the others must not wait for this process
            failed = error
        self.shares.all_or_none(failed)
        assert linearized is not None
        outputs = self.group.rows(linearized.outputs[here], sizes)
        targets = self.group.rows(share.targets, sizes)
        check_finite("the outputs", outputs)
        family = noise.likelihood(self.config.noise_settings, state.noise)
        targets = family.check(outputs, targets)
        projected = project_outputs(
            self.config.curvature_settings, family, outputs, targets, self.config.seed + state.examples
        )
        first = sum(sizes[: self.group.rank]) if sizes[self.group.rank] else 0
        own = _directions(projected.directions, first, linearized.outputs)
        if own is None and family.name == "categorical":
            jacobian = linearized.softmax_jacobian()
        else:
            jacobian = linearized.jacobian(own)
        jacobian = columns_for_rows(self.group, self.columns, jacobian.examples(here), sizes)
        needed = None if projected.directions is None else projected.directions.rows_per_example
        rows = (
            [num_rows(self.config.curvature_settings, outputs.shape[1])] * sum(sizes)
            if needed is None
            else needed.tolist()
        )
        return Measurement(self._outputs_of(share), targets, outputs, state.belief.mean, projected, jacobian, rows)

    def _outputs_of(self, share: Share) -> Callable[[Tensor, slice], Tensor]:
        """From a shard of θ and which examples of the global batch to their outputs."""

        def outputs_at(mean: Tensor, which: slice) -> Tensor:
            whole, some = self._gathered(mean), share.some(which, self.group.rank)
            assert some.inputs is not None
            found = self.adapter.outputs(whole, some.inputs)[: some.sizes[self.group.rank]]
            return self.group.rows(found, some.sizes)

        return outputs_at

    def _gathered(self, shard: Tensor) -> Tensor:
        counts = self.columns.counts
        return self.columns.whole(list(self.group.rows(shard, counts).split(list(counts))))


def _directions(directions: Directions | None, first: int, outputs: Tensor) -> Directions | None:
    """Those of the examples from ``first`` on, as many as there are ``outputs``."""
    if directions is None:
        return None

    def seeds(example: Tensor, which: Tensor) -> Tensor:
        return directions.seeds(example + first, which)

    needed = None if directions.rows_per_example is None else directions.rows_per_example[first : first + len(outputs)]
    return Directions(directions.num_rows, seeds, needed)


def _over(state: FilterState, change: Callable[[Tensor], Tensor]) -> FilterState:
    """A state with every tensor that runs over parameters changed: the first dimension of those of a belief."""

    def changed(name: str, values: Tensor) -> Tensor:
        return values if name == "gram" else change(values)  # of low rank, over its columns

    tensors = {name: changed(name, values) for name, values in state.belief._asdict().items()}
    belief = type(state.belief)(**tensors)
    return state._replace(belief=belief, prior=DiagonalGaussian(*map(change, state.prior)))
