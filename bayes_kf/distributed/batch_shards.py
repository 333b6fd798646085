"""The examples of a global batch that each process has, checked on all processes before any of them continues."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs, batch_size, check_inputs, some_examples, to_device
from bayes_kf.processes.process_group import Group, OtherProcessError


class BatchShard(NamedTuple):
    """The examples of a global batch that this process has.

    Attributes:
        inputs: of these examples. If there are none: of one example from an earlier batch, or None.
        targets: (B_r,) or (B_r, m).
        sizes: the number of examples of every process.
    """

    inputs: Inputs | None
    targets: Tensor
    sizes: list[int]

    def subset(self, where: slice, rank: int) -> BatchShard:
        """The examples of process ``rank`` among a slice of the global batch.

        If the process has none of them, the inputs are its first example.
        """
        counts = _overlaps(self.sizes, where)
        start = min(self.sizes[rank], max(0, where.start - sum(self.sizes[:rank])))
        stop = start + counts[rank]
        inputs = self.inputs
        if inputs is not None:
            inputs = some_examples(inputs, slice(start, stop) if counts[rank] else slice(0, 1), batch_size(inputs))
        return BatchShard(inputs, self.targets[start:stop], counts)


class BatchShards:
    """Checks the examples of every process, so that an error on one process ends the step on all of them.

    Args:
        group: the processes.
        adapter: the model.
        needs_example: whether a process without examples needs one of an earlier batch to take part in a step.
    """

    def __init__(self, group: Group, adapter: AdapterModel, needs_example: bool) -> None:
        self.group, self.adapter, self._needs_example = group, adapter, needs_example
        self._spare: Inputs | None = None  # one example, for batches of which this process has none

    def check(self, inputs: Inputs | None, targets: Tensor | None) -> BatchShard:
        """This process's shard of a global batch, once the shards of all processes are valid.

        Raises:
            ValueError: if the inputs or targets of this process do not fit, or no process has any.
            OtherProcessError: if those of another process do not fit.
        """
        failure: Exception | None = None
        size, local_inputs, labels = 0, None, None
        try:
            size, local_inputs, labels = self._check_local(inputs, targets)
        except Exception as raised:  # of any kind, or the other processes would wait for this one
            failure = raised
        sizes = self.group.all_gather_int(-1 if failure else size, self.adapter.device)
        if failure is not None:
            raise failure
        if min(sizes) < 0:
            raise OtherProcessError(f"process {sizes.index(-1)} could not use its examples; the belief is unchanged")
        if sum(sizes) == 0:
            raise ValueError("`inputs` must be given on at least one process, got none on all of them.")
        return BatchShard(local_inputs, self._with_common_dtype(labels), sizes)

    def remember(self, inputs: Inputs) -> None:
        """Keep one example for batches of which this process has none."""
        size = batch_size(inputs)
        if size:
            self._spare = some_examples(inputs, slice(0, 1), size)

    def _check_local(self, inputs: Inputs | None, targets: Tensor | None) -> tuple[int, Inputs | None, Tensor | None]:
        """The number of examples of this process, its inputs and its targets, on the model's device."""
        if (inputs is None) != (targets is None):
            raise ValueError("`inputs` and `targets` must both be given or both be None.")
        if inputs is None or targets is None:
            if self._spare is None and self._needs_example:
                raise ValueError("`inputs` must be given in the first update or to `init`, got None in both.")
            return 0, self._spare, None
        check_inputs(inputs)
        inputs, targets = to_device(inputs, self.adapter.device), targets.to(self.adapter.device)
        size = batch_size(inputs)
        if len(targets) != size:
            raise ValueError(f"`targets` must have one entry per example ({size}), got {len(targets)}.")
        self.remember(inputs)
        return size, inputs, targets

    def _with_common_dtype(self, labels: Tensor | None) -> Tensor:
        """Targets with the shape and dtype that all processes use."""
        device, gather = self.adapter.device, self.group.all_gather_int
        width = max(gather(0 if labels is None or labels.ndim == 1 else labels.shape[1], device))
        floating = max(gather(int(labels is not None and labels.is_floating_point()), device))
        dtype, shape = self.adapter.dtype if floating else torch.int64, (width,) if width else ()
        fits = labels is None or tuple(labels.shape[1:]) == shape
        if not all(gather(int(fits), device)):
            local = "" if labels is None else f", here {tuple(labels.shape)}"
            raise ValueError(
                f"`targets` must have the same shape per example on all processes, got different ones{local}."
            )
        if labels is None:
            return torch.empty((0, width) if width else 0, dtype=dtype, device=device)
        return labels.to(dtype)


def _overlaps(sizes: list[int], where: slice) -> list[int]:
    """The number of examples that each process has in a slice of the global batch."""
    ends = list(itertools.accumulate(sizes))
    return [max(0, min(where.stop, end) - max(where.start, end - size)) for end, size in zip(ends, sizes, strict=True)]
