"""Which tensors may take their rows from hooks, found on the first batch by comparison with plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bayes_kf.inference.linearization.per_example_gradients import rules
from bayes_kf.inference.linearization.tape import Arrived, Tape, by_module, is_outer, tensor_rows
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs, batch_size, some_examples

Hooked = Mapping[str, tuple[nn.Module, str]]  # tensor name -> (module, attribute)

FEW = 4  # examples: the check takes some eight passes over them
CHECKED_ROWS = 3  # a batch is repeated to at least this many before its rows are checked
OVERHEAD = 1.3  # of a pass over what it saves: outputs that are watched, temporaries; seen on a small BERT
LARGEST_TOLERANCE = 0.05  # of a gradient's length, whatever the dtype


class LinearizationPlan(NamedTuple):
    """How one model is linearized.

    Attributes:
        hooked: the tensors whose rows come from hooks.
        unused: the tensors that no output of the checked batch depended on.
        num_outputs: m.
        repeatable: whether a batch may be repeated: the model takes it, and outputs do not depend on the other rows.
        size: the batch size of the check.
        head: the Linear whose output, from one vector per example, is the model's; None where there is none.
        row_numbers: how many numbers are kept for a row of all hooked tensors.
        bytes_each: what the graph of one example keeps for the backward pass.
        plain: whether gradients can be asked for by name; not in layers that run again by the reentrant method.
    """

    hooked: Hooked
    unused: frozenset[str]
    num_outputs: int
    repeatable: bool
    size: int
    head: nn.Module | None
    row_numbers: int
    bytes_each: int
    plain: bool

    def without(self, names: set[str]) -> LinearizationPlan:
        """The same with no rows from hooks for some tensors."""
        return self._replace(hooked={name: place for name, place in self.hooked.items() if name not in names})

    def serves(self, size: int) -> bool:
        """Whether the check holds for batches of ``size``; without repetition it is known for its own size only."""
        return self.repeatable or size == self.size


def owners(adapter: AdapterModel) -> dict[str, tuple[nn.Module, str]]:
    """Trainable tensors that belong, in one place only, to a module with a rule."""
    return {
        name: places[0]
        for name, places in adapter.owners.items()
        if len(places) == 1 and places[0][1] in rules(places[0][0])
    }


def make_plan(adapter: AdapterModel, vector: Tensor, inputs: Inputs) -> LinearizationPlan:
    """How to linearize a model, found on the first ``FEW`` examples where it takes batches of any size."""
    size = batch_size(inputs)
    if size > FEW:
        try:
            plan = _make_plan(adapter, vector, some_examples(inputs, slice(FEW), size))
        except (RuntimeError, MemoryError, ValueError, TypeError, IndexError):  # a model that takes what it was given
            plan = None
        if plan is not None and plan.repeatable:
            return plan
    return _make_plan(adapter, vector, inputs)


def _make_plan(adapter: AdapterModel, vector: Tensor, inputs: Inputs) -> LinearizationPlan:
    """Which tensors may take the hooks, found by comparing one example's rows with plain autograd.

    The outputs of one example of a repeated batch are pulled back. A tensor passes when that example's row is the
    gradient that autograd gives and every other row is zero, so modules that are fed something else than examples
    first, or tensors that are also used elsewhere, are found out whatever they are called.
    """
    hooked, size = owners(adapter), batch_size(inputs)
    generator = torch.Generator(device=vector.device).manual_seed(0)
    noise = torch.randn(vector.shape, generator=generator, dtype=vector.dtype, device=vector.device)
    leaves = adapter.leaves(vector + 0.05 * noise)  # LoRA's A is invisible while B is zero
    modules = {module for module, _ in hooked.values()}
    modules |= {module for module in adapter.model.modules() if type(module) is nn.Linear}  # one may be the head
    held = [*adapter.model.parameters(), *leaves.values()]
    with _saved_bytes({tensor.untyped_storage().data_ptr() for tensor in held}) as saved:
        single = adapter.call(leaves, inputs)
    batch, times = _checked_batch(inputs, size)
    plain = _is_plain(adapter, leaves, inputs)
    try:
        tape = Tape(adapter, leaves, batch, modules, plain)
        repeatable = len(tape.outputs) == times * size and _same(tape.outputs[:size], single)
    except (RuntimeError, MemoryError, ValueError, TypeError, IndexError):  # a model that takes what it was given
        repeatable = False
    if not repeatable:
        tape = Tape(adapter, leaves, inputs, modules, plain)
    seed = torch.zeros_like(tape.outputs)
    seed[-1] = torch.randn(seed.shape[1], generator=generator, device=vector.device).to(seed.dtype)
    arrived = by_module(tape.cotangents(seed, keep=True))
    exact = dict(zip(adapter.names, tape.gradients(seed, adapter.names, keep=False), strict=True))
    chosen, numbers = {}, 0
    with adapter.substituted(leaves):
        for name, (module, attribute) in hooked.items():
            stored = _checked(arrived.get(module, []), attribute, leaves[name].shape, exact[name], len(seed))
            if stored and module not in tape.overwritten:  # in place: rows would be those of what came after
                chosen[name], numbers = hooked[name], numbers + stored
    unused = frozenset(name for name, gradient in exact.items() if gradient is None)
    adapter.linearized_by = {
        name: "hooks" if name in chosen else "unused" if name in unused else "general" for name in adapter.names
    }
    head = tape.head
    return LinearizationPlan(
        chosen,
        unused,
        seed.shape[1],
        repeatable,
        size,
        head and head.module,
        numbers,
        1 + int(OVERHEAD * saved()) // size,
        plain,
    )


def _checked(arrived: Arrived, attribute: str, shape: torch.Size, exact: Tensor | None, num_rows: int) -> int:
    """Numbers kept per row of a tensor whose rule gives what autograd gives; 0 where it does not."""
    if not arrived or exact is None:
        return 0
    try:
        where, rows = tensor_rows(arrived, attribute, shape)
    except (RuntimeError, IndexError, KeyError):  # an option that the rule does not know
        return 0
    stored = arrived[0][1].shape[-1] if is_outer(arrived) else rows.shape[1]
    if where is not None:
        rows = rows.new_zeros(len(rows), shape.numel()).index_copy_(1, where, rows)
    return stored if len(rows) == num_rows and _agrees(rows, exact.flatten()) else 0


def repeat(inputs: Inputs, size: int, times: int) -> Inputs:
    """Inputs with every batched tensor repeated ``times`` times along the batch."""
    if times == 1:
        return inputs
    if isinstance(inputs, Tensor):
        return inputs.repeat(times, *[1] * (inputs.ndim - 1))
    return {
        k: v.repeat(times, *[1] * (v.ndim - 1)) if isinstance(v, Tensor) and v.ndim and v.shape[0] == size else v
        for k, v in inputs.items()
    }


@contextmanager
def _saved_bytes(parameters: set[int]) -> Iterator[Callable[[], int]]:
    """Counts what autograd keeps for the backward pass, every storage once, those of ``parameters`` not."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.layout != torch.strided:  # a sparse mask or projection of an adapter
            return tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(seen.values())


