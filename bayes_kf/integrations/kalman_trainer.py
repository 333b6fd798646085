"""transformers' Trainer with a Kalman filter in place of its optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filtering import prequential_temperature
from bayes_kf.inference.fitting.defaults.default_likelihood import default_likelihood
from bayes_kf.inference.fitting.loader import SCALE_EXAMPLES
from bayes_kf.inference.fitting.passes.mean_pass import STEP_SIZE
from bayes_kf.inference.fitting.passes.scale_refit import can_refit_scale
from bayes_kf.integrations.posterior_trainer import PosteriorTrainer
from bayes_kf.integrations.trainer_bank import TrainerBank
from bayes_kf.integrations.trainer_callbacks import (
    EpochCounter,
    EpochEnd,
    NoOptimizer,
    ScoreWindow,
    check_arguments,
    check_model,
    check_passes,
)
from bayes_kf.integrations.trainer_filter import TrainerFilter
from bayes_kf.integrations.trainer_held_out import HeldOut, check_fraction, hold_out, last_steps, learn_held_out
from bayes_kf.models.batch import Inputs
from bayes_kf.processes import shared_work
from bayes_kf.processes.launched import working_together

OPTIMIZER_LOGS = ("grad_norm", "learning_rate")  # names that Trainer logs about its optimizer


class KalmanTrainer(PosteriorTrainer):
    """A ``transformers.Trainer`` that trains a posterior over the model's trainable tensors.

    Collators, evaluation, logging, trackers, callbacks, early stopping and checkpoints are those of Trainer. The
    differences:

    - Every batch is an update of the filter (:class:`~bayes_kf.KalmanFilter`); after it the model has the posterior
      mean. With ``gradient_accumulation_steps``, each batch of a step is an update, linearized at the mean after the
      batch before. Learning rates, schedules, weight decay and gradient clipping have no effect.
    - The filter runs in the first epoch. In later epochs only the mean moves, toward the mode, by natural-gradient
      steps under the covariance of the first epoch (as ``mean_passes`` of :func:`~bayes_kf.fit`), so that no example
      counts twice. An estimated σ² is refitted after every epoch.
    - At the end of training, held-out examples set the size of the covariance and the sharpness of the predictions
      (:meth:`~bayes_kf.Posterior.calibrate`), unless ``kalman`` gives a ``temperature``. They are those of
      ``eval_dataset``, if it has labels and is no mapping of several. Otherwise one example in eight of the training
      set is held out, and learned last. ``trainer.held_out`` says which; ``metrics`` of the result have the values.
    - Evaluation predicts with the posterior: "logits" are log predictive probabilities, the loss is their log loss, and
      the metrics are those of :func:`calibration_metrics` and of ``compute_metrics``. The text of a language model is
      scored by the posterior mean, as Trainer does.
    - Preference pairs train a reward model (:class:`~bayes_kf.models.language.PreferencePairs`). They are known by the
      columns ``chosen_ids`` and ``rejected_ids`` of the data set, and need the collator of TRL's ``RewardTrainer``.
    - On several processes (``torchrun``, ``accelerate launch``) every process gets whole batches of
      ``per_device_train_batch_size`` and works on a part of each, so the posterior is that of one process, to rounding.
    - Checkpoints hold the posterior and Trainer's own files. Training resumed from one equals uninterrupted training to
      the bit. Optimizer files are neither saved nor loaded.

    Training twice on one data set would count it twice and raises ValueError; on another data set, training continues
    from the posterior.

    Args:
        *args: of Trainer.
        kalman: the settings; by default ``KalmanConfig()`` for one epoch, ``KalmanConfig.dataset()`` for more, with the
            likelihood of the first labels, as :func:`~bayes_kf.fit` without a config. Several settings, as for a
            :class:`~bayes_kf.Bank`, train a mixture: all members on the same batches, with weights by the evidence of
            their predictions in the first epoch. The model has the mean of the best member.
        method: of predictions in evaluation, see :meth:`~bayes_kf.Posterior.predict`.
        num_samples: of predictions in evaluation.
        held_out_fraction: the share of the training set to hold out without an ``eval_dataset``; 0: no last steps. Not
            used with several settings.
        **kwargs: of Trainer.

    Raises:
        ValueError: if ``method`` is unknown, ``kalman`` is not a KalmanConfig, ``held_out_fraction`` is not in [0, 1),
            or ``model`` is an adapter of a language model (``models.language``), which :func:`~bayes_kf.fit` takes.
            Also for unsupported arguments: DeepSpeed or FSDP, label smoothing, an ``optimizer`` or a
            custom loss.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
        >>> small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=9, **small))
        >>> for name, tensor in model.named_parameters():
        ...     _ = tensor.requires_grad_("classifier" in name)
        >>> data = [{"input_ids": torch.tensor([1, k]), "labels": k % 2} for k in range(8)]
        >>> folder = tempfile.TemporaryDirectory()
        >>> args = TrainingArguments(
        ...     folder.name, num_train_epochs=1, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
        ... )
        >>> trainer = KalmanTrainer(model, args, train_dataset=data[:6], eval_dataset=data[6:])
        >>> _ = trainer.train()  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        >>> trainer.posterior.state.examples, trainer.held_out
        (6, 'eval_dataset')
        >>> folder.cleanup()
    """

    def __init__(
        self,
        *args: Any,
        kalman: KalmanConfig | Sequence[KalmanConfig] | None = None,
        method: str = "linearized",
        num_samples: int = 64,
        held_out_fraction: float = 0.125,
        **kwargs: Any,
    ) -> None:
        check_fraction(held_out_fraction)
        check_model(kwargs.get("model", args[0] if args else None))
        super().__init__(*args, kalman=kalman, method=method, num_samples=num_samples, **kwargs)
        check_arguments(self)
        self.held_out_fraction = held_out_fraction
        self.held_out: str | None = None  # of the last training: "eval_dataset", "train_dataset", or no last steps
        self._seen_dataset: object = None  # the data set of the current posterior
        self._whole_dataset: object = None  # the data set of the present training, with what is held out
        self._window, self._counter = ScoreWindow(), EpochCounter()
        self.add_callback(self._counter)
        self.add_callback(EpochEnd(self._refit_noise))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as Trainer does.

        Raises:
            ValueError: if the posterior was already trained on this data set or a part of it
                (``resume_from_checkpoint`` continues), for several epochs of a second data set, for settings that do
                not allow several epochs, and for a checkpoint that is incomplete or has other settings.
            DivergenceError: as :meth:`~bayes_kf.KalmanFilter.update`; the posterior is the one before that update.
        """
        resumed = kwargs.get("resume_from_checkpoint", args[0] if args else None)
        if self._seen_dataset is not None and self._seen_dataset is self.train_dataset and not resumed:
            raise ValueError("`train_dataset` must be a new one to continue training, got the one already trained on.")
        whole: Any = self.train_dataset
        held_out = self._hold_out()
        self._whole_dataset, self.held_out = whole, None if held_out is None else held_out.name
        try:
            if held_out is not None:
                self.train_dataset = held_out.fitted
            self._check_epochs(bool(resumed))
            with working_together("KalmanTrainer.train") as begins:
                if begins:
                    shared_work.check_same_model(self._module, (self.kalman, self.held_out_fraction))
                output = super().train(*args, **kwargs)
                if held_out is not None and self._trained.state is not None:
                    output.metrics.update(self._last_steps(held_out, whole))
        finally:
            self.train_dataset = whole
        if self._trained.kf is not None and isinstance(self._trained.kf.config.temperature, str):
            prequential_temperature.warn_of_edge(self.posterior.temperature)
        return output

    def _check_epochs(self, resumed: bool) -> None:
        """Raise ValueError for epochs that the settings, or an earlier data set, do not allow."""
        if self._num_epochs() > 1:
            for settings in self._trained.configs if isinstance(self._trained, TrainerBank) else [self._settings()]:
                check_passes(settings)
        if self._trained.state is not None and not resumed and self._num_epochs() > 1:
            raise ValueError(
                f"`num_train_epochs` must be 1 for a second data set, got {self._num_epochs():g}; later epochs move "
                "the mean toward the mode of that data set alone."
            )

    def _hold_out(self) -> HeldOut | None:
        """The held-out examples; None if the settings give a temperature, which is then used, and for a mixture."""
        if isinstance(self._trained, TrainerBank):
            return None
        if self.kalman is not None and not isinstance(self.kalman.temperature, str):
            return None
        evaluation = self.eval_dataset
        return hold_out(self.train_dataset, evaluation, self.held_out_fraction, self._label_name)

    def _last_steps(self, held_out: HeldOut, whole: Any) -> dict[str, float]:
        """Set size and sharpness, and learn what was held out of the training set; returns numbers for the metrics."""
        assert isinstance(self._trained, TrainerFilter)
        posterior = self._trained.posterior
        was_fitted = held_out.name == "train_dataset" and posterior.state.examples == len(held_out.fitted)
        batches = list(self._batches(held_out.examples))
        posterior = last_steps(posterior, batches)
        if held_out.name == "train_dataset":
            moves_mean = was_fitted and self._num_epochs() > 1  # else the best checkpoint was of the first epoch
            everything = self._batches(whole, shuffled=True) if moves_mean else None
            posterior = learn_held_out(posterior, batches, everything)
        self._trained.replace(posterior)
        series = {name: posterior.history[name] for name in ("size", "sharpness") if name in posterior.history}
        return {name: float(values[0]) for name, values in series.items()} | {
            "held_out_examples": len(held_out.examples)
        }

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Update with a batch; returns its log loss before the update, per example."""
        batch, targets = self._split(self._prepare_inputs(inputs))
        if targets is None:
            raise ValueError(f"`train_dataset` must have {self._label_name!r}, got batches of {', '.join(batch)}.")
        shared_work.check_same_batch((batch, targets))
        if self._trained.state is None:
            self._trained.start(self._reading, self._settings(targets), self._scale_inputs(batch))
        self._seen_dataset = self._whole_dataset  # even if training is stopped
        done = self._epochs_done()
        if done >= 1.0:
            check_passes(self.posterior.config)
            total = self.state.max_steps * done / self.state.global_step  # the number of epochs
            step_size = STEP_SIZE * max(0.0, 1.0 - (done - 1.0) / max(total - 1.0, 1e-9))
            loss = self._trained.move_mean(batch, targets, step_size, self.state.global_step)
        else:
            info = self._trained.update(batch, targets)
            self._window.add(info)
            loss = float(info.log_loss.double().mean())
        return torch.tensor(loss / self.current_gradient_accumulation_steps, device=self.args.device)

    def _refit_noise(self) -> None:
        """Refit an estimated σ² at the mean after one of several epochs, as ``fit`` does."""
        kf, data = self._trained.kf, self.train_dataset
        if kf is None or not can_refit_scale(kf.config) or self._num_epochs() <= 1:
            return
        if data is None or not hasattr(data, "__len__"):
            return
        self._trained.refit_noise(self._batches(data))

    def _epochs_done(self) -> float:
        """The number of epochs so far; of a stream without a length, the whole ones."""
        return max(float(self.state.epoch or 0.0), float(self._counter.epoch))

    def _num_epochs(self) -> float:
        """The number of epochs of this training, as far as it is known beforehand."""
        args, data = self.args, self.train_dataset
        if args.max_steps <= 0:
            return args.num_train_epochs
        if data is None or not hasattr(data, "__len__"):
            return 1.0
        return args.max_steps * args.train_batch_size * args.gradient_accumulation_steps / len(data)

    def _scale_inputs(self, batch: Inputs) -> Inputs:
        """Inputs to measure the prior's scale on: the first of the data set, or the batch if the data have no order."""
        data: Any = self.train_dataset
        if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            return batch
        collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
        first = collate([data[k] for k in range(min(SCALE_EXAMPLES, len(data)))])
        return self._split(self._prepare_inputs(first))[0]

    def _settings(self, targets: Tensor | None = None) -> KalmanConfig:
        """The settings; by default with the likelihood of the first targets, if they are known."""
        if self.kalman is not None:
            return self.kalman
        settings = {} if targets is None else default_likelihood([targets], self._reading)
        return KalmanConfig.dataset(mean_passes=0, **settings) if self._num_epochs() > 1 else KalmanConfig(**settings)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs as Trainer does, with the scores of the updates since the last entry in place of the optimizer's."""
        logs = {name: value for name, value in logs.items() if name not in OPTIMIZER_LOGS}
        if "loss" in logs:
            logs |= self._window.summary()
            if self._trained.state is not None:
                logs["temperature"] = self.posterior.temperature
            self._window = ScoreWindow()
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """An optimizer whose steps do nothing."""
        if self.optimizer is None:
            self.optimizer = NoOptimizer([p for p in self._module.parameters() if p.requires_grad])
        return self.optimizer
