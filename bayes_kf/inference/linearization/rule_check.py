"""The linearization plan: which tensors take their rows from hooks, checked on the first batch against autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bayes_kf.inference.linearization.per_example_gradients import (
    RULES_THAT_READ_MODULES,
    Rule,
    per_example_rows,
    rules,
)
from bayes_kf.inference.linearization.tape import Cotangents, Tape, by_module, is_outer_product
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Batch, Inputs
from bayes_kf.processes.divided_tensors import is_divided, own_part, whole_shape

NUM_CHECKED = 4  # examples: the check takes some eight passes over them
MIN_CHECKED_ROWS = 3  # a batch is repeated to at least this many rows before they are checked
OVERHEAD = 1.3  # memory of a pass over what its graph stores: hooked outputs, temporaries; measured on a small BERT
MAX_TOLERANCE = 0.05  # of a gradient's norm, whatever the dtype

RowsPerExample = int | Sequence[int] | None  # of all examples, of each, or one per output

REFUSED = (RuntimeError, MemoryError, ValueError, TypeError, IndexError)  # raised by models that need their own batch


class HookedTensor(NamedTuple):
    """A tensor whose rows come from a hook on its module.

    Attributes:
        module: the module that applies the tensor.
        attribute: the module's name for the tensor.
        rule: for the per-example gradients of the tensor.
    """

    module: nn.Module
    attribute: str
    rule: Rule


class LinearizationPlan(NamedTuple):
    """How one model is linearized.

    Attributes:
        hooked: name -> tensor whose rows come from hooks.
        unused: the tensors that no output of the checked batch depends on.
        num_outputs: m.
        repeatable: whether examples may be repeated: the model accepts it, and outputs do not depend on other rows.
        size: the batch size of the check.
        head: the Linear whose output, from one vector per example, is the model's; None if there is none.
        row_numbers: the numbers stored for a row of all hooked tensors.
        bytes_each: the bytes that the graph of one example stores for the backward pass.
        plain: whether gradients can be asked for by name; not in layers with reentrant checkpoints.
        reads_modules: whether a rule reads other tensors of its module, which must be in place then.
    """

    hooked: Mapping[str, HookedTensor]
    unused: frozenset[str]
    num_outputs: int
    repeatable: bool
    size: int
    head: nn.Module | None
    row_numbers: int
    bytes_each: int
    plain: bool
    reads_modules: bool

    def without(self, names: set[str]) -> LinearizationPlan:
        """The plan with no rows from hooks for some tensors."""
        return self._replace(hooked={name: hooked for name, hooked in self.hooked.items() if name not in names})

    def rows_to_compute(self, rows_per_example: RowsPerExample, size: int) -> list[int]:
        """Rows of each of B = ``size`` examples that backward passes compute; the head's features give all outputs."""
        if rows_per_example is None:
            rows_per_example = self.num_outputs
        counts = [rows_per_example] * size if isinstance(rows_per_example, int) else list(rows_per_example)
        if self.head is None or min(counts) < self.num_outputs - 1:
            return counts
        features = self.head.get_parameter("weight").shape[1]
        return counts if features >= max(counts) else [min(count, features) for count in counts]


def tensors_with_rules(adapter: AdapterModel) -> dict[str, HookedTensor]:
    """Trainable tensors that belong to one module alone, which has a rule for them."""
    hooked = {}
    for name, places in adapter.owners.items():
        module, attribute = places[0]
        rule = rules(module).get(attribute)
        if len(places) == 1 and rule is not None:
            hooked[name] = HookedTensor(module, attribute, rule)
    return hooked


def make_plan(adapter: AdapterModel, vector: Tensor, batch: Batch) -> LinearizationPlan:
    """How to linearize a model, checked on a few examples if the model accepts batches of any size."""
    if batch.size > NUM_CHECKED:
        try:
            plan = _make_plan(adapter, vector, batch[:NUM_CHECKED])
        except REFUSED:
            plan = None
        if plan is not None and plan.repeatable:
            return plan
    return _make_plan(adapter, vector, batch)


