"""Directions of the outputs, and where the rows that they give are put as they arrive."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from bayes_kf.inference.linearization.batch_repetition import BackwardPass, BatchRepetition
from bayes_kf.inference.linearization.jacobian_blocks import Block, DenseBlock, OuterProductBlock
from bayes_kf.inference.linearization.per_example_gradients import ModuleCall
from bayes_kf.inference.linearization.rule_check import LinearizationPlan
from bayes_kf.inference.linearization.tape import Arrived, by_module, is_outer, tensor_rows
from bayes_kf.models.adapter import AdapterModel


class Directions(NamedTuple):
    """c directions of the outputs per example.

    Attributes:
        num_rows: c.
        seeds: examples (R,) and which of their directions (R,) -> those directions, (R, m).
        rows_per_example: how many of them an example has, (B,), the others being zero; None where all have c.
    """

    num_rows: int
    seeds: Callable[[Tensor, Tensor], Tensor]
    rows_per_example: Tensor | None = None


class RowsError(RuntimeError):
    """Hooked modules were fed other numbers of rows than the batch has.

    Attributes:
        names: of their tensors.
    """

    def __init__(self, names: list[str]) -> None:
        super().__init__(f"the modules of {', '.join(names)} see other rows than one for each example")
        self.names = names


class RowBuffer:
    """Rows as they arrive, pass by pass; neighbouring tensors share a block."""

    def __init__(
        self, adapter: AdapterModel, plan: LinearizationPlan, repetition: BatchRepetition, directions: Directions
    ) -> None:
        self._adapter, self._plan, self._repetition = adapter, plan, repetition
        self._size, self._count = len(repetition.copies), directions.num_rows
        self._ragged = directions.rows_per_example is not None
        self._slices = adapter.slices()
        self._shapes = dict(zip(adapter.names, adapter.shapes, strict=True))
        self._found: dict[str, Block] = {}
        self._shared: list[Block] = []

    def add(self, arrived: Arrived, backward: BackwardPass) -> None:
        """Take in what arrived with one pass."""
        found = by_module([(call, g.to(self._adapter.dtype)) for call, g in arrived])
        rows: dict[str, tuple[Tensor | None, Tensor]] = {}
        number = len(self._repetition.example)
        calls = {module: [(len(call.input), len(g)) for call, g in some] for module, some in found.items()}
        unfit = [
            name
            for name, (module, _) in self._plan.hooked.items()
            if any(lengths != (number, number) for lengths in calls.get(module, []))
        ]
        if unfit:
            raise RowsError(unfit)
        for name, (module, attribute) in self._plan.hooked.items():
            at_module = found.get(module, [])
            if at_module and is_outer(at_module):
                call, g = at_module[0]
                self._outer(name, attribute, call)
                rows[name] = (None, g)
            elif at_module:
                rows[name] = tensor_rows(at_module, attribute, self._shapes[name])
        new = {name: found for name, found in rows.items() if name not in self._found}
        if new:
            self._allocate(new)
        place = backward.example * self._count + backward.which
        for name, (_, values) in rows.items():
            if len(values) != number:
                raise RowsError([name])
            values = values.view(len(values), -1)
            block = self._found[name]
            target = block.rows if isinstance(block, DenseBlock) else block.cotangent
            target.flatten(0, 1).index_copy_(0, place, values if backward.rows is None else values[backward.rows])

    def blocks(self) -> list[Block]:
        """All blocks of stored rows."""
        return self._shared

    def _outer(self, name: str, attribute: str, call: ModuleCall) -> None:
        """Room for the cotangents of a Linear on one vector per example."""
        if name in self._found:
            return
        activation = call.input[self._repetition.first.to(call.input.device)].detach().to(self._adapter.dtype)
        out = call.output.shape[-1]
        activation = activation if attribute == "weight" else activation.new_ones(self._size, 1)
        block = OuterProductBlock(self._slices[name], self._room(activation, out), activation)
        self._found[name] = block
        self._shared.append(block)

    def _allocate(self, rows: dict[str, tuple[Tensor | None, Tensor]]) -> None:
        """Room for rows: one block for tensors that follow each other in θ, one each for tables."""
        run: list[str] = []
        for name, (where, values) in rows.items():
            if where is not None:
                block = DenseBlock(where + self._slices[name].start, self._room(values, values.shape[-1]))
                self._found[name] = block
                self._shared.append(block)
                continue
            if run and self._slices[run[-1]].stop != self._slices[name].start:
                self._share(run, values)
                run = []
            run.append(name)
        if run:
            self._share(run, next(iter(rows.values()))[1])

    def _share(self, run: list[str], like: Tensor) -> None:
        first, last = self._slices[run[0]].start, self._slices[run[-1]].stop
        block = DenseBlock(slice(first, last), self._room(like, last - first))
        self._shared.append(block)
        for name in run:
            where = self._slices[name]
            self._found[name] = DenseBlock(where, block.rows[..., where.start - first : where.stop - first])

    def _room(self, like: Tensor, width: int) -> Tensor:
        shape = (self._size, self._count, width)
        return like.new_zeros(shape) if self._ragged else like.new_empty(shape)
