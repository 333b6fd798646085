"""The exact filter on several processes: each linearizes its share of a batch and holds its share of the belief.

An update of a global batch, whose examples lie process after process, is that of one process on the whole batch up to
the order in which sums are made:

1. the mean is gathered (n numbers) and every process linearizes its own examples;
2. outputs, targets and directions are shared (B·m numbers), rows of the Jacobian sent to who holds their columns
   (B·c·n numbers in all, all-to-all);
3. every process conditions its shard of the belief on all rows; Gram matrices (B·c)² and the like are summed.

A process holds n/R of every vector and factor of the belief, and of the rows B·c·n/R. Ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bayes_kf.distributed.columns import Columns
from bayes_kf.distributed.group import Group, OtherProcessError
from bayes_kf.distributed.rows import columns_for_rows
from bayes_kf.inference import diagonal, noise, penalty, sharding
from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.curvature import num_rows, see
from bayes_kf.inference.evidence import Batch
from bayes_kf.inference.filter import KalmanFilter
from bayes_kf.inference.learn import check_finite
from bayes_kf.inference.posterior import Posterior
from bayes_kf.inference.state import DIVERGED, DivergenceError, FilterState, UpdateInfo
from bayes_kf.inference.store import Directions
from bayes_kf.models.adapter import AdapterModel, Inputs, batch_size, check_inputs, some_examples, to_device

SHARDED = ("diagonal", "diagonal_information", "diagonal_mixed", "low_rank")


class Share(NamedTuple):
    """This process's part of a global batch.

    Attributes:
        inputs: of its examples; where it has none, of one that it saw before.
        targets: (B_r,) or (B_r, m).
        sizes: how many examples each process has.
    """

    inputs: Inputs
    targets: Tensor
    sizes: list[int]


class ShardedFilter:
    """A :class:`KalmanFilter` over the processes of a group; the model lies on each, the belief is divided among them.

    Every process makes the same calls, each with its own examples. Results are those of one filter that is given all
    examples, process after process.

    Args:
        model: the same on every process.
        config: the settings, the same on every process. ``covariance`` is one of the diagonal forms or "low_rank".
        group: of torch.distributed; by default that of ``init_process_group``.

    Raises:
        ValueError: for a config that cannot be divided.
        RuntimeError: where torch.distributed was not initialized, or the processes' models or settings differ.

    Example (``torchrun --nproc-per-node 4 script.py``):

        torch.distributed.init_process_group()
        kf = bkf.distributed.ShardedFilter(model, bkf.KalmanConfig())
        state = kf.init(some_inputs)  # the same on every process
        for inputs, targets in my_share_of_the_loader:
            state, info = kf.update(state, inputs, targets)
        posterior = kf.posterior(state)  # whole, on every process
    """

    def __init__(self, model: nn.Module | AdapterModel, config: KalmanConfig | None = None, group: Any = None) -> None:
        self.group, self.config = Group(group), config or KalmanConfig()
        _check(self.config)
        self.kf = KalmanFilter(model, self.config)
        self.adapter = self.kf.adapter
        mean = self.adapter.vector()
        self.group.check_alike(
            "`model` and `config`",
            self.config,
            self.adapter.names,
            self.adapter.shapes,
            float(mean.double().sum()),
            float(mean.double().square().sum()),
            device=mean.device,
        )
        self.columns = Columns(self.adapter, self.group.size, self.group.rank)
        self._seen: Inputs | None = None  # an example, for batches of which this process has none

    def init(self, inputs: Inputs | None = None) -> FilterState:
        """This process's share of the prior.

        Args:
            inputs: what the prior's scale is measured on, the same on every process; see :meth:`KalmanFilter.init`.

        Raises:
            ValueError: without inputs where the prior needs them.
            RuntimeError: where the processes' inputs differ.
        """
        state = self.kf.init(inputs)
        if not state.scaled:
            raise ValueError(
                "`inputs` must be given, the same on every process: the prior's scale is measured on them."
            )
        if inputs is not None:
            self._remember(to_device(inputs, self.adapter.device))
        variance = state.prior.variance.double()
        self.group.check_alike("`inputs`", float(variance.sum()), float(variance.log().sum()), device=variance.device)
        return self.shard(state)

    def update(
        self, state: FilterState, inputs: Inputs | None, targets: Tensor | None
    ) -> tuple[FilterState, UpdateInfo]:
        """The belief after one more global batch, and what was seen on the way, of all its examples.

        Args:
            state: this process's share.
            inputs: this process's examples; None where it has none of this batch.
            targets: theirs.

        Raises:
            ValueError: for inputs or targets that do not fit.
            OtherProcessError: where another process raised an error before anything was learned.
            DivergenceError: on every process, when the update would leave the finite or the positive.
        """
        begun = time.perf_counter()
        with self.adapter.full_precision():
            try:
                share = self._share(inputs, targets)
                after, info = self._update(state, share)
            except DIVERGED as error:
                raise DivergenceError(state.step, str(error).splitlines()[0], state) from error
        return after, info._replace(seconds=time.perf_counter() - begun)

    def shard(self, state: FilterState) -> FilterState:
        """This process's share of a whole state: of one that was saved, say."""
        return _over(state, self.columns.shard)

    def gather(self, state: FilterState) -> FilterState:
        """The whole state, on every process."""
        return _over(state, self._gathered)

    def posterior(self, state: FilterState) -> Posterior:
        """The whole posterior, on every process."""
        return Posterior(self.kf, self.gather(state))

    def save_pretrained(self, state: FilterState, folder: str | Path) -> None:
        """Write the whole posterior into ``folder``, as :meth:`Posterior.save_pretrained` does, from the first process.

        Every process returns once it is there.

        Raises:
            OSError, ValueError: on the first process, where it cannot be written; on the others an OtherProcessError.
        """
        whole, failed = self.posterior(state), None
        if self.group.rank == 0:
            try:
                whole.save_pretrained(folder)
            except (OSError, ValueError) as error:
                failed = error
        self._all_or_none(failed)

    def _update(self, state: FilterState, share: Share) -> tuple[FilterState, UpdateInfo]:
        with self._in_shards():
            before = self.kf._predicted(state)
        batch = self._observed(before, share)
        with self._in_shards():
            return self.kf._learned(penalty.Sides(before), [batch])

    def _observed(self, state: FilterState, share: Share) -> Batch:
        """The global batch over this process's columns."""
        kf, sizes = self.kf, share.sizes
        mean, here = self._gathered(state.belief.mean), slice(0, sizes[self.group.rank])
        linearized, failed = None, None
        try:
            linearized = kf.linearize(mean, share.inputs)
        except Exception as error:  # whatever it is, the others must not wait for this process
            failed = error
        self._all_or_none(failed)
        assert linearized is not None
        outputs = self.group.rows(linearized.outputs[here], sizes)
        targets = self.group.rows(share.targets, sizes)
        check_finite("the outputs", outputs)
        family = noise.likelihood(self.config, state.noise)
        targets = family.check(outputs, targets)
        seen = see(self.config, family, outputs, targets, self.config.seed + state.examples)
        first = sum(sizes[: self.group.rank]) if sizes[self.group.rank] else 0
        own = _directions(seen.directions, first, linearized.outputs)
        if own is None and family.name == "categorical":
            jacobian = linearized.pull_differences()
        else:
            jacobian = linearized.pull(own)
        jacobian = columns_for_rows(self.group, self.columns, jacobian.examples(here), sizes)
        needed = None if seen.directions is None else seen.directions.needed
        rows = [num_rows(self.config, outputs.shape[1])] * sum(sizes) if needed is None else needed.tolist()
        return Batch(self._outputs_of(share), targets, outputs, state.belief.mean, seen, jacobian, rows)

    def _outputs_of(self, share: Share) -> Callable[[Tensor, slice], Tensor]:
        """From a shard of θ and which examples of the global batch to their outputs."""
        ends = [sum(share.sizes[: process + 1]) for process in range(self.group.size)]
        size = batch_size(share.inputs)

        def outputs_at(mean: Tensor, which: slice) -> Tensor:
            whole = self._gathered(mean)
            counts = [
                max(0, min(which.stop, end) - max(which.start, end - count))
                for end, count in zip(ends, share.sizes, strict=True)
            ]
            start = max(0, which.start - ends[self.group.rank] + share.sizes[self.group.rank])
            count = counts[self.group.rank]
            some = some_examples(share.inputs, slice(start, start + count) if count else slice(0, 1), size)
            return self.group.rows(self.adapter.outputs(whole, some)[:count], counts)

        return outputs_at

    def _share(self, inputs: Inputs | None, targets: Tensor | None) -> Share:
        """This process's examples once all processes know that theirs fit."""
        failed: Exception | None = None
        size, given, labels = 0, None, None
        try:
            if (inputs is None) != (targets is None):
                raise ValueError("`inputs` and `targets` must both be given, or neither.")
            if inputs is not None and targets is not None:
                check_inputs(inputs)
                given, labels = to_device(inputs, self.adapter.device), targets.to(self.adapter.device)
                size = batch_size(given)
                if len(labels) != size:
                    raise ValueError(f"`targets` must have one entry per example ({size}), got {len(labels)}.")
                self._remember(given)
            elif self._seen is None:
                raise ValueError("`inputs` must be given in the first update, or to `init`: nothing was seen yet.")
            else:
                given = self._seen
        except Exception as error:  # whatever it is, the others must not wait for this process
            failed = error
        sizes = self.group.numbers(-1 if failed else size, self.adapter.device)
        if failed is not None:
            raise failed
        if min(sizes) < 0:
            raise OtherProcessError(f"process {sizes.index(-1)} could not use its examples; nothing was learned")
        if sum(sizes) == 0:
            raise ValueError("`inputs` must be given on one process at least, got none anywhere.")
        assert given is not None
        return Share(given, self._received(labels), sizes)

    def _received(self, labels: Tensor | None) -> Tensor:
        """Targets in the form that all processes send them in."""
        device, numbers = self.adapter.device, self.group.numbers
        width = max(numbers(0 if labels is None or labels.ndim == 1 else labels.shape[1], device))
        floating = max(numbers(int(labels is not None and labels.is_floating_point()), device))
        kind = self.adapter.dtype if floating else torch.int64
        if labels is None:
            return torch.empty((0, width) if width else 0, dtype=kind, device=device)
        return labels.to(kind)

    def _gathered(self, shard: Tensor) -> Tensor:
        counts = self.columns.counts
        return self.columns.whole(list(self.group.rows(shard, counts).split(list(counts))))

    def _remember(self, inputs: Inputs) -> None:
        size = batch_size(inputs)
        if size:
            self._seen = some_examples(inputs, slice(0, 1), size)

    def _all_or_none(self, failed: Exception | None) -> None:
        """Go on where every process can.

        Raises:
            Exception: this process's own, or an OtherProcessError.
        """
        flags = self.group.numbers(int(failed is not None), self.adapter.device)
        if failed is not None:
            raise failed
        if any(flags):
            raise OtherProcessError(f"process {flags.index(1)} could not go on; see its own error")

    @contextmanager
    def _in_shards(self) -> Iterator[None]:
        with sharding.sharded(self.group.total):
            yield


