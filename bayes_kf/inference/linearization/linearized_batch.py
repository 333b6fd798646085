"""A linearized batch: its outputs, and rows of its Jacobian by backward passes.

The Jacobian of a batch takes one backward pass per output (or direction of the outputs) whatever the batch's size, not
one per example and output: examples do not mix in eval mode, so the pass of output j, summed over the batch, carries
the gradients of every example at once. For tensors that a module applies in a known way
(``per_example_gradients.rules``) the rows of every example are products of the module's input and the gradient of its
output. If the model ends in a Linear on d < m features per example, d passes from the features give the rows of all m
outputs. Tensors without a rule take one backward pass per example and output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from bayes_kf.inference.linearization.jacobian import FactoredBlocks, Jacobian
from bayes_kf.inference.linearization.jacobian_blocks import Block, DenseBlock, OuterProductBlock
from bayes_kf.inference.linearization.per_example_gradients import ModuleCall
from bayes_kf.inference.linearization.row_buffer import (
    Directions,
    RecordedForward,
    RowBuffer,
    RowsError,
    selected_outputs,
)
from bayes_kf.inference.linearization.row_order_check import may_move_rows, wrong_tensors
from bayes_kf.models.adapter import AdapterModel


class LinearizedBatch:
    """A batch's outputs at θ, and their Jacobian.

    Args:
        adapter: the model.
        record: the forward pass; given names of tensors whose hooks gave wrong rows, one without these hooks.

    Attributes:
        outputs: η, (B, m), in the latent dtype, detached.
    """

    def __init__(self, adapter: AdapterModel, record: Callable[[Sequence[str]], RecordedForward]) -> None:
        self._adapter, self._record = adapter, record
        self._recorded = record(())
        self.outputs = self._of_examples(self._recorded.tape.outputs)

    def jacobian(self, directions: Directions | None = None) -> Jacobian:
        """The Jacobian of directions of the outputs, or of all outputs, one row per example and direction.

        Args:
            directions: None for the outputs themselves.
        """
        with self._adapter.full_precision(), self._adapter.eval_mode(), torch.enable_grad():
            while True:  # each time with fewer hooked tensors
                try:
                    check = self._row_check(directions)  # before the backward passes free the graph
                    jacobian = self._rows(directions)
                    dtype = self._recorded.tape.outputs.dtype
                    wrong = [] if check is None else wrong_tensors(self._adapter, jacobian, *check, dtype)
                except RowsError as error:  # in this batch a module's input does not have examples first
                    wrong = error.names
                if not wrong:
                    return jacobian
                self._recorded = self._record(wrong)

    def softmax_jacobian(self) -> Jacobian:
        """As :meth:`jacobian`, up to a row that all outputs of an example share, which softmax ignores.

        The differences of the outputs to the last one, whose own row is then zero, take one pass less.
        """
        head, num_outputs = self._recorded.tape.head, self.outputs.shape[1]
        if head is not None and head.input.shape[1] < num_outputs:
            return self.jacobian()
        seeds = torch.eye(num_outputs, dtype=self.outputs.dtype, device=self.outputs.device)[:-1]
        seeds[:, -1] = -1.0
        jacobian = self.jacobian(Directions(num_outputs - 1, lambda _, which: seeds[which]))
        lift = torch.eye(num_outputs, num_outputs - 1, dtype=seeds.dtype, device=seeds.device)
        return jacobian.left_multiply(lift.expand(len(self.outputs), -1, -1))

    def _row_check(self, directions: Directions | None) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Random weights of the rows, (B, c), and the exact gradients for them; None if rows cannot have moved."""
        plan, tape, repetition = self._recorded
        names, size = list(plan.hooked), len(self.outputs)
        single = len(tape.outputs) == 1 and not self._adapter.is_divided  # other processes may have more
        if not names or single or not may_move_rows(tape.outputs):
            return None
        number = self.outputs.shape[1] if directions is None else directions.num_rows
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(size, number, generator=generator).to(self.outputs)
        if directions is not None and directions.rows_per_example is not None:
            weights *= torch.arange(number, device=weights.device) < directions.rows_per_example.unsqueeze(-1)
        seed = weights if directions is None else torch.zeros_like(self.outputs)
        if directions is not None:
            examples = torch.arange(size, device=weights.device)
            for which in range(number):
                direction = directions.seeds(examples, torch.full_like(examples, which))
                seed += weights[:, which : which + 1] * direction
        first = repetition.first.to(tape.outputs.device)
        repeated = torch.zeros_like(tape.outputs).index_copy_(0, first, seed.to(tape.outputs.dtype))
        gradients = zip(names, tape.gradients(repeated, names, keep=True), strict=True)
        return weights, {name: gradient for name, gradient in gradients if gradient is not None}

    def _of_examples(self, rows: Tensor) -> Tensor:
        """The first row of each example, detached, in the latent dtype."""
        return rows[self._recorded.repetition.first.to(rows.device)].detach().to(self._adapter.dtype)

    def _rows(self, directions: Directions | None) -> Jacobian:
        general = self._general_tensors()
        head, num_outputs = self._recorded.tape.head, self.outputs.shape[1]
        if directions is None and not general and head is not None and head.input.shape[1] < num_outputs:
            return self._through_head(head)
        if directions is None:
            directions = identity(self.outputs)
        blocks, size = self._hooked_blocks(directions, None, keep=bool(general)), len(self.outputs)
        if general:
            blocks += self._general_blocks(general, directions)
        if not blocks:  # no output depends on any tensor
            blocks = [DenseBlock(slice(0, 1), self.outputs.new_zeros(size, directions.num_rows, 1))]
        part = FactoredBlocks(blocks, (size, directions.num_rows))
        return Jacobian([(None, part)], size, directions.num_rows, self._adapter.num_parameters)

    def _general_tensors(self) -> list[str]:
        """Tensors on the general path; those that the checked batch did not use only if this batch uses them."""
        plan, tape, _ = self._recorded
        if len(plan.hooked) == len(self._adapter.names):
            return []
        general = [name for name in self._adapter.names if name not in plan.hooked]
        if self._adapter.is_divided and not plan.unused.issuperset(general):
            raise ValueError(
                f"`model` must be whole in every process for {', '.join(general)}, whose rows take a backward pass for "
                "each example; its base is divided among processes."
            )
        if not plan.unused.issuperset(general):
            return general
        if self._adapter.is_divided:
            return []
        reached = tape.gradients(torch.zeros_like(tape.outputs), general, keep=True)
        return [name for name, gradient in zip(general, reached, strict=True) if gradient is not None]

    def _through_head(self, head: ModuleCall) -> Jacobian:
        """∂η/∂θ = W ∂h/∂θ below the classifier η = W h + b, and the rows of W and b beside it."""
        features, weight = self._of_examples(head.input), self._recorded.tape.head_weight
        assert weight is not None
        size, width = features.shape
        factor = weight.to(features).expand(size, -1, -1)  # W, (B, m, d)
        below = self._hooked_blocks(identity(features), head.input, keep=False)
        num_outputs, slices = len(weight), self._adapter.slices()
        eye = torch.eye(num_outputs, dtype=features.dtype, device=features.device).expand(size, -1, -1)
        inputs = {"weight": features, "bias": features.new_ones(size, 1)}
        above: list[Block] = [
            OuterProductBlock(slices[name], eye, inputs[hooked.attribute])
            for name, hooked in self._recorded.plan.hooked.items()
            if hooked.module is head.module
        ]
        terms: list[tuple[Tensor | None, FactoredBlocks]] = []
        if below:
            terms.append((factor, FactoredBlocks(below, (size, width))))
        if above:
            terms.append((None, FactoredBlocks(above, (size, num_outputs))))
        return Jacobian(terms, size, num_outputs, self._adapter.num_parameters)

    def _hooked_blocks(self, directions: Directions, at: Tensor | None, *, keep: bool) -> list[Block]:
        """Rows of every hooked tensor; a backward pass carries one direction of every row of the batch."""
        plan, tape, repetition = self._recorded
        buffer, end = RowBuffer(self._adapter, self._recorded, directions), tape.outputs if at is None else at
        passes = repetition.backward_passes(directions.num_rows, directions.rows_per_example, end.device)
        for backward in passes:
            rows = directions.seeds(backward.example, backward.which).to(end.dtype)
            seed = rows if backward.rows is None else torch.zeros_like(end).index_copy_(0, backward.rows, rows)
            arrived = tape.cotangents(seed, at, keep=keep or backward is not passes[-1])
            with self._adapter.swapped(tape.leaves) if plan.reads_modules else nullcontext():
                buffer.add(arrived, backward)
        return buffer.blocks

    def _general_blocks(self, names: list[str], directions: Directions) -> list[Block]:
        """One backward pass per example and direction, for tensors without a rule."""
        tape, slices, size = self._recorded.tape, self._adapter.slices(), len(self.outputs)
        rows = {
            name: self.outputs.new_zeros(size, directions.num_rows, slices[name].stop - slices[name].start)
            for name in names
        }
        last = (size - 1, directions.num_rows - 1)
        numbers = torch.arange(max(last) + 1, device=tape.outputs.device)
        for b, row in enumerate(self._recorded.repetition.first.tolist()):
            for j in range(directions.num_rows):
                seed = torch.zeros_like(tape.outputs)
                seed[row] = directions.seeds(numbers[b : b + 1], numbers[j : j + 1])[0]
                gradients = tape.gradients(seed, names, keep=(b, j) != last)
                for name, gradient in zip(names, gradients, strict=True):
                    if gradient is None:  # the graph does not reach it, whatever the direction
                        del rows[name]
                    else:
                        rows[name][b, j] = gradient.reshape(-1).to(self.outputs.dtype)
                names = list(rows)
                if not names:
                    return []
        return [DenseBlock(slices[name], tensor_rows) for name, tensor_rows in rows.items()]


def identity(like: Tensor) -> Directions:
    """Every output as a direction, for outputs (B, m)."""
    return selected_outputs(like, range(like.shape[1]))
