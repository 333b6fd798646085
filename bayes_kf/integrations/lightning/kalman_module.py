"""A LightningModule whose training step updates the belief over a model's trainable tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.fitting.defaults.default_likelihood import default_likelihood
from bayes_kf.inference.fitting.loader import SCALE_EXAMPLES
from bayes_kf.inference.fitting.loop import inputs_and_targets
from bayes_kf.inference.fitting.passes.mean_pass import STEP_SIZE
from bayes_kf.inference.posterior import Posterior
from bayes_kf.inference.predictive.predict import METHODS
from bayes_kf.inference.saving.file_names import STATE_FILE
from bayes_kf.inference.saving.pretrained import check_folder
from bayes_kf.integrations.trainer_callbacks import NoOptimizer, check_passes
from bayes_kf.integrations.trainer_filter import TrainerFilter
from bayes_kf.integrations.trainer_held_out import last_steps
from bayes_kf.models.batch import Inputs, split_batch
from bayes_kf.models.peft_adapters.in_use import is_peft
from bayes_kf.processes import shared_work
from bayes_kf.processes.launched import together
from bayes_kf.processes.random_state import use_random_state_of_first
from bayes_kf.validation import check_one_of, check_whole


class KalmanModule(LightningModule):
    """Fits a posterior in Lightning's loop; loaders, loggers, callbacks and devices are Lightning's.

    - The first epoch updates the belief with every batch; further ones move the mean, as ``mean_passes`` of
      :func:`~bayes_kf.fit`. The model always has the mean.
    - With a validation loader, training ends with the size and the sharpness that its examples choose, unless the
      settings give a temperature; so its scores after that are optimistic.
    - ``validate`` and ``test`` log ``log_loss``, and for classes ``accuracy``, of the posterior's predictions.
      ``predict`` returns the tensors of a :class:`~bayes_kf.Prediction` for each batch, by name.
    - On several processes each does its part of every batch, so all get whole batches:
      ``Trainer(use_distributed_sampler=False)``. The result is that of one process, to rounding.
    - With ``checkpoint`` a pass is saved as it goes, and a later call of ``Trainer.fit`` resumes it.

    Args:
        model: with trainable tensors, for batches ``(inputs, targets)``, or mappings with ``labels``.
        kalman: the settings; by default those of ``KalmanTrainer``, with the likelihood of the first targets.
        method: of predictions, see :meth:`~bayes_kf.Posterior.predict`.
        num_samples: of predictions.
        checkpoint: a folder for the posterior, for training of one epoch over batches in the same order; other files in
            it are not changed. None: no checkpoints.
        every: updates between checkpoints.

    Raises:
        ValueError: for an invalid argument. In training, also for a loader that was trained on before, batches that
            differ between processes, or a checkpoint of other settings or batches.
        DivergenceError: in training, as :meth:`~bayes_kf.KalmanFilter.update`.

    Example (docs/how-to/lightning_fit.py, which the tests run)::

        module = KalmanModule(model)
        trainer = lightning.Trainer(max_epochs=2, use_distributed_sampler=False)
        trainer.fit(module, train_loader, validation_loader)
        trainer.test(module, test_loader)
        module.posterior.save_pretrained("my-posterior")
    """

    def __init__(
        self,
        model: nn.Module,
        kalman: KalmanConfig | None = None,
        *,
        method: str = "linearized",
        num_samples: int = 64,
        checkpoint: str | Path | None = None,
        every: int = 100,
    ) -> None:
        super().__init__()
        if kalman is not None and not isinstance(kalman, KalmanConfig):
            raise ValueError(f"`kalman` must be a KalmanConfig or None, got {type(kalman).__name__}.")
        check_one_of("method", method, METHODS)
        check_whole("num_samples", num_samples)
        check_whole("every", every)
        self.automatic_optimization = False
        self.model, self.kalman, self.method, self.num_samples = model, kalman, method, num_samples
        self.checkpoint, self.every = None if checkpoint is None else Path(checkpoint), every
        self._trained = TrainerFilter()
        self._seen: object = None  # the training data of the posterior
        self._to_skip = 0  # batches that an earlier call used

    @property
    def posterior(self) -> Posterior:
        """The current posterior.

        Raises:
            ValueError: before training.
        """
        return self._trained.posterior

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs at the mean."""
        return self.model(*args, **kwargs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """An optimizer whose steps do nothing: the filter is in its place."""
        return NoOptimizer([p for p in self.model.parameters() if p.requires_grad])

    def on_train_start(self) -> None:
        """Check the loader, and resume from the checkpoint."""
        loader: Any = self.trainer.train_dataloader
        epochs = self.trainer.max_epochs or 1
        if isinstance(getattr(loader, "sampler", None), DistributedSampler):
            raise ValueError(
                "`Trainer` must have use_distributed_sampler=False for a KalmanModule, got True; each process does its "
                "part of every batch itself."
            )
        if self._seen is not None and self._seen is getattr(loader, "dataset", loader):
            raise ValueError("the training loader must be a new one to continue training, got the one trained on.")
        if epochs > 1 and self.kalman is not None:
            check_passes(self.kalman)
        if epochs > 1 and (self.checkpoint is not None or self._trained.state is not None):
            given = "a `checkpoint`" if self.checkpoint is not None else "a second loader"
            raise ValueError(f"`max_epochs` must be 1 with {given}, got {epochs}.")
        with together():
            shared_work.check_same_model(self.model, (self.kalman, self.every))
            use_random_state_of_first(loader)
            if self.checkpoint is not None:
                shared_work.done_everywhere(self._resume)
                shared_work.check_same("the posterior in `checkpoint`", self._to_skip)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any] | None:
        """Learn a batch; returns its log loss before, per example, as ``loss``."""
        inputs, targets = inputs_and_targets(batch, batch_idx)
        if batch_idx < self._to_skip:
            return None
        loader = self.trainer.train_dataloader
        with together():
            shared_work.check_same_batch(inputs, targets)
            if self._trained.state is None:
                self._trained.start(self.model, self._settings(targets), self._scale_inputs(inputs))
            self._seen = getattr(loader, "dataset", loader)  # even if training is stopped
            if self.current_epoch:
                loss = self._trained.move_mean(inputs, targets, self._step_size(batch_idx), self.global_step)
            else:
                info = self._trained.update(inputs, targets)
                loss = float(info.log_loss.double().mean())
                if info.correct is not None:
                    self._log("online_accuracy", float(info.correct.double().mean()), len(targets), prog_bar=True)
                if self.checkpoint is not None and self.posterior.state.step % self.every == 0:
                    self._save()
        self._log("online_log_loss", loss, len(targets), prog_bar=True)
        return {"loss": torch.tensor(loss)}

    def on_train_end(self) -> None:
        """Set size and sharpness by the validation examples, if there are any, and save the posterior."""
        if self._trained.state is None:
            return
        with together():
            given = self.kalman is not None and not isinstance(self.kalman.temperature, str)
            held_out: Any = self.trainer.val_dataloaders
            if held_out is not None and not given:
                batches = [split_batch(self.transfer_batch_to_device(b, self.device, 0)) for b in held_out]
                with torch.inference_mode(False), torch.enable_grad():
                    self._trained.replace(last_steps(self.posterior, batches))
            if self.checkpoint is not None:
                self._save()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the scores of a batch of validation examples; nothing before training."""
        if self._trained.state is not None:
            self._score(batch, batch_idx, "val_")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the scores of a batch of test examples."""
        self._score(batch, batch_idx, "test_")

    def predict_step(self, batch: Any, batch_idx: int = 0) -> dict[str, Tensor]:
        """The tensors of the posterior's :class:`~bayes_kf.Prediction` of a batch, by name."""
        with torch.inference_mode(False), torch.enable_grad(), together():
            inputs, _ = split_batch(_normal(batch))
            prediction = self.posterior.predict(inputs, self.method, self.num_samples)
        values = {field.name: getattr(prediction, field.name) for field in dataclasses.fields(prediction)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's own checkpoints get the mean alone, not the frozen base."""
        mean = {f"model.{name}": p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = mean

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to resume from Lightning's own checkpoint, which has no covariance."""
        raise ValueError(
            "`ckpt_path` must be None for a KalmanModule, got a checkpoint of Lightning, which holds the mean alone; "
            "KalmanModule(..., checkpoint=folder) saves and resumes the posterior."
        )

    def _score(self, batch: Any, batch_idx: int, prefix: str) -> None:
        """Log the mean log loss of the predictions of a batch, and their accuracy."""
        with torch.inference_mode(False), torch.enable_grad(), together():
            inputs, targets = inputs_and_targets(_normal(batch), batch_idx)
            prediction = self.posterior.predict(inputs, self.method, self.num_samples, targets=targets)
        assert prediction.log_prob is not None  # there are targets
        self._log(f"{prefix}log_loss", float(-prediction.log_prob.mean()), len(targets))
        if prediction.probs is not None and prediction.probs.ndim == 2 and targets.ndim == 1:
            correct = prediction.probs.argmax(-1) == targets
            self._log(f"{prefix}accuracy", float(correct.double().mean()), len(targets))

    def _log(self, name: str, value: float, size: int, prog_bar: bool = False) -> None:
        self.log(name, value, batch_size=size, prog_bar=prog_bar, sync_dist=False, rank_zero_only=True)

    def _settings(self, targets: Tensor) -> KalmanConfig:
        """The settings, by default with the likelihood of these targets."""
        if self.kalman is not None:
            return self.kalman
        settings = default_likelihood([targets], self.model)
        several = (self.trainer.max_epochs or 1) > 1
        return KalmanConfig.dataset(mean_passes=0, **settings) if several else KalmanConfig(**settings)

    def _scale_inputs(self, batch: Inputs) -> Inputs:
        """Inputs to measure the prior's scale on: the first of the data set, or the batch if the data have no order."""
        loader: Any = self.trainer.train_dataloader
        if not isinstance(loader, DataLoader) or not hasattr(loader.dataset, "__len__") or loader.batch_size is None:
            return batch
        first = loader.collate_fn([loader.dataset[k] for k in range(min(SCALE_EXAMPLES, len(loader.dataset)))])
        return split_batch(self.transfer_batch_to_device(first, self.device, 0))[0]

    def _step_size(self, batch_idx: int) -> float:
        """The size of a step of the mean: from 1 to 0 over the epochs after the first."""
        batches, epochs = float(self.trainer.num_training_batches), self.trainer.max_epochs or 1
        done = self.current_epoch - 1 + (batch_idx / batches if batches < float("inf") else 0.0)
        return STEP_SIZE * max(0.0, 1.0 - done / (epochs - 1))

    def _resume(self) -> None:
        """The posterior of an earlier call, if the folder has one."""
        assert self.checkpoint is not None
        check_folder(self.checkpoint, of_peft=is_peft(self.model))
        if (self.checkpoint / STATE_FILE).is_file():
            self._trained.restore(self.checkpoint, self.model, self.kalman)
            self._to_skip = self.posterior.state.step

    def _save(self) -> None:
        """Save the posterior from the first process; the others wait."""
        assert self.checkpoint is not None
        folder, first = self.checkpoint, shared_work.is_first()
        shared_work.done_everywhere(lambda: self.posterior.save_pretrained(folder) if first else None)


def _normal(batch: Any) -> Any:
    """A batch whose tensors can be used in backward passes, if it was made in inference mode."""
    if isinstance(batch, Tensor):
        return batch.clone() if batch.is_inference() else batch
    if isinstance(batch, Mapping):
        return {name: _normal(value) for name, value in batch.items()}
    return type(batch)(map(_normal, batch)) if isinstance(batch, tuple | list) else batch
