"""The base class of filters on several processes: the calls of one filter, each process with its own examples."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bayes_kf.distributed.batch_shards import BatchShard, BatchShards
from bayes_kf.inference.config import KalmanConfig, check_config
from bayes_kf.inference.covariance.diagonal import DiagonalGaussian
from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import DIVERGED, DivergenceError, FilterState
from bayes_kf.inference.filtering.update_info import UpdateInfo
from bayes_kf.inference.fitting.checkpointing import SINGLE_PASS
from bayes_kf.inference.posterior import Posterior
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs, to_device
from bayes_kf.processes.process_group import Group


class DistributedFilter(ABC):
    """A filter over the processes of a group; arguments and errors as for :class:`ShardedFilter`."""

    NEEDS_EXAMPLE = True  # whether a process without examples needs one to take part in an update

    def __init__(self, model: nn.Module | AdapterModel, config: KalmanConfig | None = None, group: Any = None) -> None:
        self.group, self.config = Group(group), KalmanConfig() if config is None else config
        check_config(self.config)
        for name, needed in (SINGLE_PASS | {"gradient_penalty": 0.0}).items():
            if getattr(self.config, name) != needed:
                raise ValueError(f"`{name}` must be {needed} on several processes, got {getattr(self.config, name)!r}.")
        self._check_config()
        self.kf = KalmanFilter(model, self.config)
        self.adapter = self.kf.adapter
        mean = self.adapter.vector()
        sums = float(mean.double().sum()), float(mean.double().square().sum())
        names = self.adapter.names, self.adapter.shapes
        self.group.check_equal("`model` and `config`", self.config, *names, *sums, device=mean.device)
        self.batch_shards = BatchShards(self.group, self.adapter, self.NEEDS_EXAMPLE)

    def init(self, inputs: Inputs | None = None) -> FilterState:
        """This process's shard of the prior.

        Args:
            inputs: a batch to measure the scale of the prior on, see :meth:`KalmanFilter.init`. Only those of the first
                process are measured; the other processes may give None.

        Raises:
            ValueError: on the first process, if the prior needs inputs and it has none.
            OtherProcessError: on the other processes, in the same case.
        """
        failure, mean = None, torch.zeros_like(self.adapter.vector())
        variance = torch.zeros_like(mean)
        try:
            if inputs is not None:
                self.batch_shards.remember(to_device(inputs, self.adapter.device))
            if self.group.rank == 0:
                measured = self.kf.prior(inputs)
                if measured is None:
                    raise ValueError("`inputs` must be given on the first process to scale the prior, got None.")
                mean, variance = measured
        except Exception as raised:  # of any kind, or the other processes would wait for this one
            failure = raised
        self.group.raise_together(failure)
        prior = DiagonalGaussian(self.group.all_reduce(mean), self.group.all_reduce(variance))
        return self.kf.init_from_prior(self._own_prior(prior))

    def update(
        self, state: FilterState, inputs: Inputs | None, targets: torch.Tensor | None
    ) -> tuple[FilterState, UpdateInfo]:
        """The state after one global batch, and a report of the update. ``state`` is not changed.

        Args:
            state: this process's shard of the state.
            inputs: this process's examples; None if it has none of this batch.
            targets: their targets.

        Raises:
            ValueError: if the inputs or targets do not fit.
            OtherProcessError: if another process raised an error; the belief is unchanged.
            DivergenceError: on every process, if the update is not finite or a variance is not positive.
        """
        begun = time.perf_counter()
        with self.adapter.full_precision():
            batch = self.batch_shards.check(inputs, targets)
            try:
                after, info = self._update(state, batch)
            except DIVERGED as error:
                raise DivergenceError(state.step, str(error).splitlines()[0], state) from error
        return after, info._replace(seconds=time.perf_counter() - begun)

    def posterior(self, state: FilterState) -> Posterior:
        """The whole posterior, on every process."""
        return Posterior(self.kf, self.gather(state))

    def save_pretrained(self, state: FilterState, folder: str | Path) -> None:
        """Save the whole posterior into ``folder`` from the first process, as :meth:`Posterior.save_pretrained` does.

        Every process returns after the folder is written.

        Raises:
            OSError, ValueError: on the first process, if the folder cannot be written.
            OtherProcessError: on the other processes, in the same case.
        """
        whole, failure = self.posterior(state), None
        if self.group.rank == 0:
            try:
                whole.save_pretrained(folder)
            except (OSError, ValueError) as raised:
                failure = raised
        self.group.raise_together(failure)

    @abstractmethod
    def shard(self, state: FilterState) -> FilterState:
        """This process's shard of a whole state, for example of a saved one."""

    @abstractmethod
    def gather(self, state: FilterState) -> FilterState:
        """The whole state, on every process."""

    @abstractmethod
    def _own_prior(self, prior: DiagonalGaussian) -> DiagonalGaussian:
        """What this process holds of a whole prior."""

    @abstractmethod
    def _check_config(self) -> None:
        """Raise ValueError if this filter does not support the config."""

    @abstractmethod
    def _update(self, state: FilterState, batch: BatchShard) -> tuple[FilterState, UpdateInfo]:
        """The state after a valid global batch, and a report of the update."""
