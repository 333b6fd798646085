"""A recorded forward pass: the calls of hooked modules, and backward passes to the outputs of these calls."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kf.inference.linearization.per_example_gradients import ModuleCall
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs
from bayes_kf.models.module_restoring import ModuleState
from bayes_kf.processes.divided_tensors import BackwardCounts

HEAD_RTOL = 0.05  # by which a Linear's product may differ from the model's outputs, whatever precision computed them

Cotangents = list[tuple[ModuleCall, Tensor]]  # calls, each with the gradient of its output


class Tape:
    """A forward pass at given tensors, ready for several backward passes.

    Checkpointed layers run again in a backward pass. So the adapter's tensors are in place, and modules are hooked,
    during all passes.

    Args:
        adapter: the model.
        leaves: tensor name -> leaf that requires gradients.
        inputs: of a batch.
        modules: to hook.
        plain: see :class:`LinearizationPlan`.

    Attributes:
        outputs: η of every row, (R, m), in the graph.
        head: the call of the classifier, see :meth:`_find_head`; None if there is none.
        head_weight: W of that Linear, (m, d), detached.
        overwritten: modules whose outputs were changed in place.
    """

    def __init__(
        self, adapter: AdapterModel, leaves: Mapping[str, Tensor], inputs: Inputs, modules: set[nn.Module], plain: bool
    ) -> None:
        self.adapter, self.leaves, self.modules, self.plain = adapter, leaves, modules, plain
        self._calls: list[ModuleCall] = []
        self._versions: list[int] = []
        self._arrived: Cotangents = []
        self._recording = True
        self._snapshot: Sequence[ModuleState] | None = None  # taken once, since that takes longer than substitution
        self.head_weight: Tensor | None = None
        self._counts = BackwardCounts(adapter.model.modules()) if adapter.is_divided else None
        with self._substituted(hooks=True):
            self.outputs = adapter.run(inputs)
            if self._counts is not None:
                self._counts.after_forward()
            self._recording = False
            recorded, self._calls = self._calls, []
            self.overwritten: set[nn.Module] = set()
            for call, version in zip(recorded, self._versions, strict=True):
                if call.output._version != version:
                    self.overwritten.add(call.module)
                if call.output.requires_grad:
                    self._calls.append(call)
            self.head = self._find_head()

    def _find_head(self) -> ModuleCall | None:
        """The only call of a Linear, on one vector per example, whose output *is* the model's; None if there is none.

        The product is computed again, because a hook may have changed the output since.
        """
        head, modules = None, []
        for call in self._calls:
            modules.append(call.module)
            if call.output is self.outputs and type(call.module) is nn.Linear:
                head = head or call
        if head is None or head.input.ndim != 2 or not head.input.requires_grad or modules.count(head.module) > 1:
            return None
        linear = head.module
        assert isinstance(linear, nn.Linear)
        with torch.no_grad():
            weight, bias = linear.weight, None if linear.bias is None else linear.bias.double()
            product = torch.nn.functional.linear(head.input.double(), weight.double(), bias)
            outputs = self.outputs.double()
            if not bool((product - outputs).abs().max() <= HEAD_RTOL * outputs.abs().max()):
                return None
        self.head_weight = weight.detach()
        return head

    def cotangents(self, seed: Tensor, at: Tensor | None = None, *, keep: bool) -> Cotangents:
        """The gradient of (seed · outputs), or of (seed · at), in the output of every call that it reaches.

        Args:
            seed: in the shape of the outputs (or of ``at``).
            at: a tensor of the graph instead of the outputs.
            keep: whether more backward passes follow.
        """
        end = self.outputs if at is None else at
        if self.plain and not self._calls:
            return []
        if self.plain:
            ends = []
            for call in self._calls:
                ends.append(call.output)
            with self._substituted(hooks=False):
                gradients = torch.autograd.grad(end, ends, seed, retain_graph=keep, allow_unused=True)
            arrived = []
            for call, gradient in zip(self._calls, gradients, strict=True):
                if gradient is not None:
                    arrived.append((call, gradient))
            return arrived
        self._arrived = []
        with self.adapter.preserved_gradients(), self._substituted(hooks=True):
            end.backward(seed, retain_graph=keep)
        for leaf in self.leaves.values():
            leaf.grad = None
        return self._arrived

    def gradients(self, seed: Tensor, names: Sequence[str], *, keep: bool) -> list[Tensor | None]:
        """The gradient of (seed · outputs) with respect to named tensors; None for tensors without effect."""
        chosen = [self.leaves[name] for name in names]
        if self.plain:
            with self._substituted(hooks=False):
                return list(torch.autograd.grad(self.outputs, chosen, seed, retain_graph=keep, allow_unused=True))
        with self.adapter.preserved_gradients(), self._substituted(hooks=False):
            self.outputs.backward(seed, retain_graph=keep)
        gradients = [leaf.grad for leaf in chosen]
        for leaf in self.leaves.values():
            leaf.grad = None
        return gradients

    @contextmanager
    def _substituted(self, hooks: bool) -> Iterator[None]:
        """The adapter's tensors in place, compiled modules uncompiled and, with ``hooks``, the modules hooked."""
        compiled = "torch._dynamo" in sys.modules  # else nothing was compiled, and the import takes seconds
        eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()  # compiled graphs lack modules
        with eager, self.adapter.substituted(self.leaves, self._snapshot) as self._snapshot:
            if self._counts is not None:
                self._counts.set_back()
            handles = []
            if hooks:
                for module in self.modules:
                    handles.append(module.register_forward_hook(self._on_forward, with_kwargs=True))
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def _on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Records a call. Calls by keyword alone are unknown, so their tensors are not hooked."""
        if not args or not isinstance(output, Tensor):
            return
        call = ModuleCall(module, args[0], kwargs, output)
        if self._recording:
            self._calls.append(call)
            self._versions.append(output._version)
        if not self.plain and output.requires_grad:
            output.register_hook(lambda gradient: self._arrived.append((call, gradient)))


def by_module(arrived: Cotangents) -> dict[nn.Module, Cotangents]:
    """The calls of each module."""
    calls: dict[nn.Module, Cotangents] = {}
    for call, gradient in arrived:
        calls.setdefault(call.module, []).append((call, gradient))
    return calls


def is_outer_product(calls: Cotangents) -> bool:
    """Whether a module's rows are outer products: those of a Linear called once, on one vector per example."""
    return len(calls) == 1 and type(calls[0][0].module) is nn.Linear and calls[0][0].input.ndim == 2