def _make_plan(adapter: AdapterModel, vector: Tensor, batch: Batch) -> LinearizationPlan:
    """The tensors that may take hooks, found by comparing one example's rows with plain autograd.

    The gradient of one example's outputs, in a repeated batch, must be that example's row, and all other rows must be
    zero. So modules whose input does not have examples first, and tensors that are also used elsewhere, are detected
    whatever their names.
    """
    candidates = tensors_with_rules(adapter)
    generator = torch.Generator(device=vector.device).manual_seed(0)
    noise = torch.randn(vector.shape, generator=generator, dtype=vector.dtype, device=vector.device)
    leaves = adapter.leaves(vector + 0.05 * noise)  # LoRA's A has no effect while B is zero
    modules = {hooked.module for hooked in candidates.values()}
    modules |= {module for module in adapter.model.modules() if type(module) is nn.Linear}  # one may be the head
    held = [*adapter.model.parameters(), *leaves.values()]
    with _saved_bytes(held) as saved:
        single = adapter.call(leaves, batch.inputs)
    repeated, times = _repeated(batch)
    plain = _is_plain(adapter, leaves, batch.inputs)
    try:
        tape = Tape(adapter, leaves, repeated.inputs, modules, plain)
        repeatable = len(tape.outputs) == times * batch.size and _is_close(tape.outputs[: batch.size], single)
    except REFUSED:
        repeatable = False
    if not repeatable:
        tape = Tape(adapter, leaves, batch.inputs, modules, plain)
    seed = torch.zeros_like(tape.outputs)
    seed[-1] = torch.randn(seed.shape[1], generator=generator, device=vector.device).to(seed.dtype)
    calls = by_module(tape.cotangents(seed, keep=True))
    exact = dict(zip(adapter.names, tape.gradients(seed, adapter.names, keep=False), strict=True))
    hooked, row_numbers = {}, 0
    with adapter.substituted(leaves):
        for name, candidate in candidates.items():
            stored = _stored_numbers(calls.get(candidate.module, []), candidate, leaves[name], exact[name], len(seed))
            if stored and candidate.module not in tape.overwritten:  # else the output is that of a later operation
                hooked[name], row_numbers = candidate, row_numbers + stored
    unused = frozenset(name for name, gradient in exact.items() if gradient is None)
    adapter.linearized_by = {
        name: "hooks" if name in hooked else "unused" if name in unused else "general" for name in adapter.names
    }
    return LinearizationPlan(
        hooked=hooked,
        unused=unused,
        num_outputs=seed.shape[1],
        repeatable=repeatable,
        size=batch.size,
        head=tape.head and tape.head.module,
        row_numbers=row_numbers,
        bytes_each=1 + int(OVERHEAD * saved()) // batch.size,
        plain=plain,
        reads_modules=any(tensor.rule in RULES_THAT_READ_MODULES for tensor in hooked.values()),
    )


def _stored_numbers(
    calls: Cotangents, candidate: HookedTensor, parameter: Tensor, exact: Tensor | None, num_rows: int
) -> int:
    """The numbers stored per row of a tensor; 0 if its rule does not give autograd's gradient.

    Args:
        calls: of the tensor's module, each with the gradient of its output.
        candidate: the tensor's module and rule.
        parameter: the tensor.
        exact: its gradient by autograd; None if there is none.
        num_rows: of the batch.
    """
    if not calls or exact is None:
        return 0
    try:
        columns, rows = per_example_rows(calls, candidate.rule, parameter)
    except (RuntimeError, IndexError, KeyError):  # an option that the rule does not support
        return 0
    stored = calls[0][1].shape[-1] if is_outer_product(calls) else rows.shape[1]
    if columns is not None:
        rows = rows.new_zeros(len(rows), parameter.numel()).index_copy_(1, columns, rows)
    return stored if len(rows) == num_rows and _only_last_row_is(exact.flatten(), rows) else 0


@contextmanager
def _saved_bytes(parameters: Sequence[Tensor]) -> Iterator[Callable[[], int]]:
    """Counts the bytes that autograd saves for the backward pass, each storage once; not those of ``parameters``.

    Parameters that processes divide are put together in storages of their own, so they are known by their shapes.
    """
    sizes: dict[int, int] = {}
    storages = {own_part(parameter).untyped_storage().data_ptr() for parameter in parameters}
    shapes = {whole_shape(parameter) for parameter in parameters if is_divided(parameter)}
    shapes |= {shape[::-1] for shape in shapes}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.layout != torch.strided:  # a sparse mask or projection of an adapter
            return tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages and tuple(tensor.shape) not in shapes:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(sizes.values())


def _is_plain(adapter: AdapterModel, leaves: Mapping[str, Tensor], inputs: Inputs) -> bool:
    """Whether autograd.grad reaches the same tensors as backward(); through reentrant checkpoints it does not."""
    tape = Tape(adapter, leaves, inputs, set(), True)
    seed = torch.ones_like(tape.outputs)
    try:
        asked = tape.gradients(seed, adapter.names, keep=True)
    except RuntimeError:
        return False
    tape.plain = False
    reached = tape.gradients(seed, adapter.names, keep=False)
    return all((a is None) == (b is None) for a, b in zip(asked, reached, strict=True))


def _repeated(batch: Batch) -> tuple[Batch, int]:
    """The batch repeated, at least twice, to a number of rows that no other dimension of the inputs has."""
    tensors = batch.inputs.values() if isinstance(batch.inputs, Mapping) else [batch.inputs]
    lengths = {length for t in tensors if isinstance(t, Tensor) for length in t.shape[1:]}
    times = 2
    while times * batch.size < MIN_CHECKED_ROWS or times * batch.size in lengths:
        times += 1
    return Batch(batch.inputs, None, batch.size)[
        torch.arange(batch.size).repeat(times)
    ], times  # targets may not be checked yet


def _is_close(outputs: Tensor, single: Tensor) -> bool:
    return bool((outputs - single).abs().max() <= tolerance(single.dtype) * (1e-3 + single.abs().max()))


def _only_last_row_is(exact: Tensor, rows: Tensor) -> bool:
    """Whether the last row is ``exact`` and all others are zero, up to rounding."""
    allowed = tolerance(exact.dtype) * exact.norm()
    return bool((rows[-1] - exact).norm() <= allowed and rows[:-1].norm() <= allowed)


def tolerance(dtype: torch.dtype) -> float:
    """The distance of rows from autograd's gradient that is allowed, relative to the gradient's norm."""
    return min(64 * torch.finfo(dtype).eps ** 0.75, MAX_TOLERANCE)
