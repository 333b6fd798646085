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
from torch import Tensor

from bayes_kf.inference.hooks import Plan, choose, hook_rows, repeat, tape
from bayes_kf.models.adapter import AdapterModel, Inputs, batch_size, evaluating

JACOBIAN_BYTES = 2**28  # predictions for large batches go through in pieces of this size
REPEATED_ROWS = 64  # a batch is repeated up to this many rows so that outputs share a backward pass


class Linearizer:
    """Outputs and their Jacobian at a point, for one :class:`AdapterModel`.

    Example:
        >>> adapter = AdapterModel(torch.nn.Linear(3, 2, bias=False))
        >>> x = torch.tensor([[1.0, 2.0, 3.0]])
        >>> outputs, jacobian = Linearizer(adapter)(adapter.vector(), x)
        >>> jacobian[0]
        tensor([[1., 2., 3., 0., 0., 0.],
                [0., 0., 0., 1., 2., 3.]])
    """

    def __init__(self, adapter: AdapterModel) -> None:
        self.adapter = adapter
        self._plan: Plan | None = None

    def __call__(self, vector: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Raw outputs η and J = ∂η/∂θ at θ = ``vector``.

        Args:
            vector: θ, (n,).
            inputs: a batch of B examples.

        Returns:
            η (B, m) and J (B, m, n), both in the latent dtype, detached.
        """
        with evaluating(self.adapter.model), torch.enable_grad():
            if self._plan is None or not self._plan.serves(batch_size(inputs)):
                self._plan = choose(self.adapter, vector, inputs)
            try:
                return self._jacobian(vector, inputs, self._plan)
            except _RowsError:  # a module now sees something else first than examples: check again, once
                self._plan = choose(self.adapter, vector, inputs)
                return self._jacobian(vector, inputs, self._plan)

    @property
    def num_outputs(self) -> int:
        """m, or 0 before the first batch."""
        return self._plan.num_outputs if self._plan else 0

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
        if self._plan is None:
            return dict.fromkeys(self.adapter.names, "not yet known")
        return {name: "hooks" if name in self._plan.hooked else "general" for name in self.adapter.names}

    def _jacobian(self, vector: Tensor, inputs: Inputs, plan: Plan) -> tuple[Tensor, Tensor]:
        leaves, size = self.adapter.leaves(vector), batch_size(inputs)
        general = [name for name in self.adapter.names if name not in plan.hooked]
        chunk = max(1, min(REPEATED_ROWS // size, plan.num_outputs)) if plan.repeatable and not general else 1
        outputs, taken = tape(self.adapter, leaves, repeat(inputs, size, chunk), plan.hooked)
        num_outputs = outputs.shape[1]
        jacobian = outputs.new_zeros(size, num_outputs, self.adapter.num_parameters, dtype=self.adapter.dtype)
        slices = self.adapter.slices()
        for start in range(0, num_outputs, chunk):
            stop = min(start + chunk, num_outputs)
            seed = torch.zeros_like(outputs).view(-1, size, num_outputs)
            for offset, j in enumerate(range(start, stop)):
                seed[offset, :, j] = 1.0
            keep = stop < num_outputs or bool(general)
            for name, rows in hook_rows(
                outputs, seed.view_as(outputs), taken, plan.hooked, leaves, keep_graph=keep
            ).items():
                if len(rows) != len(outputs):
                    raise _RowsError
                part = rows.view(-1, size, rows.shape[-1])[: stop - start]
                jacobian[:, start:stop, slices[name]] = part.transpose(0, 1).to(jacobian.dtype)
        if general:
            self._general_rows(outputs, {name: leaves[name] for name in general}, slices, jacobian)
        return outputs[:size].detach().to(self.adapter.dtype), jacobian

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


class _RowsError(RuntimeError):
    """A hooked module was fed another number of rows than the batch has."""


def _rows(inputs: Inputs, where: slice, size: int) -> Inputs:
    """Some examples of a batch of ``size``."""
    if isinstance(inputs, Tensor):
        return inputs[where]
    return {k: v[where] if isinstance(v, Tensor) and v.ndim and v.shape[0] == size else v for k, v in inputs.items()}