def _check(config: KalmanConfig) -> None:
    """Whether a filter with these settings can be divided."""
    if config.covariance not in SHARDED:
        raise ValueError(f"`covariance` must be one of {', '.join(SHARDED)} to be divided, got {config.covariance!r}.")
    if config.gradient_penalty:
        raise ValueError(f"`gradient_penalty` must be 0 on several processes, got {config.gradient_penalty:g}.")
    for name, plain in (("tune", None), ("passes", 1), ("mean_passes", 0)):
        if getattr(config, name) != plain:
            raise ValueError(f"`{name}` must be {plain} on several processes, got {getattr(config, name)!r}.")


def _directions(directions: Directions | None, first: int, outputs: Tensor) -> Directions | None:
    """Those of the examples from ``first`` on, as many as there are ``outputs``."""
    if directions is None:
        return None

    def seeds(example: Tensor, which: Tensor) -> Tensor:
        return directions.seeds(example + first, which)

    needed = None if directions.needed is None else directions.needed[first : first + len(outputs)]
    return Directions(directions.number, seeds, needed)


def _over(state: FilterState, change: Callable[[Tensor], Tensor]) -> FilterState:
    """A state with every tensor that runs over parameters changed: the first dimension of those of a belief."""

    def changed(name: str, values: Tensor) -> Tensor:
        return values if name == "gram" else change(values)  # of low rank, over its columns

    belief = type(state.belief)(*(changed(n, v) for n, v in zip(state.belief._fields, state.belief, strict=True)))
    return state._replace(belief=belief, prior=diagonal.State(*map(change, state.prior)))
