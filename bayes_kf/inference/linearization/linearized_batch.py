"""A batch that went forward, and the rows of its Jacobian by backward passes.

The Jacobian of a batch takes one backward pass per output (or direction of the outputs) whatever the batch's size,
not one per example and output: examples do not mix in eval mode, so the pass of output j summed over the batch carries
every example's cotangents at once. For tensors that a module applies in a known way (``layers.rules``) the rows of
every example are products of what went into the module and the cotangent of what came out. Where the model ends in a
Linear on d < m features per example, d passes from the features give the rows of all m outputs. Tensors without a rule
take one backward pass per example and output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.inference.linearization.batch_repetition import BatchRepetition
from bayes_kf.inference.linearization.jacobian import FactoredBlocks, Jacobian
from bayes_kf.inference.linearization.jacobian_blocks import Block, DenseBlock, OuterProductBlock
from bayes_kf.inference.linearization.per_example_gradients import ModuleCall
from bayes_kf.inference.linearization.row_buffer import Directions, RowBuffer, RowsError
from bayes_kf.inference.linearization.row_order_check import may_move_rows, wrong_tensors
from bayes_kf.inference.linearization.rule_check import LinearizationPlan
from bayes_kf.inference.linearization.tape import Tape
from bayes_kf.models.adapter import AdapterModel


class RecordedForward(NamedTuple):
    """A forward pass of a batch laid out for its backward passes."""

    plan: LinearizationPlan
    tape: Tape
    repetition: BatchRepetition


class LinearizedBatch:
    """A batch's outputs at a point, and what is needed to pull directions of them back to the adapter.

    Attributes:
        outputs: η, (B, m), in the latent dtype, detached.
    """

    def __init__(self, adapter: AdapterModel, again: Callable[..., RecordedForward]) -> None:
        self._adapter, self._again = adapter, again  # takes names of tensors that hooks gave wrong rows of
        self._plan, self._tape, self._repetition = again()
        self.outputs = self._of_examples(self._tape.outputs)

    def jacobian(self, directions: Directions | None = None) -> Jacobian:
        """The Jacobian of directions of the outputs, or of all outputs, one row per example and direction.

        Args:
            directions: None for the outputs themselves.
        """
        with self._adapter.full_precision(), self._adapter.eval_mode(), torch.enable_grad():
            while True:  # each time with fewer tensors that have hooks
                try:
                    checks = self._checks(directions)
                    jacobian = self._pull(directions)
                    wrong = checks(jacobian)
                except RowsError as error:  # a module now sees something else first than examples
                    wrong = error.names
                if not wrong:
                    return jacobian
                self._plan, self._tape, self._repetition = self._again(wrong)

    def _checks(self, directions: Directions | None) -> Callable[[Jacobian], list[str]]:
        """Which tensors have wrong rows in the Jacobian to come; asked of the graph before it is used up."""
        names, size = list(self._plan.hooked), len(self.outputs)
        if not names or len(self._tape.outputs) == 1 or not may_move_rows(self._tape.outputs):
            return lambda jacobian: []
        number = self.outputs.shape[1] if directions is None else directions.num_rows
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(size, number, generator=generator).to(self.outputs)
        if directions is not None and directions.rows_per_example is not None:
            weights *= torch.arange(number, device=weights.device) < directions.rows_per_example.unsqueeze(-1)
        seed = weights if directions is None else torch.zeros_like(self.outputs)
        if directions is not None:
            examples = torch.arange(size, device=weights.device)
            for which in range(number):
                found = directions.seeds(examples, torch.full_like(examples, which))
                seed += weights[:, which : which + 1] * found
        first = self._repetition.first.to(self._tape.outputs.device)
        whole = torch.zeros_like(self._tape.outputs).index_copy_(0, first, seed.to(self._tape.outputs.dtype))
        gradients = zip(names, self._tape.gradients(whole, names, keep=True), strict=True)
        exact = {name: gradient for name, gradient in gradients if gradient is not None}
        return lambda jacobian: wrong_tensors(self._adapter, jacobian, weights, exact)

    def softmax_jacobian(self) -> Jacobian:
        """As :meth:`pull`, but for a row that all outputs of an example share: for softmax, which does not see it.

        The outputs less the last of them, whose own row is then zero, take a pass less.
        """
        head, num_outputs = self._tape.head, self.outputs.shape[1]
        if head is not None and head.input.shape[1] < num_outputs:
            return self.jacobian()
        seeds = torch.eye(num_outputs, dtype=self.outputs.dtype, device=self.outputs.device)[:-1]
        seeds[:, -1] = -1.0
        jacobian = self.jacobian(Directions(num_outputs - 1, lambda _, which: seeds[which]))
        lift = torch.eye(num_outputs, num_outputs - 1, dtype=seeds.dtype, device=seeds.device)
        return jacobian.left_multiply(lift.expand(len(self.outputs), -1, -1))

    def _of_examples(self, rows: Tensor) -> Tensor:
        """What rows of the batch hold of each example, detached, in the latent dtype."""
        return rows[self._repetition.first.to(rows.device)].detach().to(self._adapter.dtype)

    def _pull(self, directions: Directions | None) -> Jacobian:
        general = self._without_rule()
        head, num_outputs = self._tape.head, self.outputs.shape[1]
        if directions is None and not general and head is not None and head.input.shape[1] < num_outputs:
            return self._through_head(head)
        if directions is None:
            directions = identity(self.outputs)
        blocks, size = self._blocks(directions, None, keep=bool(general)), len(self.outputs)
        if general:
            blocks += self._general(general, directions)
        part = FactoredBlocks(blocks or [self._nothing(directions.num_rows)], (size, directions.num_rows))
        return Jacobian([(None, part)], size, directions.num_rows, self._adapter.num_parameters)

    def _without_rule(self) -> list[str]:
        """Tensors on the general path; those that the first batch did not use are asked for once more, by one pass."""
        general = [name for name in self._adapter.names if name not in self._plan.hooked]
        if not general or not self._plan.unused.issuperset(general):
            return general
        reached = self._tape.gradients(torch.zeros_like(self._tape.outputs), general, keep=True)
        return [name for name, gradient in zip(general, reached, strict=True) if gradient is not None]

    def _through_head(self, head: ModuleCall) -> Jacobian:
        """∂η/∂θ = W ∂h/∂θ below the classifier η = W h + b, and its own rows beside it."""
        features = self._of_examples(head.input)
        size, width = features.shape
        own = {name: place for name, place in self._plan.hooked.items() if place[0] is head.module}
        with self._adapter.swapped(self._tape.leaves):
            weight: Tensor = head.module.weight  # type: ignore[assignment]
        left = weight.detach().to(features).expand(size, -1, -1)
        below = self._blocks(identity(features), head.input, keep=False)
        num_outputs, slices = len(weight), self._adapter.slices()
        eye = torch.eye(num_outputs, dtype=features.dtype, device=features.device).expand(size, -1, -1)
        factors = {"weight": features, "bias": features.new_ones(size, 1)}
        above: list[Block] = [
            OuterProductBlock(slices[name], eye, factors[attribute]) for name, (_, attribute) in own.items()
        ]
        terms: list[tuple[Tensor | None, FactoredBlocks]] = []
        if below:
            terms.append((left, FactoredBlocks(below, (size, width))))
        if above:
            terms.append((None, FactoredBlocks(above, (size, num_outputs))))
        return Jacobian(terms, size, num_outputs, self._adapter.num_parameters)

    def _blocks(self, directions: Directions, at: Tensor | None, *, keep: bool) -> list[Block]:
        """Rows of every hooked tensor, one direction of every row of the batch a backward pass."""
        store = RowBuffer(self._adapter, self._plan, self._repetition, directions)
        end = self._tape.outputs if at is None else at
        backward_passes = list(
            self._repetition.backward_passes(directions.num_rows, directions.rows_per_example, end.device)
        )
        for backward in backward_passes:
            found = directions.seeds(backward.example, backward.which).to(end.dtype)
            seed = found if backward.rows is None else torch.zeros_like(end).index_copy_(0, backward.rows, found)
            arrived = self._tape.cotangents(seed, at, keep=keep or backward is not backward_passes[-1])
            with self._adapter.swapped(self._tape.leaves):
                store.add(arrived, backward)
        return store.blocks()

    def _general(self, names: list[str], directions: Directions) -> list[Block]:
        """One backward pass per example and direction, for tensors without a rule."""
        slices, outputs, size = self._adapter.slices(), self._tape.outputs, len(self.outputs)
        found = {
            name: self.outputs.new_zeros(size, directions.num_rows, slices[name].stop - slices[name].start)
            for name in names
        }
        last = (size - 1, directions.num_rows - 1)
        numbers = torch.arange(max(last) + 1, device=outputs.device)
        for b, row in enumerate(self._repetition.first.tolist()):
            for j in range(directions.num_rows):
                seed = torch.zeros_like(outputs)
                seed[row] = directions.seeds(numbers[b : b + 1], numbers[j : j + 1])[0]
                gradients = self._tape.gradients(seed, names, keep=(b, j) != last)
                for name, gradient in zip(names, gradients, strict=True):
                    if gradient is None:  # the graph does not reach it, whatever the direction
                        del found[name]
                    else:
                        found[name][b, j] = gradient.reshape(-1).to(self.outputs.dtype)
                names = list(found)
                if not names:
                    return []
        return [DenseBlock(slices[name], rows) for name, rows in found.items()]

    def _nothing(self, count: int) -> Block:
        """Zero rows, where no tensor was reached."""
        return DenseBlock(slice(0, 1), self.outputs.new_zeros(len(self.outputs), count, 1))


def identity(like: Tensor) -> Directions:
    """Every output by itself, for outputs (B, m)."""
    eye = torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
    return Directions(len(eye), lambda _, which: eye[which])
