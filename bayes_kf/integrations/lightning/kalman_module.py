"""A LightningModule whose training step updates the belief over a model's trainable tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.fitting.checkpointing import check_single_pass
from bayes_kf.inference.fitting.defaults.default_likelihood import default_likelihood
from bayes_kf.inference.fitting.loader import SCALE_EXAMPLES
from bayes_kf.inference.fitting.loop import inputs_and_targets
from bayes_kf.inference.fitting.passes.mean_pass import STEP_SIZE
from bayes_kf.inference.fitting.passes.scale_refit import can_refit_scale
from bayes_kf.inference.posterior import Posterior
from bayes_kf.inference.predictive.predict import METHODS
from bayes_kf.inference.saving.file_names import STATE_FILE
from bayes_kf.inference.saving.pretrained import check_folder
from bayes_kf.integrations.trainer_callbacks import NoOptimizer, check_passes
from bayes_kf.integrations.trainer_filter import TrainerFilter
from bayes_kf.integrations.trainer_held_out import MOST_EXAMPLES, last_steps
from bayes_kf.models.batch import Inputs, split_batch
from bayes_kf.models.peft_adapters.in_use import is_peft
from bayes_kf.processes import shared_work
from bayes_kf.processes.launched import together
from bayes_kf.processes.random_state import use_random_state_of_first
from bayes_kf.validation import check_one_of, check_whole


class _SaveWhenStopped(Callback):
    """Saves the posterior of a module with a checkpoint at an error or Ctrl-C, which a module is not told of."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        assert isinstance(pl_module, KalmanModule)
        pl_module.save_when_stopped()


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
    - Strategies are a single device, and "ddp" with processes that torchrun or Lightning launches as scripts.

    Args:
        model: with trainable tensors, for batches ``(inputs, targets)``, or mappings with ``labels``.
        kalman: the settings; by default those of ``KalmanTrainer``, with the likelihood of the first targets.
        method: of predictions, see :meth:`~bayes_kf.Posterior.predict`.
        num_samples: of predictions.
        checkpoint: a folder for the posterior, for training of one epoch over batches in the same order; other files in
            it are not changed. None: no checkpoints.
        every: updates between checkpoints.

    Raises:
        ValueError: for an invalid argument. In training, also for a loader that was trained on before, a strategy that
            is not supported, texts whose tokens are learned, or a checkpoint of other settings or batches.
        RuntimeError: for models or batches that differ between processes.
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
        self._to_skip = self._skipped = 0  # batches that an earlier call used, and examples in them so far
        self._saved_step = -1

    @property
    def posterior(self) -> Posterior:
        """The current posterior, on the device of the model.

        Raises:
            ValueError: before training.
        """
        posterior = self._trained.posterior
        if posterior.mean_vector.device == posterior.adapter.device:
            return posterior
        state = _moved(posterior.state, posterior.adapter.device)  # Lightning has moved the model after training
        return Posterior(posterior.kf, state, posterior.history)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs at the mean."""
        return self.model(*args, **kwargs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """An optimizer whose steps do nothing: the filter is in its place."""
        return NoOptimizer([p for p in self.model.parameters() if p.requires_grad])

    def setup(self, stage: str) -> None:
        """Check the strategy; all processes get the random state of the first."""
        strategy = self.trainer.strategy
        if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(
            strategy.launcher, _MultiProcessingLauncher
        ):
            raise ValueError(
                'the strategy of `Trainer` must be one device or "ddp" for a KalmanModule, got '
                f"{type(strategy).__name__}; processes that are forked or spawned lose the posterior."
            )
        with together():
            use_random_state_of_first(())  # before the loaders start

    def on_train_start(self) -> None:
        """Check the loader, and resume from the checkpoint."""
        loader: Any = self.trainer.train_dataloader
        epochs = self.trainer.max_epochs or 0
        if epochs < 1:
            raise ValueError(f"`max_epochs` must be 1 or more for a KalmanModule, got {self.trainer.max_epochs}.")
        _check_sampler(loader)
        if epochs > 1 and self.kalman is not None:
            check_passes(self.kalman, "max_epochs")
        if epochs > 1 and (self.checkpoint is not None or self._trained.state is not None):
            given = "a `checkpoint`" if self.checkpoint is not None else "a second loader"
            raise ValueError(f"`max_epochs` must be 1 with {given}, got {epochs}.")
        if self.checkpoint is not None:
            check_single_pass(self.kalman or KalmanConfig(), loader)
        elif self._seen is not None and self._seen is getattr(loader, "dataset", loader):
            raise ValueError("the training loader must be a new one to continue training, got the one trained on.")
        with together():
            shared_work.check_same_model(self.model, (self.kalman, self.every))
            use_random_state_of_first(loader)
            if self.checkpoint is not None:
                shared_work.done_everywhere(self._resume)
                shared_work.check_same("the posterior in `checkpoint`", self._to_skip)

    def on_validation_start(self) -> None:
        """Check the loaders."""
        _check_sampler(self.trainer.val_dataloaders)

    def on_test_start(self) -> None:
        """Check the loaders."""
        _check_sampler(self.trainer.test_dataloaders)

    def on_predict_start(self) -> None:
        """Check the loaders."""
        _check_sampler(self.trainer.predict_dataloaders)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any] | None:
        """Learn a batch; returns its log loss before, per example, as ``loss``."""
        inputs, targets = inputs_and_targets(batch, batch_idx)
        if batch_idx < self._to_skip:
            self._skipped += len(targets)
            if batch_idx == self._to_skip - 1:
                self._check_skipped()
            return None
        loader = self.trainer.train_dataloader
        with together():
            shared_work.check_same_batch(inputs, targets)
            if self._trained.state is None:
                settings = self._settings(targets)
                if settings.likelihood == "tokens":
                    raise ValueError(
                        "`model` must not learn tokens in a KalmanModule, got a language model and labels that are "
                        "tokens; `bayes_kf.fit` and KalmanTrainer take it."
                    )
                self._trained.start(self.model, settings, self._scale_inputs(inputs))
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
        self._nothing().step()  # does nothing, but Lightning counts it
        self._log("online_log_loss", loss, len(targets), prog_bar=True)
        return {"loss": torch.tensor(loss)}

    def on_train_epoch_end(self) -> None:
        """Refit an estimated σ² at the mean after one of several epochs, as ``fit`` does."""
        if self._skipped and self._trained.state is not None:
            self._check_skipped()  # the loader may have ended before
        kf = self._trained.kf
        if kf is None or not can_refit_scale(kf.config) or (self.trainer.max_epochs or 1) <= 1:
            return
        with together():
            self._trained.refit_noise(self._read([self.trainer.train_dataloader], [self.trainer.num_training_batches]))

    def on_train_end(self) -> None:
        """Save the posterior, and set size and sharpness by the validation examples, if there are any."""
        if self._trained.state is None or self._to_skip == self._trained.state.step:  # nothing was learned now
            return
        with together():
            if self.checkpoint is not None:
                self._save()
            given = self.kalman is not None and not isinstance(self.kalman.temperature, str)
            loaders = _loaders(self.trainer.val_dataloaders)
            if given or not loaders:
                return
            batches, examples = list[Any](), 0
            for inputs, targets in self._read(loaders, self.trainer.num_val_batches):
                batches.append((inputs, targets))
                examples += len(targets)
                if examples >= MOST_EXAMPLES:
                    break
            if batches:
                with torch.inference_mode(False), torch.enable_grad():
                    self._trained.replace(last_steps(self.posterior, batches))
                if self.checkpoint is not None:
                    self._saved_step = -1
                    self._save()

    def configure_callbacks(self) -> list[Callback]:
        """One that saves the posterior if training is stopped."""
        return [_SaveWhenStopped()]

    def save_when_stopped(self) -> None:
        """Save the posterior of a pass that ends early, from the first process; others may be gone."""
        if self.checkpoint is not None and self._trained.state is not None and self.global_rank == 0:
            posterior = self.posterior
            if posterior.state.step > self._saved_step and not posterior.adapter.is_divided:
                posterior.save_pretrained(self.checkpoint)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the scores of a batch of validation examples; nothing before training."""
        if self._trained.state is not None:
            self._score(batch, batch_idx, "val_")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the scores of a batch of test examples."""
        self._score(batch, batch_idx, "test_")

    def predict_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """The tensors of the posterior's :class:`~bayes_kf.Prediction` of a batch, by name."""
        with torch.inference_mode(False), torch.enable_grad(), together():
            inputs, _ = split_batch(_normal(batch))
            shared_work.check_same_batch(inputs)
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
            shared_work.check_same_batch(inputs, targets)
            prediction = self.posterior.predict(inputs, self.method, self.num_samples, targets=targets)
        assert prediction.log_prob is not None  # there are targets
        self._log(f"{prefix}log_loss", float(-prediction.log_prob.mean()), len(targets))
        if prediction.probs is not None and prediction.probs.ndim == 2 and targets.ndim == 1:
            correct = prediction.probs.argmax(-1) == targets
            self._log(f"{prefix}accuracy", float(correct.double().mean()), len(targets))

    def _nothing(self) -> Any:
        """The optimizer that does nothing, as Lightning wraps it."""
        return self.optimizers()

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
        if not isinstance(loader, DataLoader) or not isinstance(loader.sampler, SequentialSampler):
            return batch
        if loader.batch_size is None:
            return batch
        number = -(-SCALE_EXAMPLES // loader.batch_size) * loader.batch_size  # of the first batches, as in `fit`
        data: Any = loader.dataset
        first = loader.collate_fn([data[k] for k in range(min(number, len(data)))])
        return split_batch(self._apply_batch_transfer_handler(first, self.device, 0))[0]

    def _read(self, loaders: Sequence[Any], numbers: Any) -> Iterator[tuple[Any, Tensor]]:
        """Inputs and targets of the first batches of some loaders, on the model's device."""
        numbers = numbers if isinstance(numbers, list | tuple) else [numbers] * len(loaders)
        for loader, number in zip(loaders, numbers, strict=True):
            for k, batch in enumerate(loader):
                if k >= number:
                    break
                yield inputs_and_targets(self._apply_batch_transfer_handler(batch, self.device, 0), k)

    def _step_size(self, batch_idx: int) -> float:
        """The size of a step of the mean: from 1 to 0 over the epochs after the first."""
        batches, epochs = float(self.trainer.num_training_batches), self.trainer.max_epochs or 1
        done = self.current_epoch - 1 + (batch_idx / batches if batches < float("inf") else 0.0)
        return STEP_SIZE * max(0.0, 1.0 - done / (epochs - 1))

    def _resume(self) -> None:
        """The posterior of an earlier call, if the folder has one."""
        assert self.checkpoint is not None
        check_folder(self.checkpoint, of_peft=is_peft(self.model))
        is_saved = (self.checkpoint / STATE_FILE).is_file()
        if not is_saved and self._trained.state is not None:
            raise ValueError(f"`checkpoint` must hold the posterior of this module, got none in {self.checkpoint}.")
        if is_saved:
            self._trained.restore(self.checkpoint, self.model, self.kalman)
        self._to_skip = self._saved_step = self.posterior.state.step if is_saved else 0
        self._skipped = 0

    def _check_skipped(self) -> None:
        """Raise ValueError if the batches that an earlier call used are others."""
        if self._skipped != (examples := self.posterior.state.examples) and self._to_skip == self.posterior.state.step:
            raise ValueError(
                f"the training loader must yield the batches of the pass in {self.checkpoint} with {examples} "
                f"examples, got {self._skipped}."
            )
        self._skipped = 0

    def _save(self) -> None:
        """Save the posterior from the first process, or from all if they divide the base; all wait."""
        assert self.checkpoint is not None
        folder, posterior = self.checkpoint, self.posterior
        if posterior.state.step == self._saved_step:
            return
        saves = shared_work.is_first() or posterior.adapter.is_divided
        shared_work.done_everywhere(lambda: posterior.save_pretrained(folder) if saves else None)
        self._saved_step = posterior.state.step


def _loaders(loaders: Any) -> list[Any]:
    """All loaders of Lightning's one, several or named ones."""
    if loaders is None:
        return []
    if isinstance(loaders, Mapping):
        return list(loaders.values())
    return list(loaders) if isinstance(loaders, list | tuple) else [loaders]


def _check_sampler(loaders: Any) -> None:
    """Raise ValueError if Lightning has divided a loader."""
    if any(isinstance(getattr(loader, "sampler", None), DistributedSampler) for loader in _loaders(loaders)):
        raise ValueError(
            "`Trainer` must have use_distributed_sampler=False for a KalmanModule, got True; each process does its "
            "part of every batch itself."
        )


def _moved(value: Any, device: torch.device) -> Any:
    """A state, or a part of it, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    return type(value)(*(_moved(part, device) for part in value)) if isinstance(value, tuple) else value


def _normal(batch: Any) -> Any:
    """A batch whose tensors can be used in backward passes, if it was made in inference mode."""
    if isinstance(batch, Tensor):
        return batch.clone() if batch.is_inference() else batch
    if isinstance(batch, Mapping):
        return {name: _normal(value) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = map(_normal, batch)
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch
