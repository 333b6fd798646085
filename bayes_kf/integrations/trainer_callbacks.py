"""What KalmanTrainer is made of besides a Trainer: no optimizer, a count of epochs, sums of scores, checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filtering.update_info import UpdateInfo
from bayes_kf.models.adapter import AdapterModel


class NoOptimizer(torch.optim.Optimizer):
    """In the optimizer's place: its steps do nothing, for the filter has moved the mean already."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Does nothing."""


class Epochs(TrainerCallback):
    """Counts epochs as they begin.

    Attributes:
        epoch: the one that is running, from 0.
    """

    def __init__(self) -> None:
        self.epoch = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start from where a checkpoint was."""
        self.epoch = int(state.epoch or 0) - 1

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts the epoch that begins."""
        self.epoch += 1


class EpochEnd(TrainerCallback):
    """Calls a function after every epoch, before its checkpoint and evaluation.

    Args:
        function: to call.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call it."""
        self._function()


class Window:
    """Sums of the scores of updates, for logging."""

    def __init__(self) -> None:
        self._examples = self._correct = self._innovation = self._degrees = 0.0
        self._classes = False

    def add(self, info: UpdateInfo) -> None:
        """Adds the scores of an update."""
        self._examples += len(info.log_loss)
        self._innovation += info.innovation
        self._degrees += info.degrees_of_freedom
        if info.correct is not None:
            self._classes = True
            self._correct += float(info.correct.sum())

    def summary(self) -> dict[str, float]:
        """``online_accuracy``, of predictions before their update, and ``innovation``, 1 for a consistent filter."""
        if not self._examples:
            return {}
        found = {"online_accuracy": self._correct / self._examples} if self._classes else {}
        return found | ({"innovation": self._innovation / self._degrees} if self._degrees else {})


def check_model(model: object) -> None:
    """Raise ValueError for a reading of a language model, which Trainer cannot call."""
    if isinstance(model, AdapterModel):
        raise ValueError(
            f"`model` must be a torch module for KalmanTrainer, got {type(model).__name__}, a reading of one; "
            "`bayes_kf.fit` takes it."
        )


def check_arguments(trainer: Trainer) -> None:
    """Raise ValueError for what a filter has no use for."""
    args = trainer.args
    wrong = {
        "one process and one device": args.world_size > 1 or args.n_gpu > 1,
        "no DeepSpeed and no FSDP": trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled,
        "no `label_smoothing_factor`": args.label_smoothing_factor != 0,
        "no `ignore_data_skip`, which would count batches twice": args.ignore_data_skip,
        "no `optimizers`": trainer.optimizer is not None or trainer.lr_scheduler is not None,
        "no `compute_loss_func`": trainer.compute_loss_func is not None,
    }
    for wanted, found in wrong.items():
        if found:
            raise ValueError(f"KalmanTrainer needs {wanted}, got that.")


def check_passes(config: KalmanConfig) -> None:
    """Raise ValueError for settings under which a second epoch would count data twice."""
    try:
        dataclasses.replace(config, mean_passes=1)
    except ValueError as error:
        raise ValueError(f"`num_train_epochs` must be 1 with these settings, got more: {error}") from error
