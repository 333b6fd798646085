"""From a batch to its outputs and their Jacobian, one row per example and output.

The Jacobian of a batch takes m backward passes whatever its size, not B·m: examples do not mix in eval mode, so one
backward pass of output j summed over the batch carries every example's cotangents at once. For tensors that a module
applies in a known way (``RULES``: Linear and Conv2d, hence LoRA's A and B of both) the rows of every example are
products of what went into the module and the cotangent of what came out. Small batches are repeated so that several
outputs share a backward pass. Any other tensor (DoRA magnitudes, norms, packed projections) takes the general path of
one backward pass per example and output. Which tensor takes which path is *measured* on the first batch against
plain autograd, not guessed from names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from bayes_kf.inference.layers import RULES
from bayes_kf.models.adapter import AdapterModel, Inputs, batch_size, evaluating

JACOBIAN_BYTES = 2**28  # predictions for large batches go through in pieces of this size
REPEATED_ROWS = 64  # a batch is repeated up to this many rows so that outputs share a backward pass


class Linearizer:
    """Outputs and their Jacobian at a point, for one :class:`AdapterModel`.

    Example:
        >>> adapter = AdapterModel(nn.Linear(3, 2, bias=False))
        >>> x = torch.tensor([[1.0, 2.0, 3.0]])
        >>> outputs, jacobian = Linearizer(adapter)(adapter.vector(), x)
        >>> jacobian[0]
        tensor([[1., 2., 3., 0., 0., 0.],
                [0., 0., 0., 1., 2., 3.]])
    """

    def __init__(self, adapter: AdapterModel) -> None:
        self.adapter = adapter
        self._hooked: dict[str, tuple[nn.Module, str]] | None = None  # tensor name -> (module, attribute)
        self.num_outputs = 0  # known after the first batch

    def __call__(self, vector: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Raw outputs η and J = ∂η/∂θ at θ = ``vector``.

        Args:
            vector: θ, (n,).
            inputs: a batch of B examples.

        Returns:
            η (B, m) and J (B, m, n), both in the latent dtype, detached.
        """
        with evaluating(self.adapter.model), torch.enable_grad():
            if self._hooked is None:
                self._hooked = self._choose_paths(vector, inputs)
            return self._jacobian(vector, inputs, self._hooked)

    def pieces(self, vector: Tensor, inputs: Inputs) -> Iterator[tuple[slice, Inputs]]:
        """A batch in pieces whose Jacobians stay under ``JACOBIAN_BYTES`` (or of one example), with where they lie."""
        size = batch_size(inputs)
        num_outputs = self.num_outputs or self.adapter.outputs(vector, _rows(inputs, slice(0, 1), size)).shape[1]
        bytes_each = num_outputs * self.adapter.num_parameters * self.adapter.dtype.itemsize
        step = max(1, JACOBIAN_BYTES // bytes_each)
        for start in range(0, size, step):
            where = slice(start, min(start + step, size))
            yield where, _rows(inputs, where, size)

    def paths(self) -> dict[str, str]:
        """Tensor name -> "hooks", "general", or "not yet known" before the first batch."""
        if self._hooked is None:
            return dict.fromkeys(self.adapter.names, "not yet known")
        return {name: "hooks" if name in self._hooked else "general" for name in self.adapter.names}

    def _jacobian(
        self, vector: Tensor, inputs: Inputs, hooked: dict[str, tuple[nn.Module, str]]
    ) -> tuple[Tensor, Tensor]:
        leaves = self.adapter.leaves(vector)
        general = [name for name in self.adapter.names if name not in hooked]
        size = batch_size(inputs)
        chunk = max(1, min(REPEATED_ROWS // size, self.num_outputs)) if not general else 1
        outputs, tapes = self._tape(leaves, _repeat(inputs, size, chunk) if chunk > 1 else inputs, hooked)
        num_outputs = outputs.shape[1]
        jacobian = outputs.new_zeros(size, num_outputs, self.adapter.num_parameters, dtype=self.adapter.dtype)
        slices = self.adapter.slices()
        for start in range(0, num_outputs, chunk):
            stop = min(start + chunk, num_outputs)
            seed = torch.zeros_like(outputs).view(-1, size, num_outputs)
            for offset, j in enumerate(range(start, stop)):
                seed[offset, :, j] = 1.0
            last = stop == num_outputs and not general
            for name, rows in self._hook_rows(outputs, seed.view_as(outputs), tapes, hooked, leaves, last).items():
                rows = rows.view(-1, size, rows.shape[-1])[: stop - start]
                jacobian[:, start:stop, slices[name]] = rows.transpose(0, 1).to(jacobian.dtype)
        if general:
            self._general_rows(outputs, {name: leaves[name] for name in general}, slices, jacobian)
        return outputs[:size].detach().to(self.adapter.dtype), jacobian

    def _tape(
        self, leaves: Mapping[str, Tensor], inputs: Inputs, hooked: Mapping[str, tuple[nn.Module, str]]
    ) -> tuple[Tensor, dict[nn.Module, list[tuple[Tensor, Tensor]]]]:
        """A forward pass that remembers what went into and came out of every hooked module."""
        tapes: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {module: [] for module, _ in hooked.values()}

        def remember(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            tapes[module].append((args[0].detach(), output))

        handles = [module.register_forward_hook(remember) for module in tapes]
        try:
            return self.adapter.call(leaves, inputs), tapes
        finally:
            for handle in handles:
                handle.remove()

    def _hook_rows(
        self,
        outputs: Tensor,
        seed: Tensor,
        tapes: dict[nn.Module, list[tuple[Tensor, Tensor]]],
        hooked: Mapping[str, tuple[nn.Module, str]],
        leaves: Mapping[str, Tensor],
        last: bool,
    ) -> dict[str, Tensor]:
        """Per-example gradients of (seed · outputs) for the hooked tensors, name -> (rows, size of tensor)."""
        calls = [(module, taken, out) for module, tape in tapes.items() for taken, out in tape]
        if not calls:
            return {}
        cotangents = torch.autograd.grad(
            outputs, [out for *_, out in calls], seed, retain_graph=not last, allow_unused=True
        )
        rows: dict[str, Tensor] = {}
        for name, (module, attribute) in hooked.items():
            rule = RULES[type(module)][attribute]
            shape = leaves[name].shape
            parts = [
                rule(module, taken, g, shape).flatten(1)
                for (m, taken, _), g in zip(calls, cotangents, strict=True)
                if m is module and g is not None
            ]
            if parts:
                rows[name] = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        return rows

    @staticmethod
    def _general_rows(
        outputs: Tensor, leaves: Mapping[str, Tensor], slices: Mapping[str, slice], jacobian: Tensor
    ) -> None:
        """One backward pass per example and output, for tensors without a rule; written into ``jacobian``."""
        for b in range(jacobian.shape[0]):
            for j in range(jacobian.shape[1]):
                gradients = torch.autograd.grad(
                    outputs[b, j], list(leaves.values()), retain_graph=True, allow_unused=True
                )
                for name, gradient in zip(leaves, gradients, strict=True):
                    if gradient is not None:
                        jacobian[b, j, slices[name]] = gradient.reshape(-1).to(jacobian.dtype)

    def _choose_paths(self, vector: Tensor, inputs: Inputs) -> dict[str, tuple[nn.Module, str]]:
        """Hooked tensors whose rows, summed against a random cotangent, agree with plain autograd."""
        candidates = _candidates(self.adapter)
        # A is invisible while B is zero: check at a point where every tensor matters.
        generator = torch.Generator(device=vector.device).manual_seed(0)
        noise = torch.randn(vector.shape, generator=generator, dtype=vector.dtype, device=vector.device)
        point = vector + 0.05 * noise
        leaves = self.adapter.leaves(point)
        try:
            outputs, tapes = self._tape(leaves, inputs, candidates)
            self.num_outputs = outputs.shape[1]
            seed = torch.randn(outputs.shape, generator=generator, dtype=torch.float64, device=vector.device).to(
                outputs.dtype
            )
            rows = self._hook_rows(outputs, seed, tapes, candidates, leaves, last=False)
        except (RuntimeError, IndexError, AttributeError):  # a module called in a way that no rule covers
            return {}
        if not candidates:
            return {}
        if any(r.shape[0] != outputs.shape[0] for r in rows.values()):
            rows = {name: r for name, r in rows.items() if r.shape[0] == outputs.shape[0]}
        exact = torch.autograd.grad(outputs, [leaves[name] for name in candidates], seed, allow_unused=True)
        chosen = {}
        for name, gradient in zip(candidates, exact, strict=True):
            if gradient is None or name not in rows:
                continue
            error = (rows[name].sum(0) - gradient.flatten()).norm()
            if error <= 64 * torch.finfo(gradient.dtype).eps ** 0.75 * gradient.norm():
                chosen[name] = candidates[name]
        return chosen


def _candidates(adapter: AdapterModel) -> dict[str, tuple[nn.Module, str]]:
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


def _rows(inputs: Inputs, where: slice, size: int) -> Inputs:
    """Some examples of a batch of ``size``."""
    if isinstance(inputs, Tensor):
        return inputs[where]
    return {k: v[where] if isinstance(v, Tensor) and v.ndim and v.shape[0] == size else v for k, v in inputs.items()}


def _repeat(inputs: Inputs, size: int, times: int) -> Inputs:
    """Inputs with every batched tensor repeated ``times`` times along the batch."""
    if isinstance(inputs, Tensor):
        return inputs.repeat(times, *[1] * (inputs.ndim - 1))
    return {
        k: v.repeat(times, *[1] * (v.ndim - 1)) if isinstance(v, Tensor) and v.ndim and v.shape[0] == size else v
        for k, v in inputs.items()
    }
