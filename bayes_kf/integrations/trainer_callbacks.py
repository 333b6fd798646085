"""The callbacks of a KalmanTrainer, its optimizer without effect, and the checks of its arguments."""

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
    """An optimizer whose steps do nothing, since the filter has already moved the mean."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Does nothing."""


class EpochCounter(TrainerCallback):
    """Counts epochs as they begin.

    Attributes:
        epoch: the index of the current epoch, from 0.
    """

    def __init__(self) -> None:
        self.epoch = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start from the epoch of a checkpoint."""
        self.epoch = int(state.epoch or 0) - 1

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the epoch."""
        self.epoch += 1


class EpochEnd(TrainerCallback):
    """Calls a function after every epoch, before its checkpoint and evaluation.

    Args:
        function: to call.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call the function."""
        self._function()


class ScoreWindow:
    """Sums of the scores of the updates since the last log entry."""

    def __init__(self) -> None:
        self._examples = self._correct = self._innovation = self._degrees = 0.0
        self._classes = False

    def add(self, info: UpdateInfo) -> None:
        """Add the scores of an update."""
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
        scores = {"online_accuracy": self._correct / self._examples} if self._classes else {}
        return scores | ({"innovation": self._innovation / self._degrees} if self._degrees else {})


def check_model(model: object) -> None:
    """Raise ValueError for an AdapterModel, which Trainer cannot call."""
    if isinstance(model, AdapterModel):
        raise ValueError(
            f"`model` must be a torch module for KalmanTrainer, got {type(model).__name__}, which is an AdapterModel; "
            "`bayes_kf.fit` takes it."
        )


def check_arguments(trainer: Trainer) -> None:
    """Raise ValueError for arguments of Trainer that a filter does not support."""
    args = trainer.args
    unsupported = {
        "one device in a process": args.n_gpu > 1,
        "no DeepSpeed and no FSDP": trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled,
        "no `label_smoothing_factor`": args.label_smoothing_factor != 0,
        "no `ignore_data_skip`, which would count batches twice": args.ignore_data_skip,
        "no `optimizers`": trainer.optimizer is not None or trainer.lr_scheduler is not None,
        "no `compute_loss_func`": trainer.compute_loss_func is not None,
    }
    for needed, given in unsupported.items():
        if given:
            raise ValueError(f"KalmanTrainer needs {needed}, got other arguments.")


def check_passes(config: KalmanConfig, epochs: str = "num_train_epochs") -> None:
    """Raise ValueError for settings that do not allow a second epoch; ``epochs`` is the argument's name."""
    try:
        dataclasses.replace(config, mean_passes=1)
    except ValueError as error:
        raise ValueError(f"`{epochs}` must be 1 with these settings, got more: {error}") from error
