"""A batch: inputs, targets and the number of examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = Tensor | Mapping[str, Any]

IGNORED = -100  # label of a token that is not a target, as in transformers


@dataclass(frozen=True, eq=False)
class Batch:
    """Inputs of some examples, with their targets where they have any.

    Attributes:
        inputs: a tensor (B, ...), the model's only argument, or a mapping of its keyword arguments.
        targets: (B,) class labels or (B, m) numbers; None for inputs alone.
        size: B.

    Example:
        >>> batch = Batch.of(torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 1]))
        >>> batch.size, [part.targets.tolist() for part in batch.chunks(2)]
        (3, [[0, 1], [1]])
    """

    inputs: Inputs
    targets: Tensor | None
    size: int

    @classmethod
    def of(cls, inputs: Inputs | Batch, targets: Tensor | None = None) -> Batch:
        """A batch of these inputs and targets; one that is a batch already is returned as it is."""
        return inputs if isinstance(inputs, Batch) else cls(inputs, targets, batch_size(inputs))

    @classmethod
    def checked(cls, inputs: Inputs, targets: Tensor | None = None, device: torch.device | None = None) -> Batch:
        """A batch whose inputs are finite, on ``device``.

        Args:
            inputs: as for the class.
            targets: as for the class.
            device: where the tensors go; None leaves them where they are.

        Raises:
            ValueError: if the batch is empty, or a floating-point input holds NaN or infinity.
        """
        size = check_inputs(inputs)
        if device is None:
            return cls(inputs, targets, size)
        return cls(to_device(inputs, device), None if targets is None else targets.to(device), size)

    @classmethod
    def labelled(cls, inputs: Inputs, targets: Tensor, device: torch.device) -> Batch:
        """As :meth:`checked`, for batches that must have targets.

        Raises:
            ValueError: if the inputs are not finite, the batch is empty, or the targets are not a tensor.
        """
        size = check_inputs(inputs)
        if not isinstance(targets, Tensor):
            raise ValueError(f"`targets` must be a tensor, got {type(targets).__name__}.")
        return cls(to_device(inputs, device), targets.to(device), size)

    @property
    def device(self) -> torch.device:
        """The device of the first tensor among the inputs."""
        tensors = self.inputs.values() if isinstance(self.inputs, Mapping) else [self.inputs]
        return next(tensor.device for tensor in tensors if isinstance(tensor, Tensor))

    @property
    def required_targets(self) -> Tensor:
        """The targets of a batch that must have them."""
        if self.targets is None:
            raise ValueError("`targets` must be given, got None.")
        return self.targets

    def __getitem__(self, which: slice | Tensor) -> Batch:
        """The examples of a slice, or with these indices (views for a slice)."""
        if isinstance(which, slice) and which.indices(self.size) == (0, self.size, 1):
            return self
        inputs, targets = some_examples(self.inputs, which, self.size), self.targets
        size = len(which) if isinstance(which, Tensor) else len(range(*which.indices(self.size)))
        return Batch(inputs, None if targets is None else targets[which], size)

    def slices(self, size: int) -> list[slice]:
        """The ranges of examples of :meth:`chunks`."""
        return [slice(start, min(start + size, self.size)) for start in range(0, self.size, size)]

    def chunks(self, size: int) -> Iterator[Batch]:
        """Batches of ``size`` consecutive examples; the last one may have fewer."""
        return map(self.__getitem__, self.slices(size))

    def with_targets(self, targets: Tensor) -> Batch:
        """The batch with other targets, as a likelihood's ``check`` returns them."""
        return Batch(self.inputs, targets, self.size)

    def to(self, device: torch.device) -> Batch:
        """The batch with every tensor on ``device``."""
        targets = None if self.targets is None else self.targets.to(device)
        return Batch(to_device(self.inputs, device), targets, self.size)


