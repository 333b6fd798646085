"""Directions of the outputs, and the buffer that collects their rows of the Jacobian, pass by pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bayes_kf.inference.linearization.batch_repetition import BackwardPass, BatchRepetition
from bayes_kf.inference.linearization.jacobian_blocks import Block, DenseBlock, OuterProductBlock
from bayes_kf.inference.linearization.per_example_gradients import ModuleCall, per_example_rows
from bayes_kf.inference.linearization.rule_check import LinearizationPlan
from bayes_kf.inference.linearization.tape import Cotangents, Tape
from bayes_kf.models.adapter import AdapterModel


class Directions(NamedTuple):
    """Directions of the outputs, c per example.

    Attributes:
        num_rows: c.
        seeds: examples (R,) and the number of a direction of each (R,) -> those directions, (R, m).
        rows_per_example: number of directions of each example, (B,), the others being zero; None if all have c.
    """

    num_rows: int
    seeds: Callable[[Tensor, Tensor], Tensor]
    rows_per_example: Tensor | None = None


def selected_outputs(outputs: Tensor, columns: Sequence[int]) -> Directions:
    """Some of the outputs (B, m) as directions, in the order of ``columns``."""
    rows = torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)[list(columns)]
    return Directions(len(columns), lambda _, which: rows[which])


class RecordedForward(NamedTuple):
    """A forward pass of a batch, ready for its backward passes."""

    plan: LinearizationPlan
    tape: Tape
    repetition: BatchRepetition


class RowsError(RuntimeError):
    """Hooked modules got other numbers of rows than the batch has.

    Attributes:
        names: of their tensors.
    """

    def __init__(self, names: list[str]) -> None:
        super().__init__(f"the modules of {', '.join(names)} do not get one row per example")
        self.names = names


class RowBuffer:
    """Rows of the Jacobian, collected pass by pass. Consecutive tensors share a block.

    Attributes:
        blocks: the blocks of all tensors that a pass has reached.
    """

    def __init__(self, adapter: AdapterModel, recorded: RecordedForward, directions: Directions) -> None:
        self._dtype, self._slices, self._leaves = adapter.dtype, adapter.slices(), recorded.tape.leaves
        self._hooked, self._repetition = recorded.plan.hooked, recorded.repetition
        self._size, self._count = len(self._repetition.copies), directions.num_rows
        self._ragged = directions.rows_per_example is not None
        self._targets: dict[str, Tensor] = {}  # name -> the tensor's rows, (B·c, width), a view of its block's
        self.blocks: list[Block] = []

    def add(self, arrived: Cotangents, backward: BackwardPass) -> None:
        """Stores the rows of one backward pass.

        Args:
            arrived: calls of hooked modules, each with the gradient of its output.
            backward: the directions that the pass carried.

        Raises:
            RowsError: if a module did not get one row per example.
        """
        num_rows, calls = len(self._repetition.example), dict[nn.Module, Cotangents]()
        misfits: set[nn.Module] = set()
        for call, g in arrived:
            calls.setdefault(call.module, []).append((call, g.to(self._dtype)))
            if len(call.input) != num_rows or len(g) != num_rows:
                misfits.add(call.module)
        if misfits:
            self._raise(misfits)
        rows: dict[str, Tensor] = {}
        tables: dict[str, Tensor] = {}  # the columns of embedding tables
        for name, hooked in self._hooked.items():
            own = calls.get(hooked.module)
            if own is None:
                continue
            call, g = own[0]
            if len(own) == 1 and type(hooked.module) is nn.Linear and call.input.ndim == 2:  # see is_outer_product
                rows[name] = g
                if name not in self._targets:
                    self._add_outer_product(name, hooked.attribute, call)
            else:
                columns, rows[name] = per_example_rows(own, hooked.rule, self._leaves[name])
                if columns is not None:
                    tables[name] = columns
        if not rows.keys() <= self._targets.keys():
            self._allocate(rows, tables)
        place = backward.example * self._count + backward.which
        for name, values in rows.items():
            if len(values) != num_rows:
                raise RowsError([name])
            values = values.view(num_rows, -1)
            self._targets[name].index_copy_(0, place, values if backward.rows is None else values[backward.rows])

    def _raise(self, misfits: set[nn.Module]) -> None:
        names = [name for name, hooked in self._hooked.items() if hooked.module in misfits]
        if names:
            raise RowsError(names)

    def _add_outer_product(self, name: str, attribute: str, call: ModuleCall) -> None:
        """A block for a Linear on one vector per example; only its cotangents are still to come."""
        activation = call.input[self._repetition.first.to(call.input.device)].detach().to(self._dtype)
        if attribute == "bias":
            activation = activation.new_ones(self._size, 1)
        shape = (self._size, self._count, call.output.shape[-1])
        cotangent = activation.new_zeros(shape) if self._ragged else activation.new_empty(shape)
        self.blocks.append(OuterProductBlock(self._slices[name], cotangent, activation))
        self._targets[name] = cotangent.flatten(0, 1)

    def _allocate(self, rows: Mapping[str, Tensor], tables: Mapping[str, Tensor]) -> None:
        """Blocks of stored rows: one for tensors that follow each other in θ, one for each embedding table."""
        run: list[str] = []
        for name, values in rows.items():
            if name in self._targets:
                continue
            if name in tables:
                stored = self._empty(values, values.shape[-1])
                self.blocks.append(DenseBlock(tables[name] + self._slices[name].start, stored))
                self._targets[name] = stored.flatten(0, 1)
                continue
            if run and self._slices[run[-1]].stop != self._slices[name].start:
                self._share(run, values)
                run = []
            run.append(name)
        if run:
            self._share(run, rows[run[0]])

    def _share(self, run: list[str], like: Tensor) -> None:
        """One block for consecutive tensors."""
        first, last = self._slices[run[0]].start, self._slices[run[-1]].stop
        stored = self._empty(like, last - first)
        self.blocks.append(DenseBlock(slice(first, last), stored))
        for name in run:
            own = self._slices[name]
            self._targets[name] = stored[..., own.start - first : own.stop - first].flatten(0, 1)

    def _empty(self, like: Tensor, width: int) -> Tensor:
        """Memory for rows, (B, c, width); zero if some examples have fewer directions than c."""
        shape = (self._size, self._count, width)
        return like.new_zeros(shape) if self._ragged else like.new_empty(shape)
