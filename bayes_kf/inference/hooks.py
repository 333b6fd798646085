"""Rows of the Jacobian from what went into and came out of modules; which tensors may take this way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bayes_kf.inference.layers import RULES
from bayes_kf.models.adapter import AdapterModel, Inputs, batch_size

Owners = Mapping[str, tuple[nn.Module, str]]  # tensor name -> (module, attribute)
Tape = dict[nn.Module, list[tuple[Tensor, Tensor]]]  # module -> what went in and came out, once a call

CHECKED_ROWS = 3  # a batch is repeated to at least this many before its rows are checked
LARGEST_TOLERANCE = 0.05  # of a gradient's length, whatever the dtype


class Plan(NamedTuple):
    """How one model is linearized.

    Attributes:
        hooked: the tensors whose rows come from hooks.
        num_outputs: m.
        repeatable: whether a batch may be repeated: the model takes it, and outputs do not depend on the other rows.
        size: the batch size of the check.
    """

    hooked: Owners
    num_outputs: int
    repeatable: bool
    size: int

    def serves(self, size: int) -> bool:
        """Whether the check holds for batches of ``size``; without repetition it is known for its own size only."""
        return self.repeatable or size == self.size


def choose(adapter: AdapterModel, vector: Tensor, inputs: Inputs) -> Plan:
    """Which tensors may take the hooks, found by comparing one example's rows with plain autograd.

    The outputs of one example of a repeated batch are pulled back. A tensor passes when that example's row is the
    gradient that autograd gives and every other row is zero, so modules that are fed something else than examples
    first, or tensors that are also used elsewhere, are found out whatever they are called.
    """
    owners, size = _owners(adapter), batch_size(inputs)
    generator = torch.Generator(device=vector.device).manual_seed(0)
    noise = torch.randn(vector.shape, generator=generator, dtype=vector.dtype, device=vector.device)
    leaves = adapter.leaves(vector + 0.05 * noise)  # LoRA's A is invisible while B is zero
    single = adapter.call(leaves, inputs)
    batch, times = _checked_batch(inputs, size)
    try:
        outputs, taken = tape(adapter, leaves, batch, owners)
        repeatable = len(outputs) == times * size and _same(outputs[:size], single)
    except (RuntimeError, ValueError, TypeError, IndexError):  # a model that takes only what it was given
        repeatable = False
    if not repeatable:
        outputs, taken = tape(adapter, leaves, inputs, owners)
    seed = torch.zeros_like(outputs)
    seed[-1] = torch.randn(outputs.shape[1], generator=generator, device=vector.device).to(outputs.dtype)
    rows = hook_rows(outputs, seed, taken, owners, leaves, keep_graph=True, checking=True)
    chosen = {}
    for name, found in rows.items():
        (exact,) = torch.autograd.grad(outputs, [leaves[name]], seed, retain_graph=True, allow_unused=True)
        if exact is not None and len(found) == len(outputs) and _agrees(found, exact.flatten()):
            chosen[name] = owners[name]
    return Plan(chosen, outputs.shape[1], repeatable, size)


def tape(adapter: AdapterModel, leaves: Mapping[str, Tensor], inputs: Inputs, hooked: Owners) -> tuple[Tensor, Tape]:
    """A forward pass that remembers what went into and came out of every hooked module."""
    taken: Tape = {module: [] for module, _ in hooked.values()}

    def remember(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if args:  # a module called by keyword is not known, and so is not chosen
            taken[module].append((args[0].detach(), output))

    handles = [module.register_forward_hook(remember) for module in taken]
    try:
        return adapter.call(leaves, inputs), taken
    finally:
        for handle in handles:
            handle.remove()


def hook_rows(
    outputs: Tensor,
    seed: Tensor,
    taken: Tape,
    hooked: Owners,
    leaves: Mapping[str, Tensor],
    *,
    keep_graph: bool,
    checking: bool = False,
) -> dict[str, Tensor]:
    """Per-example gradients of (seed · outputs), name -> (rows, size of tensor); none for tensors not reached.

    While ``checking``, a tensor whose rule fails is left out instead of raising.
    """
    calls = [(module, went_in, out) for module, record in taken.items() for went_in, out in record]
    if not calls:
        return {}
    ends = [out for *_, out in calls]
    cotangents = torch.autograd.grad(outputs, ends, seed, retain_graph=keep_graph, allow_unused=True)
    rows: dict[str, Tensor] = {}
    for name, (module, attribute) in hooked.items():
        rule, shape = RULES[type(module)][attribute], leaves[name].shape
        try:
            parts = [
                rule(module, went_in, g, shape).flatten(1)
                for (owner, went_in, _), g in zip(calls, cotangents, strict=True)
                if owner is module and g is not None
            ]
            if parts:
                rows[name] = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        except (RuntimeError, IndexError):
            if not checking:
                raise
    return rows


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


def _owners(adapter: AdapterModel) -> dict[str, tuple[nn.Module, str]]:
    """Trainable tensors that belong, under one name only, to a module with a rule."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in adapter.model.modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, attribute))
    found = {}
    for name in adapter.names:
        owner = owners[id(adapter.model.get_parameter(name))]
        if len(owner) == 1 and owner[0][1] in RULES.get(type(owner[0][0]), {}):
            found[name] = owner[0]
    return found


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
