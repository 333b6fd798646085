"""Forward passes that record what their backward passes need, in chunks that fit the memory.

The first batch determines the plan: how each tensor's rows are computed (``rule_check``).
"""

from __future__ import annotations

import functools
import itertools
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from bayes_kf.inference.linearization.batch_repetition import BatchRepetition, cheapest_repetition
from bayes_kf.inference.linearization.jacobian_blocks import CHUNK_NUMEL
from bayes_kf.inference.linearization.linearized_batch import LinearizedBatch
from bayes_kf.inference.linearization.row_buffer import RecordedForward
from bayes_kf.inference.linearization.rule_check import LinearizationPlan, RowsPerExample, make_plan
from bayes_kf.inference.linearization.shared_batch import Linearized, SharedLinearizedBatch
from bayes_kf.inference.linearization.tape import Tape
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Batch, Inputs
from bayes_kf.processes import shared_work

T = TypeVar("T")

MAX_PASS_BYTES = 2**23  # of graph; a small batch is repeated up to this size
MIN_BUDGET_BYTES = 2**25  # of graph, rows and temporaries; larger batches are divided into chunks
BUDGET_IN_GRAPHS = 3  # or this many times the graph of the batch
BUDGET_IN_VECTORS = 2  # or this many vectors of parameters, which the measurement update takes anyway
UNEVEN = 2  # times as many rows may be there if examples have different numbers of directions
OUT_OF_MEMORY = re.compile("not enough memory|can't allocate memory|out of memory", re.IGNORECASE)  # messages of torch


