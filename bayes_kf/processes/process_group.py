"""Collectives among the processes of a torch.distributed group."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CPU = torch.device("cpu")


class OtherProcessError(RuntimeError):
    """Another process of the group failed in this step, and its own error says why; or it does not answer."""


class Group:
    """A process group of torch.distributed that counts the bytes this process sends.

    Args:
        group: the process group; by default the one of ``torch.distributed.init_process_group``.

    Attributes:
        all_seconds_worked: that of every process, at the latest :meth:`raise_together`.
        rank: the number of this process.
        size: the number of processes.
        bytes_sent: bytes that this process has sent.
        seconds_worked: that this process spent on its shares, without waiting for others.

    Raises:
        RuntimeError: if torch.distributed is not initialized.
    """

    def __init__(self, group: Any = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("torch.distributed must be initialized first (torchrun, then init_process_group).")
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.bytes_sent, self.seconds_worked = 0, 0.0
        self.all_seconds_worked = [0.0] * self.size
        on_gpus = dist.get_backend(group) == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpus else None

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, with the same bits in each of them."""
        if self.size == 1:
            return tensor
        result = tensor.to(self._device or tensor.device).contiguous().clone()
        with others_answer():
            dist.all_reduce(result, group=self.group)
        self.bytes_sent += 2 * (self.size - 1) * _num_bytes(result) // self.size  # of a ring
        return result.to(tensor.device)

    def of_first(self, tensor: Tensor) -> Tensor:
        """The tensor of the first process; every process gives one of the same shape."""
        result = tensor.to(self._device or tensor.device).clone()
        with others_answer():
            dist.broadcast(result, group_src=0, group=self.group)
        return result.to(tensor.device)

    def raise_together(self, failure: Exception | None) -> None:
        """Return if no process has an error.

        Raises:
            Exception: the error of this process.
            OtherProcessError: if only other processes have one.
        """
        flags = torch.zeros(self.size, 2, dtype=torch.int64)
        flags[self.rank, 0], flags[self.rank, 1] = int(failure is not None), round(1000 * self.seconds_worked)
        flags, milliseconds = self.all_reduce(flags).unbind(1)
        self.all_seconds_worked = [number / 1000 for number in milliseconds.tolist()]
        failed = flags.tolist()
        if failure is not None:
            raise failure
        if any(failed):
            raise OtherProcessError(f"process {failed.index(1)} could not continue; its own error says why")

    def all_gather_int(self, number: int, device: torch.device = CPU) -> list[int]:
        """One integer from every process, in the order of their ranks."""
        numbers = torch.zeros(self.size, dtype=torch.int64, device=device)
        numbers[self.rank] = number
        return self.all_reduce(numbers).tolist()

    def slowest(self) -> tuple[int, float, float]:
        """The process that has worked longest, its seconds, and the mean of the others' seconds."""
        seconds = self.all_seconds_worked
        rank = seconds.index(max(seconds))
        return rank, seconds[rank], (sum(seconds) - seconds[rank]) / max(1, self.size - 1)

    def is_equal(self, *values: Any, device: torch.device = CPU) -> bool:
        """Whether the values have the same ``repr`` in all processes."""
        digest = hashlib.sha256(repr(values).encode()).digest()
        return len(set(self.all_gather_int(int.from_bytes(digest[:6], "big"), device))) == 1

    def numbers_of_first(self, numbers: Sequence[int]) -> list[int]:
        """The whole numbers of the first process; those of the others may be more or fewer."""
        size = int(self.of_first(torch.tensor(len(numbers))))
        given = torch.zeros(size, dtype=torch.int64)
        if self.rank == 0:
            given += torch.tensor(numbers, dtype=torch.int64)
        return self.of_first(given).tolist() if size else []

    def union(self, names: Iterable[str]) -> list[str]:
        """The names that any process gives, sorted."""
        own = torch.tensor(list("\n".join(sorted(set(names))).encode()), dtype=torch.uint8)
        lengths = self.all_gather_int(len(own))
        texts = self.all_gather_rows(own, lengths).split(lengths) if max(lengths) else ()
        return sorted({name for text in texts for name in bytes(text.tolist()).decode().split("\n") if name})

    def check_equal(self, name: str, *values: Any, device: torch.device = CPU) -> None:
        """Check that the values have the same ``repr`` in all processes.

        Raises:
            RuntimeError: in every process, if they differ.
        """
        if not self.is_equal(*values, device=device):
            raise RuntimeError(f"{name} must be the same in every process, got different ones.")

    def all_gather_rows(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
        """The rows of all processes, in the order of their ranks.

        Args:
            tensor: the rows of this process, (B_r, ...).
            sizes: the number of rows of every process.
        """
        if self.size == 1:
            return tensor
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        padded = padded.to(self._device or padded.device)
        gathered = [torch.empty_like(padded) for _ in sizes]
        with others_answer():
            dist.all_gather(gathered, padded, group=self.group)
        self.bytes_sent += (self.size - 1) * _num_bytes(padded)
        return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)]).to(tensor.device)

    def all_to_all(self, parts: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """The tensors that the other processes send to this one, one from each process.

        Args:
            parts: the 1-D tensors that this process sends, one to each process.
            lengths: the lengths of the tensors that this process receives.
        """
        if self.size == 1:
            return list(parts)
        sent = torch.cat(list(parts))
        received = sent.new_empty(sum(lengths))
        with others_answer():
            dist.all_to_all_single(received, sent, list(lengths), [len(part) for part in parts], group=self.group)
        self.bytes_sent += _num_bytes(sent) - _num_bytes(parts[self.rank])
        return list(received.split(list(lengths)))


@contextmanager
def others_answer() -> Iterator[None]:
    """Raise an OtherProcessError where torch.distributed raises an error, most often since another process is gone."""
    try:
        yield
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise OtherProcessError(f"another process has ended, does not answer, or is not in step ({first})") from error


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
