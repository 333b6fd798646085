"""Forward passes that remember what hooked modules saw, backward passes to them, and which tensors may use them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bayes_kf.inference.layers import RULES, Call, columns
from bayes_kf.models.adapter import AdapterModel, Inputs, batch_size

Hooked = Mapping[str, tuple[nn.Module, str]]  # tensor name -> (module, attribute)
Arrived = list[tuple[Call, Tensor]]  # calls and the cotangents of what came out of them

CHECKED_ROWS = 3  # a batch is repeated to at least this many before its rows are checked
OVERHEAD = 1.3  # of a pass over what it saves: outputs that are watched, temporaries; seen on a small BERT
LARGEST_TOLERANCE = 0.05  # of a gradient's length, whatever the dtype


class Plan(NamedTuple):
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

    def serves(self, size: int) -> bool:
        """Whether the check holds for batches of ``size``; without repetition it is known for its own size only."""
        return self.repeatable or size == self.size


class Tape:
    """A forward pass at given tensors, ready for several backward passes.

    The adapter's tensors are in place, and modules watched, during all of these: checkpointed layers run again.

    Args:
        adapter: the model.
        leaves: tensor name -> leaf that asks for gradients.
        inputs: a batch.
        modules: to be watched.
        plain: see :class:`Plan`.
    """

    def __init__(
        self, adapter: AdapterModel, leaves: Mapping[str, Tensor], inputs: Inputs, modules: set[nn.Module], plain: bool
    ) -> None:
        self.adapter, self.leaves, self.modules, self.plain = adapter, leaves, modules, plain
        self._calls: list[Call] = []
        self._arrived: Arrived = []
        with self._watching(self._calls.append):
            self.outputs = adapter.run(inputs)
        self._calls = [call for call in self._calls if call.output.requires_grad]

    @property
    def head(self) -> Call | None:
        """The call of a Linear on one vector per example whose output *is* the model's, where there is one."""
        found = [call for call in self._calls if call.output is self.outputs and type(call.module) is nn.Linear]
        return found[0] if found and found[0].taken.ndim == 2 and found[0].taken.requires_grad else None

    def cotangents(self, seed: Tensor, at: Tensor | None = None, *, keep: bool) -> Arrived:
        """The gradient of (seed · outputs), or of (seed · at), in what came out of every call that it reaches.

        Args:
            seed: shaped as the outputs (or ``at``).
            at: a tensor of the graph in the place of the outputs.
            keep: whether more backward passes follow.
        """
        end = self.outputs if at is None else at
        if self.plain and not self._calls:
            return []
        if self.plain:
            ends = [call.output for call in self._calls]
            with self._watching(None):
                found = torch.autograd.grad(end, ends, seed, retain_graph=keep, allow_unused=True)
            return [(call, g) for call, g in zip(self._calls, found, strict=True) if g is not None]
        self._arrived = []
        with self._watching(lambda call: None):
            end.backward(seed, retain_graph=keep)
        for leaf in self.leaves.values():
            leaf.grad = None
        return self._arrived

    def gradients(self, seed: Tensor, names: Sequence[str], *, keep: bool) -> list[Tensor | None]:
        """The gradient of (seed · outputs) in named tensors, None where the outputs do not depend on one."""
        chosen = [self.leaves[name] for name in names]
        with self._watching(None):
            if self.plain:
                return list(torch.autograd.grad(self.outputs, chosen, seed, retain_graph=keep, allow_unused=True))
            self.outputs.backward(seed, retain_graph=keep)
        found = [leaf.grad for leaf in chosen]
        for leaf in self.leaves.values():
            leaf.grad = None
        return found

    @contextmanager
    def _watching(self, see: Callable[[Call], Any] | None) -> Iterator[None]:
        """The adapter's tensors in place and, unless ``see`` is None, every call of a watched module shown to it."""

        def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if see is None or not args or not isinstance(output, Tensor):  # called by keyword: not known, not chosen
                return
            call = Call(module, args[0], kwargs, output)
            see(call)
            if not self.plain and output.requires_grad:
                output.register_hook(lambda g: self._arrived.append((call, g)))

        watched = self.modules if see is not None else ()
        handles = [module.register_forward_hook(remember, with_kwargs=True) for module in watched]
        try:
            with _eager(), self.adapter.substituted(self.leaves):
                yield
        finally:
            for handle in handles:
                handle.remove()