class Linearizer:
    """Outputs of an :class:`AdapterModel` and their Jacobian at θ.

    Args:
        adapter: the model.
        outputs_per_pass: directions of each example in one backward pass; by default chosen from the sizes.
        bytes_budget: bytes that the graph, rows and temporaries of a chunk may take; by default 32 MiB, or three times
            the graph of the whole batch, or two vectors of parameters, whichever is most.

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
        self._refused: set[str] = set()  # tensors whose hooks have given wrong rows
        self._max_bytes: int | None = None  # of a chunk, after memory ran out

    def __call__(self, vector: Tensor, batch: Batch | Inputs, *, rows_per_example: RowsPerExample = None) -> Linearized:
        """The outputs at θ = ``vector``, with their graph.

        Args:
            vector: θ, (n,).
            batch: of B examples.
            rows_per_example: rows of the Jacobian that will be asked for, one per output by default. Only speed
                depends on it.
        """
        batch = Batch.of(batch)
        share = shared_work.share_of(batch.size)
        if share is None:
            return LinearizedBatch(self.adapter, functools.partial(self._record, vector, batch, rows_per_example))
        own = rows_per_example[share.where] if isinstance(rows_per_example, Sequence) else rows_per_example
        record = functools.partial(self._record, vector, self.adapter.part(batch, share.where), own)
        return SharedLinearizedBatch(
            share, lambda: LinearizedBatch(self.adapter, record), lambda: sorted(self._refused), self._refuse
        )

    @property
    def num_outputs(self) -> int:
        """m, or 0 before the first batch."""
        return self._plan.num_outputs if self._plan else 0

    def prepare(self, vector: Tensor, batch: Batch | Inputs) -> int:
        """The number of outputs, m. The first batch, on which the plan is made, determines it."""
        return self._planned(vector, Batch.of(batch)).num_outputs

    def num_backward_passes(self, vector: Tensor, batch: Batch | Inputs) -> int:
        """Backward passes that the rows of all outputs take."""
        number = self._planned(vector, Batch.of(batch)).rows_to_compute(None, 1)[0]
        return shared_work.numbers_of_first([number])[0]

    def max_chunk_size(self, vector: Tensor, batch: Batch | Inputs) -> int:
        """The number of examples whose graphs fit the budget."""
        batch = Batch.of(batch)
        plan = self._planned(vector, batch)
        return shared_work.numbers_of_first([max(1, self._budget(plan, batch.size) // plan.bytes_each)])[0]

    def fits_one_pass(self, vector: Tensor, batch: Batch | Inputs, count: int) -> bool:
        """Whether one backward pass carries ``count`` directions of every example of a small batch."""
        batch = Batch.of(batch)
        plan = self._planned(vector, batch)
        fits = count == 1 or (self._may_repeat(plan) and batch.size * count * plan.bytes_each <= MAX_PASS_BYTES)
        return bool(shared_work.numbers_of_first([fits])[0])

    def chunks(
        self, vector: Tensor, batch: Batch | Inputs, rows_per_example: RowsPerExample = None, cuts: Sequence[int] = ()
    ) -> list[tuple[slice, Batch]]:
        """Chunks of a batch whose graph and rows fit ``bytes_budget``, with their places in the batch.

        A chunk has at least one example, whatever that takes.

        Args:
            vector: θ, (n,).
            batch: of B examples.
            rows_per_example: rows of the Jacobian that will be asked for, one per output by default.
            cuts: where chunks should end, ascending; they end elsewhere only if the budget requires it.
        """
        batch = Batch.of(batch)
        plan = self._planned(vector, batch)
        bounds = self._bounds(plan, plan.rows_to_compute(rows_per_example, batch.size), cuts)
        bounds = shared_work.numbers_of_first(bounds)  # the plans of processes may differ
        if len(bounds) == 2:
            return [(slice(0, batch.size), batch)]
        return [(slice(*ends), batch[slice(*ends)]) for ends in itertools.pairwise(bounds)]

    def outputs(self, vector: Tensor, batch: Batch) -> Tensor:
        """Outputs at θ without their graph, (B, m), in chunks of as many examples as fit the budget."""
        chunks = batch.chunks(self.max_chunk_size(vector, batch))
        return torch.cat([self.adapter.outputs(vector, chunk.inputs) for chunk in chunks])

    def retry_in_smaller_chunks(self, call: Callable[[], T], size: int) -> T:
        """The result of ``call``, which is called again, with half the bytes for a chunk, while memory runs out.

        Later batches are divided in the same way. Warns the first time. A process that shares the work with others does
        not call again, since these would not.

        Args:
            call: goes through a batch by :meth:`chunks`, and changes nothing if it raises.
            size: of the batch.
        """
        while True:
            try:
                return call()
            except (RuntimeError, MemoryError) as error:
                if shared_work.present_group() is not None:  # the other processes would not call again
                    raise
                if not _ran_out_of_memory(error) or not self._halve_chunks(size):
                    raise
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def gradient(self, vector: Tensor, batch: Batch | Inputs, cotangent: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """Jᵀw summed over a batch, (n,), in float64: one forward and one backward pass for each chunk.

        Args:
            vector: θ, (n,).
            batch: of B examples.
            cotangent: from the outputs of a chunk, (b, m), and its place in the batch to its w, (b, m).
        """
        batch = Batch.of(batch)
        share = shared_work.share_of(batch.size)
        if share is None:
            return self._own_gradient(vector, batch, cotangent)
        first = share.where.start

        def of_own(outputs: Tensor, where: slice) -> Tensor:
            return cotangent(outputs, slice(first + where.start, first + where.stop))

        own = shared_work.done_everywhere(
            lambda: self._own_gradient(vector, self.adapter.part(batch, share.where), of_own), is_share=True
        )
        return shared_work.all_reduced(torch.zeros_like(own) if share.is_empty else own)

    def _own_gradient(self, vector: Tensor, batch: Batch, cotangent: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """:meth:`gradient` in this process alone."""
        plan, total = self._planned(vector, batch), torch.zeros_like(vector, dtype=torch.float64)
        for where, chunk in self.chunks(vector, batch, 1):
            with self.adapter.full_precision(), self.adapter.eval_mode(), torch.enable_grad():
                leaves = self.adapter.leaves(vector)
                tape = Tape(self.adapter, leaves, chunk.inputs, set(), plan.plain)
                seed = cotangent(tape.outputs.detach().to(self.adapter.dtype), where)
                gradients = tape.gradients(seed.to(tape.outputs), self.adapter.names, keep=False)
            named = zip(leaves.items(), gradients, strict=True)
            total += self.adapter.flatten({k: torch.zeros_like(t) if g is None else g for (k, t), g in named})
        return total

    def _record(
        self, vector: Tensor, batch: Batch, rows_per_example: RowsPerExample, wrong: Sequence[str]
    ) -> RecordedForward:
        """A forward pass at θ, with examples repeated and modules hooked, but not those of ``wrong`` tensors."""
        if wrong:
            self._refuse(wrong)
        plan = self._planned(vector, batch)
        repetition = self._repetition(plan, plan.rows_to_compute(rows_per_example, batch.size))
        rows = batch if len(repetition.example) == batch.size else batch[repetition.example]
        modules = set() if plan.head is None else {plan.head}
        for hooked in plan.hooked.values():
            modules.add(hooked.module)
        with self.adapter.full_precision(), self.adapter.eval_mode(), torch.enable_grad():
            tape = Tape(self.adapter, self.adapter.leaves(vector), rows.inputs, modules, plan.plain)
        return RecordedForward(plan, tape, repetition)

    def _planned(self, vector: Tensor, batch: Batch) -> LinearizationPlan:
        """The plan; made on the first batch, and again for each size if examples may not be repeated."""
        plan = self._plan
        if plan is None or not (plan.repeatable or plan.size == batch.size):
            with self.adapter.full_precision(), self.adapter.eval_mode(), torch.enable_grad():
                self._plan = plan = make_plan(self.adapter, vector, batch)
            self._refuse(())
        return self._plan or plan

    def _refuse(self, names: Sequence[str]) -> None:
        """Computes the rows of some tensors by the general path from now on."""
        self._refused.update(names)
        if self._plan is None or self._refused.isdisjoint(self._plan.hooked):
            return
        general = self._refused.intersection(self._plan.hooked)
        self._plan = self._plan.without(general)
        self.adapter.linearized_by |= dict.fromkeys(general, "general")

    def _may_repeat(self, plan: LinearizationPlan) -> bool:
        """Whether examples may be repeated in a batch, with every tensor hooked or unused.

        Processes that divide a base make as many passes as each other, whatever their shares of a batch.
        """
        if self.adapter.is_divided:
            return False
        return plan.repeatable and len(plan.hooked) + len(plan.unused) == len(self.adapter.names)

    def _repetition(self, plan: LinearizationPlan, counts: list[int]) -> BatchRepetition:
        """How often each example is repeated for its number of directions."""
        if not self._may_repeat(plan):
            return BatchRepetition.of(torch.ones(len(counts), dtype=torch.int64))
        if self.outputs_per_pass:
            return BatchRepetition.of(torch.tensor(counts).clamp(1, self.outputs_per_pass))
        free = max(1, MAX_PASS_BYTES // plan.bytes_each)
        most = max(free, len(counts))
        return cheapest_repetition(tuple(counts), free, most if min(counts) == max(counts) else most * UNEVEN)

    def _budget(self, plan: LinearizationPlan, size: int) -> int:
        vectors = BUDGET_IN_VECTORS * self.adapter.num_parameters * self.adapter.dtype.itemsize
        budget = self.bytes_budget or max(MIN_BUDGET_BYTES, BUDGET_IN_GRAPHS * size * plan.bytes_each, vectors)
        return budget if self._max_bytes is None else min(budget, self._max_bytes)

    def _bounds(self, plan: LinearizationPlan, counts: list[int], cuts: Sequence[int]) -> list[int]:
        """Where chunks begin and end whose graph, rows and temporaries fit the budget."""
        shared = (MAX_PASS_BYTES if self._may_repeat(plan) and max(counts) > 1 else 0) + 2 * 8 * CHUNK_NUMEL
        room = self._budget(plan, len(counts)) - shared
        graph = plan.bytes_each * (1 if min(counts) == max(counts) else UNEVEN)
        row = plan.row_numbers * self.adapter.dtype.itemsize
        bounds, total = [0], 0
        for number, count in enumerate(counts):
            size = graph + count * row
            if total + size > room and number > bounds[-1]:
                bounds.append(max((cut for cut in cuts if bounds[-1] < cut <= number), default=number))
                total = (number - bounds[-1]) * graph + sum(counts[bounds[-1] : number]) * row
            total += size
        return [*bounds, len(counts)]

    def _halve_chunks(self, size: int) -> bool:
        """Halves the bytes of a chunk; False if chunks are single examples already, or there is no plan."""
        plan = self._plan
        if plan is None or size == 1 or (self._max_bytes is not None and self._max_bytes < plan.bytes_each):
            return False
        if self._max_bytes is None:
            warnings.warn(
                f"Memory ran out on {size} examples: batches are divided into smaller chunks from now on, which takes "
                "longer and may change results slightly. `bytes_budget` sets their size.",
                stacklevel=2,
            )
        self._max_bytes = self._budget(plan, size) // 2
        return True


def _ran_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a CPU or an accelerator."""
    # accelerate's `should_reduce_batch_size` lacks torch's message on Windows, and would be imported without memory
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or OUT_OF_MEMORY.search(str(error)) is not None