def _is_plain(adapter: AdapterModel, leaves: Mapping[str, Tensor], inputs: Inputs) -> bool:
    """Whether autograd.grad reaches what a plain backward pass reaches; not through reentrant checkpoints."""
    tape = Tape(adapter, leaves, inputs, set(), True)
    seed = torch.ones_like(tape.outputs)
    try:
        asked = tape.gradients(seed, adapter.names, keep=True)
    except RuntimeError:
        return False
    tape.plain = False
    reached = tape.gradients(seed, adapter.names, keep=False)
    return all((a is None) == (b is None) for a, b in zip(asked, reached, strict=True))


def _checked_batch(inputs: Inputs, size: int) -> tuple[Inputs, int]:
    """The batch repeated, at least once, to a number of rows that no other dimension of the inputs has."""
    tensors = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    lengths = {length for t in tensors if isinstance(t, Tensor) for length in t.shape[1:]}
    times = next(
        t for t in range(2, len(lengths) + CHECKED_ROWS + 3) if t * size >= CHECKED_ROWS and t * size not in lengths
    )
    return repeat(inputs, size, times), times


def _same(outputs: Tensor, single: Tensor) -> bool:
    return bool((outputs - single).abs().max() <= tolerance(single.dtype) * (1e-3 + single.abs().max()))


def _agrees(rows: Tensor, exact: Tensor) -> bool:
    """Whether the last row is ``exact`` and the others vanish beside it."""
    allowed = tolerance(exact.dtype) * exact.norm()
    return bool((rows[-1] - exact).norm() <= allowed and rows[:-1].norm() <= allowed)


def tolerance(dtype: torch.dtype) -> float:
    """How far rows may lie from autograd's, relative to its gradient's length."""
    return min(64 * torch.finfo(dtype).eps ** 0.75, LARGEST_TOLERANCE)
