"""Forward passes laid out for the backward passes that follow, in pieces that fit the memory.

Which tensor takes which path to the Jacobian is measured on the first batch (``plan``); what a piece gives is in
``linearized``.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from bayes_kf.inference.linearization.batch_repetition import BatchRepetition, cheapest_repetition
from bayes_kf.inference.linearization.jacobian_blocks import CHUNK_NUMEL
from bayes_kf.inference.linearization.linearized_batch import LinearizedBatch, RecordedForward
from bayes_kf.inference.linearization.memory import give_back, ran_out
from bayes_kf.inference.linearization.rule_check import LinearizationPlan, make_plan
from bayes_kf.inference.linearization.tape import Tape
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs, batch_size, some_examples

T = TypeVar("T")
RowsPerExample = int | Sequence[int] | None  # of all examples, of each, or one per output
MAX_PASS_BYTES = 2**23  # of graph that a small batch is repeated up to
MIN_BUDGET_BYTES = 2**25  # of graph, rows and temporaries; larger batches go through in pieces
GRAPHS = 3  # or so many times what the graph of the batch takes
VECTORS = 2  # or as much as so many vectors of parameters: conditioning, which follows every piece, takes them anyway
RAGGED = 2  # times as many rows where examples have unlike numbers of directions


class Linearizer:
    """Outputs and their Jacobian at a point, for one :class:`AdapterModel`.

    Args:
        adapter: the model.
        outputs_per_pass: of each example, in one backward pass; chosen from the sizes by default.
        bytes_budget: what the graph, rows and temporaries of a piece of a batch may take; by default 32 MiB, or three
            times the graph of the whole batch, or two vectors of parameters, where that is more.

    Example:
        >>> adapter = AdapterModel(torch.nn.Linear(3, 2, bias=False))
        >>> x = torch.tensor([[1.0, 2.0, 3.0]])
        >>> Linearizer(adapter)(adapter.vector(), x).jacobian().dense()[0]
        tensor([[1., 2., 3., 0., 0., 0.],
                [0., 0., 0., 1., 2., 3.]])
    """

    def __init__(
        self, adapter: AdapterModel, outputs_per_pass: int | None = None, bytes_budget: int | None = None
    ) -> None:
        self.adapter, self.outputs_per_pass, self.bytes_budget = adapter, outputs_per_pass, bytes_budget
        self._plan: LinearizationPlan | None = None
        self._refused: set[str] = set()  # tensors whose hooks gave wrong rows once
        self._most: int | None = None  # bytes, after memory ran out

    def __call__(self, vector: Tensor, inputs: Inputs, *, rows_per_example: RowsPerExample = None) -> LinearizedBatch:
        """The outputs at θ = ``vector`` with their graph.

        Args:
            vector: θ, (n,).
            inputs: a batch of B examples.
            rows_per_example: rows of the Jacobian that will be asked for; one per output by default. Only
                speed depends on it.
        """

        def graph(wrong: Sequence[str] = ()) -> RecordedForward:
            self._refuse(wrong)
            plan = self._planned(vector, inputs)
            size = batch_size(inputs)
            repetition = self._repetition(plan, _each(rows_per_example, size, plan))
            repeated = inputs if len(repetition.example) == size else some_examples(inputs, repetition.example, size)
            modules = {module for module, _ in plan.hooked.values()} | ({plan.head} if plan.head else set())
            with self.adapter.full_precision(), self.adapter.eval_mode(), torch.enable_grad():
                tape = Tape(self.adapter, self.adapter.leaves(vector), repeated, modules, plan.plain)
            return RecordedForward(plan, tape, repetition)

        return LinearizedBatch(self.adapter, graph)

    @property
    def num_outputs(self) -> int:
        """m, or 0 before the first batch."""
        return self._plan.num_outputs if self._plan else 0

    def prepare(self, vector: Tensor, inputs: Inputs) -> int:
        """The number of outputs, m, found with the path of every tensor on the first batch."""
        return self._planned(vector, inputs).num_outputs

    def num_backward_passes(self, vector: Tensor, inputs: Inputs) -> int:
        """Backward passes over a batch that the rows of all outputs take."""
        return _each(None, 1, self._planned(vector, inputs))[0]

    def max_chunk_size(self, vector: Tensor, inputs: Inputs) -> int:
        """How many examples' graphs fit the budget."""
        plan = self._planned(vector, inputs)
        return max(1, self._budget(plan, batch_size(inputs)) // plan.bytes_each)

    def fits_one_pass(self, vector: Tensor, inputs: Inputs, count: int) -> bool:
        """Whether ``count`` directions of every example go through in one backward pass of a small batch."""
        plan = self._planned(vector, inputs)
        return count == 1 or (self._repeats(plan) and batch_size(inputs) * count * plan.bytes_each <= MAX_PASS_BYTES)

    def chunks(
        self,
        vector: Tensor,
        inputs: Inputs,
        rows_per_example: RowsPerExample = None,
        cuts: Sequence[int] = (),
    ) -> Iterator[tuple[slice, Inputs]]:
        """A batch in pieces whose graph and rows stay under ``bytes_budget``, and where they lie.

        Args:
            vector: θ, (n,).
            inputs: the batch.
            rows_per_example: directions of all examples or of each, all outputs by default.
            cuts: where pieces should end, in ascending order; they end elsewhere only where the budget forces that.

        A piece has at least one example, whatever that takes.
        """
        size, plan = batch_size(inputs), self._planned(vector, inputs)
        bounds = self._bounds(plan, _each(rows_per_example, size, plan), cuts)
        if bounds == [0, size]:
            yield slice(0, size), inputs
            return
        for where in (slice(*ends) for ends in itertools.pairwise(bounds)):
            yield where, some_examples(inputs, where, size)

    def retry_in_smaller_chunks(self, call: Callable[[], T], size: int) -> T:
        """What ``call`` returns; called again, on pieces of half the bytes, as long as memory runs out.

        Smaller pieces stay for later batches. Warns the first time.

        Args:
            call: goes through a batch by :meth:`pieces`, and changes nothing where it raises.
            size: of the batch.
        """
        while True:
            try:
                return call()
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error) or not self._halved(size):
                    raise
            give_back()

    def _halved(self, size: int) -> bool:
        """Make pieces half as large; False where they are single examples already, or nothing is known yet."""
        plan = self._plan
        if plan is None or size == 1 or (self._most is not None and self._most < plan.bytes_each):
            return False
        if self._most is None:
            warnings.warn(
                f"Memory ran out on {size} examples: they are learned and predicted in smaller pieces from now on, "
                "which takes longer and may change results slightly. `bytes_budget` sets their size.",
                stacklevel=2,
            )
        self._most = self._budget(plan, size) // 2
        return True

    def gradient(self, vector: Tensor, inputs: Inputs, cotangent: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """Jᵀw summed over a batch, (n,), in float64: one forward and one backward pass for each of its pieces.

        Args:
            vector: θ, (n,).
            inputs: the batch.
            cotangent: from some examples' outputs (b, m), and where they lie in the batch, to their w (b, m).
        """
        plan, total = self._planned(vector, inputs), torch.zeros_like(vector, dtype=torch.float64)
        for where, piece in self.chunks(vector, inputs, 1):
            with self.adapter.full_precision(), self.adapter.eval_mode(), torch.enable_grad():
                leaves = self.adapter.leaves(vector)
                tape = Tape(self.adapter, leaves, piece, set(), plan.plain)
                seed = cotangent(tape.outputs.detach().to(self.adapter.dtype), where)
                found = tape.gradients(seed.to(tape.outputs), self.adapter.names, keep=False)
            known = zip(leaves.items(), found, strict=True)
            total += self.adapter.flatten({k: torch.zeros_like(t) if g is None else g for (k, t), g in known})
        return total

    def _planned(self, vector: Tensor, inputs: Inputs) -> LinearizationPlan:
        """The plan, made on the first batch and where it does not serve."""
        if self._plan is None or not self._plan.serves(batch_size(inputs)):
            with self.adapter.full_precision(), self.adapter.eval_mode(), torch.enable_grad():
                self._plan = make_plan(self.adapter, vector, inputs)
            self._refuse(())
        assert self._plan is not None
        return self._plan

    def _refuse(self, names: Sequence[str]) -> None:
        """Take some tensors' rows by the general path from now on."""
        self._refused.update(names)
        if self._plan is None or self._refused.isdisjoint(self._plan.hooked):
            return
        general = self._refused.intersection(self._plan.hooked)
        self._plan = self._plan.without(general)
        self.adapter.linearized_by |= dict.fromkeys(general, "general")

    def _repeats(self, plan: LinearizationPlan) -> bool:
        """Whether examples may be repeated in a batch."""
        return plan.repeatable and len(plan.hooked) + len(plan.unused) == len(self.adapter.names)

    def _repetition(self, plan: LinearizationPlan, counts: list[int]) -> BatchRepetition:
        """How often each example is repeated for ``counts`` directions."""
        if not self._repeats(plan):
            return BatchRepetition.of(torch.ones(len(counts), dtype=torch.int64))
        if self.outputs_per_pass:
            return BatchRepetition.of(torch.tensor(counts).clamp(1, self.outputs_per_pass))
        free = max(1, MAX_PASS_BYTES // plan.bytes_each)
        most = max(free, len(counts))
        return cheapest_repetition(tuple(counts), free, most if min(counts) == max(counts) else most * RAGGED)

    def _budget(self, plan: LinearizationPlan, size: int) -> int:
        vectors = VECTORS * self.adapter.num_parameters * self.adapter.dtype.itemsize
        wanted = self.bytes_budget or max(MIN_BUDGET_BYTES, GRAPHS * size * plan.bytes_each, vectors)
        return wanted if self._most is None else min(wanted, self._most)

    def _bounds(self, plan: LinearizationPlan, counts: list[int], cuts: Sequence[int]) -> list[int]:
        """Where pieces begin and end whose graph, rows and temporaries fit the budget."""
        repeated = self._repeats(plan) and max(counts) > 1
        shared = (MAX_PASS_BYTES if repeated else 0) + 2 * 8 * CHUNK_NUMEL
        room = self._budget(plan, len(counts)) - shared
        graph = plan.bytes_each * (1 if min(counts) == max(counts) else RAGGED)
        sizes = [graph + number * plan.row_numbers * self.adapter.dtype.itemsize for number in counts]
        bounds, total = [0], 0
        for number, bytes_each in enumerate(sizes):
            if total + bytes_each > room and number > bounds[-1]:
                bounds.append(max((cut for cut in cuts if bounds[-1] < cut <= number), default=number))
                total = sum(sizes[bounds[-1] : number])
            total += bytes_each
        return [*bounds, len(sizes)]


def _each(rows_per_example: RowsPerExample, size: int, plan: LinearizationPlan) -> list[int]:
    """Passes for the directions of each example, B of them; the head's features give all outputs."""
    if rows_per_example is None:
        rows_per_example = plan.num_outputs
    passes = [rows_per_example] * size if isinstance(rows_per_example, int) else list(rows_per_example)
    if plan.head is None or min(passes) < plan.num_outputs - 1:
        return passes
    features = plan.head.get_parameter("weight").shape[1]
    return [min(number, features) for number in passes]
