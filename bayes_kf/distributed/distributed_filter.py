"""What filters on several processes share: the same calls as one filter, each process with its own examples."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bayes_kf.distributed.batch_shards import Share, Shares
from bayes_kf.distributed.process_group import Group
from bayes_kf.inference.config import KalmanConfig, check_config
from bayes_kf.inference.covariance.diagonal import DiagonalGaussian
from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import DIVERGED, DivergenceError, FilterState
from bayes_kf.inference.filtering.update_info import UpdateInfo
from bayes_kf.inference.posterior import Posterior
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs, to_device


class FilterOfMany(ABC):
    """A filter over the processes of a group; arguments and errors as for :class:`ShardedFilter`."""

    NEEDS_AN_EXAMPLE = True

    def __init__(self, model: nn.Module | AdapterModel, config: KalmanConfig | None = None, group: Any = None) -> None:
        self.group, self.config = Group(group), KalmanConfig() if config is None else config
        check_config(self.config)
        for name, plain in (("tune", None), ("passes", 1), ("mean_passes", 0), ("gradient_penalty", 0.0)):
            if getattr(self.config, name) != plain:
                raise ValueError(f"`{name}` must be {plain} on several processes, got {getattr(self.config, name)!r}.")
        self._check()
        self.kf = KalmanFilter(model, self.config)
        self.adapter = self.kf.adapter
        mean = self.adapter.vector()
        sums = float(mean.double().sum()), float(mean.double().square().sum())
        names = self.adapter.names, self.adapter.shapes
        self.group.check_alike("`model` and `config`", self.config, *names, *sums, device=mean.device)
        self.shares = Shares(self.group, self.adapter, self.NEEDS_AN_EXAMPLE)
        self._prepare()

    def init(self, inputs: Inputs | None = None) -> FilterState:
        """This process's share of the prior.

        Args:
            inputs: a batch to measure the prior's scale on, see :meth:`KalmanFilter.init`. Those of the first process
                count; the others may give none, or their own.

        Raises:
            ValueError: where the first process gives none and the prior needs them; an OtherProcessError elsewhere.
        """
        failed, state = None, self.kf.init()
        variance = torch.zeros_like(state.prior.variance)
        try:
            if inputs is not None:
                self.shares.remember(to_device(inputs, self.adapter.device))
            if self.group.rank == 0:
                measured = self.kf.init(inputs)
                if not measured.prior_is_scaled:
                    raise ValueError(
                        "`inputs` must be given on the first process: the prior's scale is measured there."
                    )
                variance = measured.prior.variance
        except Exception as error:  # whatever it is, the others must not wait for this process
            failed = error
        self.shares.all_or_none(failed)
        start = DiagonalGaussian(state.prior.mean, self.group.total(variance))
        return self.shard(state._replace(belief=self.kf._prior_belief(start), prior=start, prior_is_scaled=True))

    def update(
        self, state: FilterState, inputs: Inputs | None, targets: torch.Tensor | None
    ) -> tuple[FilterState, UpdateInfo]:
        """The belief after one more global batch, and what was seen on the way.

        Args:
            state: this process's share.
            inputs: this process's examples; None where it has none of this batch.
            targets: theirs.

        Raises:
            ValueError: for inputs or targets that do not fit.
            OtherProcessError: where another process raised an error before anything was learned.
            DivergenceError: on every process, when the update would leave the finite or the positive.
        """
        begun = time.perf_counter()
        with self.adapter.full_precision():
            share = self.shares.take(inputs, targets)
            try:
                after, info = self._update(state, share)
            except DIVERGED as error:
                raise DivergenceError(state.step, str(error).splitlines()[0], state) from error
        return after, info._replace(seconds=time.perf_counter() - begun)

    def posterior(self, state: FilterState) -> Posterior:
        """The whole posterior, on every process."""
        return Posterior(self.kf, self.gather(state))

    def save_pretrained(self, state: FilterState, folder: str | Path) -> None:
        """Write the whole posterior into ``folder``, as :meth:`Posterior.save_pretrained` does, from the first process.

        Every process returns once it is there.

        Raises:
            OSError, ValueError: on the first process, where it cannot be written; on the others an OtherProcessError.
        """
        whole, failed = self.posterior(state), None
        if self.group.rank == 0:
            try:
                whole.save_pretrained(folder)
            except (OSError, ValueError) as error:
                failed = error
        self.shares.all_or_none(failed)

    @abstractmethod
    def shard(self, state: FilterState) -> FilterState:
        """This process's share of a whole state: of one that was saved, say."""

    @abstractmethod
    def gather(self, state: FilterState) -> FilterState:
        """The whole state, on every process."""

    @abstractmethod
    def _check(self) -> None:
        """Whether this form serves the config."""

    @abstractmethod
    def _update(self, state: FilterState, share: Share) -> tuple[FilterState, UpdateInfo]:
        """The state after a batch that fits, and the report."""

    def _prepare(self) -> None:  # noqa: B027 (not every form needs more)
        """What else a form needs."""
