"""The bank of filters that a KalmanTrainer trains with if it has several settings, and its state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import DivergenceError, FilterState
from bayes_kf.inference.filtering.update_info import UpdateInfo
from bayes_kf.inference.fitting.passes import mean_pass, scale_refit
from bayes_kf.inference.fitting.selection.filter_bank import Bank, BankState, check_bank_configs
from bayes_kf.inference.mixture.mixture_posterior import MixturePosterior
from bayes_kf.integrations.trainer_filter import load
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs


class TrainerBank:
    """Several filters and their states, updated in place by training steps; the model has the best one's mean.

    It has the methods of ``TrainerFilter``.

    Args:
        configs: the settings of the members.

    Raises:
        ValueError: if they cannot be those of a :class:`~bayes_kf.Bank`.
    """

    def __init__(self, configs: Sequence[KalmanConfig]) -> None:
        check_bank_configs(configs, "kalman")
        self.configs = tuple(configs)
        self.bank: Bank | None = None
        self.bank_state: BankState | None = None

    @property
    def kf(self) -> KalmanFilter | None:
        """The first filter, whose likelihood and seed are those of all; None before training."""
        return None if self.bank is None else self.bank.filters[0]

    @property
    def state(self) -> FilterState | None:
        """The state of the best member; None before training."""
        if self.bank is None or self.bank_state is None:
            return None
        return self.bank_state.states[self.bank.best(self.bank_state)]

    @property
    def posterior(self) -> MixturePosterior:
        """The current mixture.

        Raises:
            ValueError: before training and before a checkpoint is loaded.
        """
        bank, state = self._started()
        return bank.mixture(state)

    def start(self, model: nn.Module | AdapterModel, config: KalmanConfig, scale_inputs: Inputs) -> None:
        """Start from the priors, with their scales measured on some inputs; ``config`` is not used."""
        self.bank = Bank(model, self.configs)
        self.bank_state = self.bank.init(scale_inputs)

    def update(self, inputs: Inputs, targets: Tensor) -> UpdateInfo:
        """Update all members with a batch; returns the report of their averaged predictions."""
        bank, state = self._started()
        self.bank_state, info = bank.update(state, inputs, targets)
        self._assign_best()
        return info

    def move_mean(self, inputs: Inputs, targets: Tensor, step_size: float, step: int) -> float:
        """Move every member's mean by a natural-gradient step; returns the best member's log loss before it, in nats.

        Raises:
            DivergenceError: if a mean is not finite; the states do not change.
        """
        bank, state = self._started()
        best, moved, losses = bank.best(state), list(state.states), {}
        for number, kf, member in self._present():
            after, losses[number] = mean_pass.natural_gradient_step(
                kf.config, kf.adapter, member, inputs, targets, step_size
            )
            if not bool(torch.isfinite(after.belief.mean).all()):
                raise DivergenceError(member.step, f"the mean of member {number} in step {step}", member)
            moved[number] = after
        self.bank_state = state._replace(states=tuple(moved))
        self._assign_best()
        return losses[best] / len(targets)

    def refit_noise(self, batches: Iterable[Any]) -> None:
        """Refit an estimated σ² of every member to the residuals of some batches."""
        _, state = self._started()
        refitted, kept = list(state.states), list(batches)
        for number, kf, member in self._present():
            refitted[number] = scale_refit.refit_scale(kf, member, kept)
        self.bank_state = state._replace(states=tuple(refitted))

    def restore(self, folder: Path, model: nn.Module | AdapterModel, config: KalmanConfig | None) -> None:
        """Load a mixture whose members were saved with these settings, and give the model the best one's mean.

        Raises:
            ValueError: if the members have other settings, or their files are incomplete or damaged.
        """
        saved = load(folder, model)
        members = list(saved.members) if isinstance(saved, MixturePosterior) else []
        states: list[FilterState | None] = []
        for wanted in self.configs:
            found = next((k for k, member in enumerate(members) if member.config == wanted), None)
            states.append(None if found is None else members.pop(found).state)  # none of a member that diverged
        if members or not any(states):
            got = "a single posterior" if not isinstance(saved, MixturePosterior) else "members of other settings"
            raise ValueError(f"`kalman` must be the settings of the members in {folder}, got {got} there.")
        self.bank = Bank(saved.adapter, self.configs)
        step = max(state.step for state in states if state is not None)
        self.bank_state = self.bank.init_empty()._replace(states=tuple(states), step=step)
        self._assign_best()

    def _present(self) -> list[tuple[int, KalmanFilter, FilterState]]:
        """Number, filter and state of every member that did not diverge."""
        bank, state = self._started()
        pairs = enumerate(zip(bank.filters, state.states, strict=True))
        return [(number, kf, member) for number, (kf, member) in pairs if member is not None]

    def _assign_best(self) -> None:
        bank, state = self._started()
        best = state.states[bank.best(state)]
        assert best is not None  # its evidence is the largest
        bank.adapter.assign(best.belief.mean)

    def _started(self) -> tuple[Bank, BankState]:
        if self.bank is None or self.bank_state is None:
            raise ValueError("`posterior` needs a trainer that has trained or loaded a checkpoint, got a new one.")
        return self.bank, self.bank_state
