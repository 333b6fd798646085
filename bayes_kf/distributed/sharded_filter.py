"""The exact filter on several processes, each of which linearizes its examples and holds its shard of the belief.

The examples of a global batch are ordered by process. An update with it equals that of one process with the whole
batch, up to the order of summation:

1. Every process gathers the mean (n numbers) and linearizes its own examples.
2. The processes share outputs, targets and output directions (B·m numbers). Each row of the Jacobian goes to the
   processes that hold its columns (all-to-all, B·c·n numbers in all).
3. Every process conditions its shard of the belief on all rows. Gram matrices (B·c)² and similar terms are summed over
   the processes.

If the filter linearizes the rest of a batch again, it repeats these steps for the rest.

Of R processes, each holds n/R entries of every vector and factor of the belief, and B·c·n/R numbers of the rows. Ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bayes_kf.distributed import divided_checkpoint
from bayes_kf.distributed.batch_shards import BatchShard
from bayes_kf.distributed.distributed_filter import DistributedFilter
from bayes_kf.distributed.parameter_shards import ParameterShards
from bayes_kf.distributed.row_exchange import exchange_rows
from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.covariance.diagonal import DiagonalGaussian
from bayes_kf.inference.filtering.gradient_penalty import PenalizedState
from bayes_kf.inference.filtering.measurement import Measurement
from bayes_kf.inference.filtering.measurement_update import check_finite
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.filtering.update_info import UpdateInfo
from bayes_kf.inference.linearization.row_buffer import Directions
from bayes_kf.inference.linearization.shared_batch import Linearized
from bayes_kf.inference.measurement_model import noise
from bayes_kf.inference.measurement_model.output_directions import num_rows, project_outputs
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs, to_device
from bayes_kf.processes import parameter_sums

SHARDED = ("diagonal", "diagonal_information", "diagonal_mixed", "low_rank")


class ShardedFilter(DistributedFilter):
    """A :class:`KalmanFilter` over the processes of a group; each has the whole model and a shard of the belief.

    All processes make the same calls, each with its own examples. The results equal those of one filter with all
    examples, ordered by process, up to rounding. One exception: with "truncated" curvature and a batch of more than 192
    rows, the batch may be divided at other examples.

    Args:
        model: the same on every process.
        config: the settings, the same on every process. ``covariance`` is one of the diagonal forms or "low_rank".
        group: of torch.distributed; by default that of ``init_process_group``.

    Raises:
        ValueError: if the config cannot be sharded.
        RuntimeError: if torch.distributed is not initialized, or the models or settings of the processes differ.

    Example (``torchrun --nproc-per-node 4 script.py``)::

        torch.distributed.init_process_group()
        kf = bkf.distributed.ShardedFilter(model, bkf.KalmanConfig())
        state = kf.init(some_inputs)
        for inputs, targets in my_share_of_the_loader:
            state, info = kf.update(state, inputs, targets)
        posterior = kf.posterior(state)  # whole, on every process
    """

    def __init__(self, model: nn.Module | AdapterModel, config: KalmanConfig | None = None, group: Any = None) -> None:
        super().__init__(model, config, group)
        self.parameter_shards = ParameterShards(self.adapter, self.group.size, self.group.rank)

    def shard(self, state: FilterState) -> FilterState:
        """This process's shard of a whole state, for example of a saved one."""
        return _map_parameters(state, self.parameter_shards.shard)

    def gather(self, state: FilterState) -> FilterState:
        """The whole state, on every process."""
        return _map_parameters(state, self._gather_vector)

    def save_divided(self, state: FilterState, folder: str | Path) -> None:
        """Save the state of which each process has its shard, without the whole of it on any of them.

        Every process calls this, and sees ``folder``. An earlier checkpoint there is replaced once this is complete;
        other files stay. For use without the filter, :meth:`save_pretrained` saves the whole posterior.

        Raises:
            ValueError: on the first process, if other files are in the way.
            OSError: if a file cannot be written; the earlier checkpoint stays.
            OtherProcessError: on the other processes, in these cases.
        """
        divided_checkpoint.save(self, state, folder)

    def load_divided(self, folder: str | Path, inputs: Inputs | None = None) -> FilterState:
        """This process's shard of a state that any number of processes saved with :meth:`save_divided`.

        Args:
            folder: of the checkpoint.
            inputs: a batch, if the first update may give this process no examples.

        Raises:
            ValueError: if the folder has no complete checkpoint, or one of another model or other settings.
            OtherProcessError: if only another process finds that.
        """
        if inputs is not None:
            self.batch_shards.remember(to_device(inputs, self.adapter.device))
        return divided_checkpoint.load(self, folder)

    def _own_prior(self, prior: DiagonalGaussian) -> DiagonalGaussian:
        return DiagonalGaussian(*map(self.parameter_shards.shard, prior))

    def _check_config(self) -> None:
        if self.config.covariance not in SHARDED:
            raise ValueError(
                f"`covariance` must be one of {', '.join(SHARDED)} to be sharded, got {self.config.covariance!r}."
            )

    def _update(self, state: FilterState, batch: BatchShard) -> tuple[FilterState, UpdateInfo]:
        with parameter_sums.sharded(self.group.all_reduce):
            before = self.kf._predict(state)
        point, size = before.belief.mean, sum(batch.sizes)
        targets = self.group.all_gather_rows(batch.targets, batch.sizes)

        def measure(now: FilterState, where: slice, mean: Tensor) -> Iterator[Measurement]:
            part = batch if where == slice(0, size) else batch.subset(where, self.group.rank)
            with parameter_sums.unsharded():
                measurement = self._measure(now, part)
            yield measurement

        def outputs_at_point(where: slice) -> Tensor:
            raise AssertionError("the first linearization covers the whole global batch")

        with parameter_sums.sharded(self.group.all_reduce):
            return self.kf._update_measured(PenalizedState(before), point, targets, measure, outputs_at_point)

    def _measure(self, state: FilterState, batch: BatchShard) -> Measurement:
        """The global batch over this process's parameters, linearized at the state's mean."""
        sizes, rank = batch.sizes, self.group.rank
        linearized = self._linearize(state, batch)
        outputs = self.group.all_gather_rows(linearized.outputs[: sizes[rank]], sizes)
        targets = self.group.all_gather_rows(batch.targets, sizes)
        check_finite("the outputs", outputs)
        family = noise.likelihood(self.config.noise_settings, state.noise)
        targets = family.check(outputs, targets)
        seed = self.config.seed + state.examples
        projected = project_outputs(self.config.curvature_settings, family, outputs, targets, seed)
        first = sum(sizes[:rank]) if sizes[rank] else 0
        own = _local_directions(projected.directions, first, linearized.outputs)
        if own is None and family.name == "categorical":
            jacobian = linearized.softmax_jacobian()
        else:
            jacobian = linearized.jacobian(own)
        jacobian = exchange_rows(self.group, self.parameter_shards, jacobian.examples(slice(0, sizes[rank])), sizes)
        needed = None if projected.directions is None else projected.directions.rows_per_example
        rows = (
            [num_rows(self.config.curvature_settings, outputs.shape[1])] * sum(sizes)
            if needed is None
            else needed.tolist()
        )
        return Measurement(self._outputs_of(batch), targets, outputs, state.belief.mean, projected, jacobian, rows)

    def _linearize(self, state: FilterState, batch: BatchShard) -> Linearized:
        """This process's examples, linearized at the state's mean, once every process has linearized its own."""
        assert batch.inputs is not None  # `NEEDS_EXAMPLE`
        mean, linearized, failure = self._gather_vector(state.belief.mean), None, None
        try:
            linearized = self.kf.linearize(mean, batch.inputs)
        except Exception as raised:  # of any kind, or the other processes would wait for this one
            failure = raised
        self.group.raise_together(failure)
        assert linearized is not None
        return linearized

    def _outputs_of(self, batch: BatchShard) -> Callable[[Tensor, slice], Tensor]:
        """The function from a shard of θ and a slice of the global batch to the outputs of all its examples."""

        def outputs_at(mean: Tensor, which: slice) -> Tensor:
            whole, part = self._gather_vector(mean), batch.subset(which, self.group.rank)
            assert part.inputs is not None
            outputs = self.adapter.outputs(whole, part.inputs)[: part.sizes[self.group.rank]]
            return self.group.all_gather_rows(outputs, part.sizes)

        return outputs_at

    def _gather_vector(self, shard: Tensor) -> Tensor:
        """Values for all parameters, (n, ...), from this process's shard of them."""
        counts = self.parameter_shards.counts
        return self.parameter_shards.join(list(self.group.all_gather_rows(shard, counts).split(list(counts))))


def _local_directions(directions: Directions | None, first: int, outputs: Tensor) -> Directions | None:
    """The output directions of ``len(outputs)`` examples of the global batch, from number ``first`` on."""
    if directions is None:
        return None

    def seeds(example: Tensor, which: Tensor) -> Tensor:
        return directions.seeds(example + first, which)

    needed = None if directions.rows_per_example is None else directions.rows_per_example[first : first + len(outputs)]
    return Directions(directions.num_rows, seeds, needed)


def _map_parameters(state: FilterState, function: Callable[[Tensor], Tensor]) -> FilterState:
    """The state with a function applied to every tensor whose first dimension runs over the parameters."""

    def apply(name: str, values: Tensor) -> Tensor:
        return values if name == "gram" else function(values)  # "gram" runs over the low-rank columns

    belief = type(state.belief)(**{name: apply(name, values) for name, values in state.belief._asdict().items()})
    return state._replace(belief=belief, prior=DiagonalGaussian(*map(function, state.prior)))
