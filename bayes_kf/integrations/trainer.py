"""transformers' Trainer with a filter in the place of its optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from bayes_kf.inference.config import KalmanConfig, check_config
from bayes_kf.inference.filtering import tempering
from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import DivergenceError, FilterState
from bayes_kf.inference.fitting import mean_step, noise_refit
from bayes_kf.inference.posterior import Posterior
from bayes_kf.inference.predictive.predict import predict
from bayes_kf.inference.predictive.prediction import METHODS
from bayes_kf.inference.saving import pretrained
from bayes_kf.integrations.metrics import calibration_metrics
from bayes_kf.integrations.trainer_callbacks import (
    EpochEnd,
    Epochs,
    NoOptimizer,
    Window,
    check_arguments,
    check_model,
    check_passes,
)
from bayes_kf.models.batch import Inputs, split_batch
from bayes_kf.validation import did_you_mean

SCALE_EXAMPLES = 32  # inputs that the prior's scale is measured on
OPTIMIZERS = ("grad_norm", "learning_rate")  # what Trainer logs about an optimizer, which there is not


class KalmanTrainer(Trainer):
    """A ``transformers.Trainer`` that learns a posterior over the model's trainable tensors instead of weights.

    Collators, evaluation, logging, trackers, callbacks, early stopping and checkpoints are Trainer's own. What differs:

    - Every batch is an update of the filter (:class:`~bayes_kf.KalmanFilter`), and the model has the mean afterwards.
      With ``gradient_accumulation_steps`` each of the batches of a step is an update, linearized where the one before
      left the mean; rates, schedules, weight decay and clipping have no meaning.
    - The first epoch is the filter's. In later ones no example counts twice: the mean alone moves, toward the mode,
      by natural-gradient steps under the covariance that the first left (as ``mean_passes`` of :func:`~bayes_kf.fit`).
      An estimated σ² is estimated again after every epoch.
    - Evaluation predicts with the posterior: "logits" are log predictive probabilities, the loss is their log loss, and
      metrics have :func:`calibration_metrics` besides those of ``compute_metrics``.
    - Checkpoints hold the posterior beside Trainer's own files, and training resumed from one ends with the bits of
      one that was never stopped. The optimizer's files are neither written nor read.

    Training again on the same data set would count it twice and is refused; on another it goes on from the belief.

    Args:
        *args: Trainer's.
        kalman: the settings; by default ``KalmanConfig()`` for one epoch, ``KalmanConfig.dataset()`` for more.
        method: of predictions in evaluation, as :meth:`~bayes_kf.Posterior.predict` takes it.
        num_samples: of predictions in evaluation.
        **kwargs: Trainer's.

    Raises:
        ValueError: for an unknown ``method``, a ``kalman`` that is no KalmanConfig, a reading of a language model
            (``models.language``) as ``model``, which :func:`~bayes_kf.fit` takes, and for arguments that have no
            meaning here: several processes, DeepSpeed or FSDP, label smoothing, an ``optimizer`` or a loss of the
            user's own.

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
        >>> trainer = KalmanTrainer(model, args, train_dataset=data, eval_dataset=data)
        >>> _ = trainer.train()  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        >>> trainer.posterior.state.examples
        8
        >>> folder.cleanup()
    """

    def __init__(
        self,
        *args: Any,
        kalman: KalmanConfig | None = None,
        method: str = "linearized",
        num_samples: int = 64,
        **kwargs: Any,
    ) -> None:
        if method not in METHODS:
            nearest = did_you_mean(method, METHODS) or "."
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}{nearest}")
        if kalman is not None:
            check_config(kalman, "kalman")
        check_model(kwargs.get("model", args[0] if args else None))
        super().__init__(*args, **kwargs)
        check_arguments(self)
        self.kalman = kalman
        self.method, self.num_samples = method, num_samples
        self._filter: KalmanFilter | None = None
        self._belief: FilterState | None = None
        self._learned: object = None  # the data set
        self._draws: torch.Generator | None = None
        self._draws_begun: Tensor | None = None  # the generator's state before an evaluation's first batch
        self._compare_draws = False  # with the linearized model's; of an evaluation's first batch alone
        self._window, self._counter = Window(), Epochs()
        self.add_callback(self._counter)
        self.add_callback(EpochEnd(self._refit_noise))
        self._own_metrics = self.compute_metrics
        self.compute_metrics = self._metrics

    @property
    def posterior(self) -> Posterior:
        """The belief so far.

        Raises:
            ValueError: before anything was learned or loaded.
        """
        if self._filter is None or self._belief is None:
            raise ValueError("`posterior` needs a trainer that has trained or loaded a checkpoint, got a new one.")
        return Posterior(self._filter, self._belief)

    @property
    def _module(self) -> nn.Module:
        assert isinstance(self.model, nn.Module)  # Trainer has seen to it
        return self.model

    # ---- learning ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as Trainer does.

        Raises:
            ValueError: for a data set that was learned already or in part (``resume_from_checkpoint`` goes on with
                one), several epochs of a second one, settings that do not allow for several epochs, and a
                checkpoint that is incomplete or of other settings.
            DivergenceError: as :meth:`~bayes_kf.KalmanFilter.update`; the belief is the one before.
        """
        resumed = kwargs.get("resume_from_checkpoint", args[0] if args else None)
        if self._learned is not None and self._learned is self.train_dataset and not resumed:
            raise ValueError("`train_dataset` must be another one to go on with, got the one that was learned already.")
        self._check_epochs()
        if self._belief is not None and not resumed and self._epochs() > 1:
            raise ValueError(
                f"`num_train_epochs` must be 1 for a second data set, got {self._epochs():g}: later epochs move the "
                "mean toward the mode of that data set alone."
            )
        found = super().train(*args, **kwargs)
        if self._filter is not None and isinstance(self._filter.config.temperature, str):
            tempering.warn_of_mean_alone(self.posterior.temperature)
        return found

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """An update with a batch; its log loss before the update, per example."""
        given, targets = self._split(self._prepare_inputs(inputs))
        if targets is None:
            raise ValueError(f"`train_dataset` must have {self._label_name!r}, got batches of {', '.join(given)}.")
        kf, belief = self._begun(given)
        self._learned = self.train_dataset  # a part of it, should training be stopped
        if self._passes_done() >= 1.0:
            loss = self._move_mean(kf, belief, given, targets)
        else:
            self._belief, info = kf.update(belief, given, targets)
            self._window.add(info)
            loss = float(info.log_loss.double().mean())
        kf.adapter.assign(self._belief.belief.mean)  # type: ignore[union-attr]  # an update sets it
        return torch.tensor(loss / self.current_gradient_accumulation_steps, device=self.args.device)

    def _move_mean(self, kf: KalmanFilter, belief: FilterState, given: Inputs, targets: Tensor) -> float:
        """A batch of a later epoch; its log loss per example before that."""
        check_passes(kf.config)
        done = self._passes_done()
        total = self.state.max_steps * done / self.state.global_step  # epochs in all
        rate = mean_step.RATE * max(0.0, 1.0 - (done - 1.0) / max(total - 1.0, 1e-9))
        after, loss = mean_step.step(kf.config, kf.adapter, belief, given, targets, rate)
        if not bool(torch.isfinite(after.belief.mean).all()):
            raise DivergenceError(belief.step, f"the mean in step {self.state.global_step}", belief)
        self._belief = after
        return loss / len(targets)

    def _refit_noise(self) -> None:
        """An estimated σ² again, at the mean that an epoch of several has left, as ``fit`` does."""
        kf, belief, data = self._filter, self._belief, self.train_dataset
        if kf is None or belief is None or not noise_refit.applies(kf.config):
            return
        if self._epochs() <= 1 or data is None or not hasattr(data, "__len__"):
            return
        with torch.random.fork_rng(devices=[]):  # a loader's iterator draws a number, and later epochs are shuffled
            loader = self.get_eval_dataloader(data)  # in order
            batches = (self._split(self._prepare_inputs(batch)) for batch in loader)
            self._belief = noise_refit.over(kf, belief, batches)

    def _passes_done(self) -> float:
        """Epochs behind; of a stream without a length whole ones alone are known."""
        return max(float(self.state.epoch or 0.0), float(self._counter.epoch))

    def _begun(self, given: Inputs) -> tuple[KalmanFilter, FilterState]:
        """The filter and its belief; the prior at first."""
        if self._filter is None:
            self._filter = KalmanFilter(self._module, self._settings())
        if self._belief is None:
            self._belief = self._filter.init(self._first_inputs(given))
        return self._filter, self._belief

    def _first_inputs(self, given: Inputs) -> Inputs:
        """Inputs to measure the prior's scale on: the data set's first, or those given where it has no order."""
        data: Any = self.train_dataset
        if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            return given
        collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
        batch = collate([data[k] for k in range(min(SCALE_EXAMPLES, len(data)))])
        return self._split(self._prepare_inputs(batch))[0]

    def _settings(self) -> KalmanConfig:
        if self.kalman is not None:
            return self.kalman
        return KalmanConfig.dataset(mean_passes=0) if self._epochs() > 1 else KalmanConfig()

    def _epochs(self) -> float:
        """How often the data are passed over, as far as that is known beforehand."""
        args, data = self.args, self.train_dataset
        if args.max_steps <= 0:
            return args.num_train_epochs
        if data is None or not hasattr(data, "__len__"):
            return 1.0
        return args.max_steps * args.train_batch_size * args.gradient_accumulation_steps / len(data)

    def _check_epochs(self) -> None:
        """That settings allow for later epochs, before the first."""
        if self._epochs() > 1:
            check_passes(self._settings())

    def _split(self, inputs: Mapping[str, Any]) -> tuple[Inputs, Tensor | None]:
        renamed = {"labels" if name == self._label_name else name: value for name, value in inputs.items()}
        return split_batch(renamed)

    @property
    def _label_name(self) -> str:
        return self.label_names[0] if self.label_names else "labels"

    # ---- evaluation ----

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, its draws from one generator: an evaluation repeated has the same numbers, at any batch size.

        They are those of :func:`bayes_kf.evaluate` with the settings' ``seed``.
        """
        if self._filter is not None:
            self._draws = torch.Generator().manual_seed(self._filter.config.seed)
            self._draws_begun, self._compare_draws = self._draws.get_state(), True
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Log loss, log predictive probabilities (the predictive mean for other likelihoods) and labels of a batch."""
        if self._belief is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        given, targets = self._split(self._prepare_inputs(inputs))
        compare, self._compare_draws = self._compare_draws, False
        found = predict(
            self.posterior, given, self.method, self.num_samples, self._draws, targets,
            compare=compare, adapter_draws=self._draws_begun,
        )  # fmt: skip
        loss = None if found.log_prob is None else -found.log_prob.mean()
        if prediction_loss_only:
            return loss, None, None
        classes = self.posterior.config.likelihood == "categorical"
        tiny = torch.finfo(found.mean.dtype).tiny
        return loss, found.mean.clamp_min(tiny).log() if classes else found.mean, targets

    def _metrics(self, prediction: Any, **options: Any) -> dict[str, float]:
        """The user's metrics, and calibration for classifiers."""
        own = {} if self._own_metrics is None else self._own_metrics(prediction, **options)
        config = self.kalman if self._filter is None else self._filter.config
        if config is not None and config.likelihood != "categorical":
            return own
        return calibration_metrics(prediction) | own

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """What Trainer logs, with the stream's scores since it did so before in the place of an optimizer's."""
        kept = {name: value for name, value in logs.items() if name not in OPTIMIZERS}
        if "loss" in kept:
            kept |= self._window.summary()
            if self._filter is not None and self._belief is not None:
                kept["temperature"] = self._filter.temperature(self._belief)
            self._window = Window()
        super().log(kept, start_time)

    # ---- checkpoints ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The posterior and what Trainer saves, as one; the adapter is its mean.

        Raises:
            ValueError: where files that bayes_kf did not write have the names of settings, belief or checksums.
                Files that Trainer writes replace others of their names, as ever, but for a ``README.md``.
        """
        if self._belief is None:
            super()._save(output_dir, state_dict)
            return
        others, save = Path(output_dir or self.args.output_dir or "."), super()._save
        pretrained.save_with(self.posterior, others, lambda folder: save(str(folder), state_dict))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """A posterior, and the model at its mean; only where the checkpoint is complete and has the same settings."""
        folder = Path(resume_from_checkpoint)
        if not (folder / "trainer_state.json").is_file():
            raise ValueError(f"`resume_from_checkpoint` must be complete, got {folder} without trainer_state.json.")
        self._restore(folder)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None  # Trainer asks for it where there is one
        self._restore(Path(best))

    def _restore(self, folder: Path) -> None:
        found = Posterior.from_pretrained(folder, self._module)
        expected = self.kalman or (self._filter.config if self._filter is not None else found.config)
        changed = expected.differences(found.config)
        if changed:
            raise ValueError(f"`kalman` must be as in {folder}, got another {', '.join(changed)}.")
        self._filter, self._belief = found.kf, found.state
        found.adapter.assign(found.mean_vector)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Saves nothing: all state is the posterior's."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads nothing: all state is the posterior's."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """An optimizer whose steps do nothing."""
        if self.optimizer is None:
            self.optimizer = NoOptimizer([p for p in self._module.parameters() if p.requires_grad])
        return self.optimizer
