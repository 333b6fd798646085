"""Accelerate on several processes whose batches are whole: the filter divides the work on each batch itself."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator, DistributedType


class WholeBatches(Accelerator):
    """An Accelerator that gives every process all examples, does not wrap the model, and gathers nothing.

    Trainer asks it for batches, and for the predictions of all processes; the filter, whose processes share their work
    (``processes.shared_work``), has these in every process already.
    """

    @property
    def distributed_type(self) -> DistributedType:
        """NO: nothing is wrapped or divided."""
        return DistributedType.NO

    @property
    def num_processes(self) -> int:
        """1: every process reads all batches."""
        return 1

    @property
    def process_index(self) -> int:
        """0: every process reads all batches."""
        return 0

    @property
    def use_distributed(self) -> bool:
        """False: nothing is divided."""
        return False

    def gather(self, tensor: Any) -> Any:
        """Returns the tensor unchanged: every process has all of it."""
        return tensor

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """Returns the data without what fills the last batch."""
        return input_data if use_gather_object else super().gather_for_metrics(input_data)

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        """Returns the tensor unchanged: every process has all of it."""
        return tensor
