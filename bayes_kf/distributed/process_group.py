"""What processes tell each other: sums, rows that each has some of, and columns for rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class OtherProcessError(RuntimeError):
    """Another process of the group could not go on with this step; its own error says why."""


class Group:
    """A process group of torch.distributed, and the bytes that this process sent.

    Args:
        group: the process group; by default the one of ``torch.distributed.init_process_group``.

    Raises:
        RuntimeError: where torch.distributed was not initialized.
    """

    def __init__(self, group: Any = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("torch.distributed must be initialized first (torchrun, then init_process_group).")
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.bytes_sent = 0
        on_gpus = dist.get_backend(group) == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpus else None

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over processes, the same bits in each."""
        if self.size == 1:
            return tensor
        found = tensor.to(self._device or tensor.device).contiguous().clone()
        dist.all_reduce(found, group=self.group)
        self.bytes_sent += 2 * (self.size - 1) * _bytes(found) // self.size  # of a ring
        return found.to(tensor.device)

    def numbers(self, number: int, device: torch.device) -> list[int]:
        """An integer of every process."""
        found = torch.zeros(self.size, dtype=torch.int64, device=device)
        found[self.rank] = number
        return self.total(found).tolist()

    def check_alike(self, what: str, *parts: Any, device: torch.device) -> None:
        """That something reads the same in every process.

        Raises:
            RuntimeError: in all of them, where it does not.
        """
        digest = hashlib.sha256(repr(parts).encode()).digest()
        if len(set(self.numbers(int.from_bytes(digest[:6], "big"), device))) > 1:
            raise RuntimeError(f"{what} must be the same in every process, and is not.")

    def rows(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
        """Rows of all processes, in their order.

        Args:
            tensor: this process's, (B_r, ...).
            sizes: how many rows each process has.
        """
        if self.size == 1:
            return tensor
        most = max(sizes)
        padded = tensor.new_zeros(most, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded, group=self.group)
        self.bytes_sent += (self.size - 1) * _bytes(padded)
        return torch.cat([part[:size] for part, size in zip(found, sizes, strict=True)])

    def exchange(self, parts: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """A flat tensor for every process against one from every process.

        Args:
            parts: for each process, 1-d.
            lengths: of what each process sends to this one.
        """
        if self.size == 1:
            return list(parts)
        sent = torch.cat(list(parts))
        received = sent.new_empty(sum(lengths))
        dist.all_to_all_single(received, sent, list(lengths), [len(part) for part in parts], group=self.group)
        self.bytes_sent += _bytes(sent) - _bytes(parts[self.rank])
        return list(received.split(list(lengths)))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
