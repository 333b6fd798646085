"""Forward passes that remember what watched modules saw, and backward passes to what came out of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kf.inference.linearization.per_example_gradients import ModuleCall, columns, rules
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs

SAME = 0.05  # of the outputs, by which they may miss the head's, in whatever precision it ran
Arrived = list[tuple[ModuleCall, Tensor]]  # calls and the cotangents of what came out of them


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
        self._calls: list[ModuleCall] = []
        self._arrived: Arrived = []
        self._before = adapter.snapshot()  # once for all passes, as it takes longer than placing tensors
        versions: list[int] = []

        def remember(call: ModuleCall) -> None:
            self._calls.append(call)
            versions.append(call.output._version)

        with self._watching(remember):
            self.outputs = adapter.run(inputs)
        seen = list(zip(self._calls, versions, strict=True))
        self.overwritten = {call.module for call, version in seen if call.output._version != version}
        self._calls = [call for call in self._calls if call.output.requires_grad]
        self.head = self._head()

    def _head(self) -> ModuleCall | None:
        """The only call of a Linear on one vector per example whose output *is* the model's, where there is one."""
        found = [call for call in self._calls if call.output is self.outputs and type(call.module) is nn.Linear]
        if not found or found[0].input.ndim != 2 or not found[0].input.requires_grad:
            return None
        head = found[0]
        if sum(call.module is head.module for call in self._calls) > 1:
            return None
        with torch.no_grad(), self.adapter.swapped(self.leaves):  # nothing, a hook say, has changed it since
            weight, bias = (None if t is None else t.double() for t in (head.module.weight, head.module.bias))
            linear = torch.nn.functional.linear(head.input.double(), weight, bias)  # type: ignore[arg-type]
            outputs = self.outputs.double()
            same = bool((linear - outputs).abs().max() <= SAME * outputs.abs().max())
        return head if same else None

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
        with self.adapter.preserved_gradients(), self._watching(lambda call: None):
            end.backward(seed, retain_graph=keep)
        for leaf in self.leaves.values():
            leaf.grad = None
        return self._arrived

    def gradients(self, seed: Tensor, names: Sequence[str], *, keep: bool) -> list[Tensor | None]:
        """The gradient of (seed · outputs) in named tensors, None where the outputs do not depend on one."""
        chosen = [self.leaves[name] for name in names]
        if self.plain:
            with self._watching(None):
                return list(torch.autograd.grad(self.outputs, chosen, seed, retain_graph=keep, allow_unused=True))
        with self.adapter.preserved_gradients(), self._watching(None):
            self.outputs.backward(seed, retain_graph=keep)
        found = [leaf.grad for leaf in chosen]
        for leaf in self.leaves.values():
            leaf.grad = None
        return found

    @contextmanager
    def _watching(self, see: Callable[[ModuleCall], Any] | None) -> Iterator[None]:
        """The adapter's tensors in place and, unless ``see`` is None, every call of a watched module shown to it."""

        def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if see is None or not args or not isinstance(output, Tensor):  # called by keyword: not known, not chosen
                return
            call = ModuleCall(module, args[0], kwargs, output)
            see(call)
            if not self.plain and output.requires_grad:
                output.register_hook(lambda g: self._arrived.append((call, g)))

        watched = self.modules if see is not None else ()
        handles = [module.register_forward_hook(remember, with_kwargs=True) for module in watched]
        try:
            with _eager(), self.adapter.substituted(self.leaves, self._before):
                yield
        finally:
            for handle in handles:
                handle.remove()


def is_outer(arrived: Arrived) -> bool:
    """Whether rows are outer products: of a Linear called once, on one vector per example."""
    return len(arrived) == 1 and type(arrived[0][0].module) is nn.Linear and arrived[0][0].input.ndim == 2


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
    rule = rules(arrived[0][0].module)[attribute]
    if len(arrived) == 1:
        call, g = arrived[0]
        return columns(call), rule(call, g, shape)
    return None, torch.stack([_whole(call, rule(call, g, shape), shape) for call, g in arrived]).sum(0)


def _whole(call: ModuleCall, rows: Tensor, shape: torch.Size) -> Tensor:
    """Rows over all columns of a tensor where a rule gave those that the batch looked up."""
    where = columns(call)
    return rows if where is None else rows.new_zeros(len(rows), shape.numel()).index_copy_(1, where, rows)


def _eager() -> AbstractContextManager[None]:
    """Compiled modules run uncompiled inside, for a compiled graph has no modules to watch."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and the import takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
