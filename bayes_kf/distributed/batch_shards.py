"""What every process has of a global batch, known to fit on all of them before any goes on."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.distributed.process_group import Group, OtherProcessError
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs, batch_size, check_inputs, some_examples, to_device


class Share(NamedTuple):
    """This process's part of a global batch.

    Attributes:
        inputs: of its examples; where it has none, of one that it saw before, if any.
        targets: (B_r,) or (B_r, m).
        sizes: how many examples each process has.
    """

    inputs: Inputs | None
    targets: Tensor
    sizes: list[int]

    def some(self, where: slice, rank: int) -> Share:
        """What process ``rank``, whose share this is, has of some examples of the global batch.

        Without any of them it keeps one example of its own at hand, if it has one.
        """
        counts = _overlaps(self.sizes, where)
        start = min(self.sizes[rank], max(0, where.start - sum(self.sizes[:rank])))
        stop = start + counts[rank]
        inputs = self.inputs
        if inputs is not None:
            inputs = some_examples(inputs, slice(start, stop) if counts[rank] else slice(0, 1), batch_size(inputs))
        return Share(inputs, self.targets[start:stop], counts)


class Shares:
    """Takes in each process's examples, so that an error on one ends the step on all.

    Args:
        group: the processes.
        adapter: the model.
        needs_one: whether a process that has no examples of a batch needs some other to go through the motions with.
    """

    def __init__(self, group: Group, adapter: AdapterModel, needs_one: bool) -> None:
        self.group, self.adapter, self._needs_one = group, adapter, needs_one
        self._seen: Inputs | None = None  # an example, for batches of which this process has none

    def take(self, inputs: Inputs | None, targets: Tensor | None) -> Share:
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
                self.remember(given)
            elif self._seen is None and self._needs_one:
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
        return Share(given, self._received(labels), sizes)

    def _received(self, labels: Tensor | None) -> Tensor:
        """Targets in the form that all processes send them in."""
        device, numbers = self.adapter.device, self.group.numbers
        width = max(numbers(0 if labels is None or labels.ndim == 1 else labels.shape[1], device))
        floating = max(numbers(int(labels is not None and labels.is_floating_point()), device))
        kind, wanted = self.adapter.dtype if floating else torch.int64, (width,) if width else ()
        alike = labels is None or tuple(labels.shape[1:]) == wanted
        if not all(numbers(int(alike), device)):
            got = "" if labels is None else f", here {tuple(labels.shape)}"
            raise ValueError(f"`targets` must be of one shape but for the examples on every process, got several{got}.")
        if labels is None:
            return torch.empty((0, width) if width else 0, dtype=kind, device=device)
        return labels.to(kind)

    def remember(self, inputs: Inputs) -> None:
        """Keep an example."""
        size = batch_size(inputs)
        if size:
            self._seen = some_examples(inputs, slice(0, 1), size)

    def all_or_none(self, failed: Exception | None) -> None:
        """Go on where every process can.

        Raises:
            Exception: this process's own, or an OtherProcessError.
        """
        flags = self.group.numbers(int(failed is not None), self.adapter.device)
        if failed is not None:
            raise failed
        if any(flags):
            raise OtherProcessError(f"process {flags.index(1)} could not go on; see its own error")


def _overlaps(sizes: list[int], where: slice) -> list[int]:
    """How many of some examples of a global batch each process has."""
    ends = list(itertools.accumulate(sizes))
    return [max(0, min(where.stop, end) - max(where.start, end - size)) for end, size in zip(ends, sizes, strict=True)]