def owners(adapter: AdapterModel) -> dict[str, tuple[nn.Module, str]]:
    """Trainable tensors that belong, in one place only, to a module with a rule."""
    return {
        name: places[0]
        for name, places in adapter.owners.items()
        if len(places) == 1 and places[0][1] in RULES.get(type(places[0][0]), {})
    }


def is_outer(arrived: Arrived) -> bool:
    """Whether rows are outer products: of a Linear called once, on one vector per example."""
    return len(arrived) == 1 and type(arrived[0][0].module) is nn.Linear and arrived[0][0].taken.ndim == 2


def by_module(arrived: Arrived) -> dict[nn.Module, Arrived]:
    """What arrived at every module."""
    found: dict[nn.Module, Arrived] = {}
    for call, g in arrived:
        found.setdefault(call.module, []).append((call, g))
    return found


@torch.no_grad()
def tensor_rows(arrived: Arrived, attribute: str, shape: torch.Size) -> tuple[Tensor | None, Tensor]:
    """Per-example gradients of one tensor of the module that ``arrived`` is about.

    Returns:
        The columns of the flattened tensor that the rows are about, None for all, and the rows (R, columns).
    """
    rule = RULES[type(arrived[0][0].module)][attribute]
    if len(arrived) == 1:
        call, g = arrived[0]
        return columns(call), rule(call, g, shape)
    return None, torch.stack([_whole(call, rule(call, g, shape), shape) for call, g in arrived]).sum(0)


def _whole(call: Call, rows: Tensor, shape: torch.Size) -> Tensor:
    """Rows over all columns of a tensor where a rule gave those that the batch looked up."""
    where = columns(call)
    return rows if where is None else rows.new_zeros(len(rows), shape.numel()).index_copy_(1, where, rows)


def choose(adapter: AdapterModel, vector: Tensor, inputs: Inputs) -> Plan:
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
    except (RuntimeError, ValueError, TypeError, IndexError):  # a model that takes only what it was given
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
            if stored:
                chosen[name], numbers = hooked[name], numbers + stored
    unused = frozenset(name for name, gradient in exact.items() if gradient is None)
    adapter.paths = {
        name: "hooks" if name in chosen else "unused" if name in unused else "general" for name in adapter.names
    }
    head = tape.head
    return Plan(
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


def _eager() -> AbstractContextManager[None]:
    """Compiled modules run uncompiled inside, for a compiled graph has no modules to watch."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and the import takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextmanager
def _saved_bytes(parameters: set[int]) -> Iterator[Callable[[], int]]:
    """Counts what autograd keeps for the backward pass, every storage once, those of ``parameters`` not."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
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
    """The batch repeated to a number of rows that no other dimension of the inputs has, so none is mistaken for it."""
    tensors = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    taken = {length for t in tensors if isinstance(t, Tensor) for length in t.shape[1:]}
    times = next(
        t for t in range(1, len(taken) + CHECKED_ROWS + 2) if t * size >= CHECKED_ROWS and t * size not in taken
    )
    return repeat(inputs, size, times), times


def _same(outputs: Tensor, single: Tensor) -> bool:
    return bool((outputs - single).abs().max() <= _tolerance(single.dtype) * (1e-3 + single.abs().max()))


def _agrees(rows: Tensor, exact: Tensor) -> bool:
    """Whether the last row is ``exact`` and the others vanish beside it."""
    allowed = _tolerance(exact.dtype) * exact.norm()
    return bool((rows[-1] - exact).norm() <= allowed and rows[:-1].norm() <= allowed)


def _tolerance(dtype: torch.dtype) -> float:
    return min(64 * torch.finfo(dtype).eps ** 0.75, LARGEST_TOLERANCE)