def split_batch(batch: Any) -> tuple[Inputs, Tensor | None]:
    """The inputs and targets of a loader's batch; the targets are None if the batch has none.

    Labels that are tokens of the ``input_ids``, as language models learn them, stay among the inputs too.

    Args:
        batch: ``(inputs, targets)``, a mapping with or without ``labels``, or a tensor of inputs alone.

    Raises:
        ValueError: for anything else.

    Example:
        >>> inputs, targets = split_batch({"input_ids": torch.ones(2, 3), "labels": torch.tensor([0, 1])})
        >>> sorted(inputs), targets.tolist()
        (['input_ids'], [0, 1])
    """
    if isinstance(batch, Mapping):
        labels = batch.get("labels")
        if _are_tokens(labels, batch.get("input_ids")):
            return dict(batch), labels
        return {k: v for k, v in batch.items() if k != "labels"}, labels
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[0], Tensor | Mapping):
        return batch[0], batch[1]
    if isinstance(batch, tuple | list) and len(batch) == 1:
        return split_batch(batch[0])
    raise ValueError(
        f"`batch` must be (inputs, targets) or a mapping with `labels`, got {type(batch).__name__}"
        f"{f' of {len(batch)} parts' if isinstance(batch, tuple | list) else ''}."
    )


def join_targets(parts: Sequence[Tensor]) -> Tensor:
    """Targets of several batches as one; labels of tokens (B, T) are filled with −100 to the widest T."""
    if parts[0].ndim == 2 and len({part.shape[1] for part in parts}) > 1 and not parts[0].is_floating_point():
        widest = max(part.shape[1] for part in parts)
        parts = [torch.nn.functional.pad(part, (0, widest - part.shape[1]), value=IGNORED) for part in parts]
    return torch.cat(list(parts))


def _are_tokens(labels: Any, ids: Any) -> bool:
    """Whether labels are tokens, (B, T), beside ``input_ids``."""
    return (
        isinstance(labels, Tensor)
        and isinstance(ids, Tensor)
        and labels.ndim == 2
        and labels.shape == ids.shape
        and not labels.is_floating_point()
    )


def batch_size(inputs: Inputs) -> int:
    """Number of examples: the most frequent first dimension of the tensors, the largest among equally frequent ones.

    Raises:
        ValueError: if no tensor has a dimension.

    Example:
        >>> batch_size({"position_ids": torch.zeros(1, 5), "input_ids": torch.zeros(4, 5)})
        4
    """
    if isinstance(inputs, Tensor) and inputs.ndim:
        return inputs.shape[0]
    counts: dict[int, int] = {}
    for value in inputs.values() if isinstance(inputs, Mapping) else ():
        if isinstance(value, Tensor) and value.ndim:
            counts[value.shape[0]] = counts.get(value.shape[0], 0) + 1
    if not counts:
        raise ValueError("`inputs` must hold a tensor with a batch dimension, got none.")
    most = max(counts.values())
    return max([size for size, count in counts.items() if count == most])


def some_examples(inputs: Inputs, which: slice | Tensor, size: int) -> Inputs:
    """The examples of a slice, or with these indices, from inputs of ``size`` examples."""
    if isinstance(inputs, Tensor):
        return inputs[which]
    return {k: v[which] if isinstance(v, Tensor) and v.ndim and v.shape[0] == size else v for k, v in inputs.items()}


def check_inputs(inputs: Inputs) -> int:
    """The number of examples of inputs that are finite and not empty.

    Raises:
        ValueError: if the batch is empty, or a floating-point input holds NaN or infinity.
    """
    for name, tensor in inputs.items() if isinstance(inputs, Mapping) else [("inputs", inputs)]:
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(f"`{name}` must be finite, got {bad} NaN or infinite values out of {tensor.numel()}.")
    size = batch_size(inputs)
    if size == 0:
        raise ValueError("`inputs` must hold at least one example, got an empty batch.")
    return size


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """Inputs with every tensor on ``device``."""
    if isinstance(inputs, Mapping):
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    return inputs.to(device)
