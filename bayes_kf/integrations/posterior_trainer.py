"""A transformers Trainer that evaluates, saves and loads a posterior."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import Trainer

from bayes_kf.inference.config import KalmanConfig, check_config
from bayes_kf.inference.fitting.reading import TRL_COLUMNS, has_pair_columns
from bayes_kf.inference.mixture.mixture_posterior import MixturePosterior
from bayes_kf.inference.mixture.mixture_prediction import member_generators, predict_mixture
from bayes_kf.inference.posterior import Posterior
from bayes_kf.inference.predictive.predict import predict
from bayes_kf.inference.predictive.prediction import METHODS, Prediction
from bayes_kf.inference.predictive.token_predictions import at_places
from bayes_kf.inference.saving import pretrained
from bayes_kf.integrations.metrics import calibration_metrics
from bayes_kf.integrations.trainer_bank import TrainerBank
from bayes_kf.integrations.trainer_filter import TrainerFilter
from bayes_kf.integrations.whole_batches import WholeBatches
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs, split_batch
from bayes_kf.models.language import PreferencePairs, SupervisedTokens, labels_tokens
from bayes_kf.models.likelihood import ONE_OF_CLASSES
from bayes_kf.models.preference_batch import OF_PAIRS, read_pairs
from bayes_kf.processes import shared_work
from bayes_kf.processes.launched import working_together
from bayes_kf.validation import check_one_of


class PosteriorTrainer(Trainer):
    """The evaluation and the checkpoints of a :class:`~bayes_kf.integrations.KalmanTrainer`; arguments as there."""

    def __init__(
        self,
        *args: Any,
        kalman: KalmanConfig | Sequence[KalmanConfig] | None,
        method: str,
        num_samples: int,
        **kwargs: Any,
    ) -> None:
        check_one_of("method", method, METHODS)
        trained: TrainerFilter | TrainerBank = TrainerFilter()
        if isinstance(kalman, Sequence):
            trained = TrainerBank(kalman)
            kalman = trained.configs[0]  # what the trainer asks of it is the same for all
        elif kalman is not None:
            check_config(kalman, "kalman")
        super().__init__(*args, **kwargs)
        self.kalman = kalman
        self.method, self.num_samples = method, num_samples
        self._trained = trained
        self._draws: list[torch.Generator] | None = None  # one for each member
        self._draws_begun: list[Tensor] | None = None  # their states before the first batch of an evaluation
        self._compare_draws = False  # whether to compare with the linearized model, in that first batch
        self._user_metrics = self.compute_metrics
        self.compute_metrics = self._metrics

    def create_accelerator_and_postprocess(self) -> None:
        """Makes Trainer's Accelerator; on several processes, one that gives every process whole batches."""
        super().create_accelerator_and_postprocess()
        if self.args.world_size > 1 and type(self.accelerator) is Accelerator:
            self.accelerator.__class__ = WholeBatches
            self.accelerator.dataloader_config.dispatch_batches = False  # which would divide them after all
            self.gather_function = self.accelerator.gather_for_metrics

    @property
    def posterior(self) -> Posterior | MixturePosterior:
        """The current posterior; a mixture if there are several settings.

        Raises:
            ValueError: before training and before a checkpoint is loaded.
        """
        return self._trained.posterior

    @property
    def _module(self) -> nn.Module:
        assert isinstance(self.model, nn.Module)  # checked by Trainer
        return self.model

    def _split(self, inputs: Mapping[str, Any]) -> tuple[Inputs, Tensor | None]:
        renamed = {"labels" if name == self._label_name else name: value for name, value in inputs.items()}
        return split_batch(read_pairs(renamed) if self._holds_pairs else renamed)

    @property
    def _holds_pairs(self) -> bool:
        """Whether the data are preference pairs, as TRL's RewardTrainer takes them."""
        return has_pair_columns(self.train_dataset) or has_pair_columns(self.eval_dataset)

    @property
    def _reading(self) -> nn.Module | AdapterModel:
        """The model, read as a reward model if the data are preference pairs."""
        return PreferencePairs(self._module) if self._holds_pairs else self._module

    def _set_signature_columns_if_needed(self) -> None:
        """The columns that are not removed: those of the model, or of preference pairs."""
        if self._signature_columns is None and self._holds_pairs:
            self._signature_columns = [*TRL_COLUMNS, *OF_PAIRS]  # type: ignore[assignment]
        super()._set_signature_columns_if_needed()

    @property
    def _label_name(self) -> str:
        return self.label_names[0] if self.label_names else "labels"

    def _batches(self, data: Any, shuffled: bool = False) -> Iterator[tuple[Inputs, Tensor | None]]:
        """The batches of a data set as the filter takes them, in order, or shuffled with Trainer's seed."""
        with torch.random.fork_rng(devices=[]):  # or the loader would change the order of later epochs
            if shuffled:
                self.train_dataset = data
                torch.manual_seed(self.args.seed)
            loader = self.get_train_dataloader() if shuffled else self.get_eval_dataloader(data)
            for batch in loader:
                yield self._split(self._prepare_inputs(batch))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates as Trainer does, with random numbers that do not depend on the batch size or earlier calls.

        They are those of :func:`bayes_kf.evaluate` with the settings' ``seed``.
        """
        if self._trained.kf is not None:
            seeded = torch.Generator().manual_seed(self._trained.kf.config.seed)
            posterior = self.posterior
            self._draws = [seeded]
            if isinstance(posterior, MixturePosterior):
                self._draws = member_generators(seeded, len(posterior.members))
            self._draws_begun, self._compare_draws = [draws.get_state() for draws in self._draws], True
        with working_together("evaluation_loop"):
            return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Log loss, log predictive probabilities (the predictive mean for other likelihoods) and labels of a batch.

        Text is scored as Trainer scores it, by the model, which has the posterior mean; logits of all tokens are kept
        only for metrics of the user. Labels of tokens have log probabilities (B, T, C), 0 at tokens without a label.
        """
        is_text = self._trained.kf is not None and isinstance(self._trained.kf.adapter, SupervisedTokens)
        if self._trained.state is None or is_text:
            loss_only = prediction_loss_only or (is_text and self._user_metrics is None)
            return super().prediction_step(model, inputs, loss_only, ignore_keys)
        batch, targets = self._split(self._prepare_inputs(inputs))
        shared_work.check_same_batch(batch)
        compare, self._compare_draws = self._compare_draws, False
        prediction = self._predict(batch, targets, compare)
        loss = None if prediction.log_prob is None else -prediction.log_prob.mean()
        if prediction_loss_only:
            return loss, None, None
        likelihood = self.posterior.config.likelihood
        if likelihood not in (*ONE_OF_CLASSES, "tokens"):
            return loss, prediction.mean, targets
        log_probs = prediction.mean.clamp_min(torch.finfo(prediction.mean.dtype).tiny).log()
        if likelihood == "tokens":
            log_probs = at_places(log_probs, batch, targets)
        return loss, log_probs, targets

    def _predict(self, inputs: Inputs, targets: Tensor | None, compare: bool) -> Prediction:
        """The prediction of a batch, with the random numbers of this evaluation."""
        posterior, draws, begun = self.posterior, self._draws, self._draws_begun
        assert draws is not None  # `evaluation_loop` has begun
        assert begun is not None
        if isinstance(posterior, MixturePosterior):
            return predict_mixture(
                posterior.members, posterior.weights, inputs, self.method, self.num_samples, draws, targets,
                compare=compare, adapter_generator_states=begun,
            )  # fmt: skip
        return predict(
            posterior, inputs, self.method, self.num_samples, draws[0], targets,
            compare=compare, adapter_generator_state=begun[0],
        )  # fmt: skip

    def _metrics(self, prediction: Any, **options: Any) -> dict[str, float]:
        """The user's metrics and, for classifiers, the calibration metrics."""
        own = {} if self._user_metrics is None else self._user_metrics(prediction, **options)
        config = self.kalman if self._trained.kf is None else self._trained.kf.config
        outputs = prediction.predictions
        is_text = getattr(outputs[0] if isinstance(outputs, tuple) else outputs, "ndim", 0) == 3  # before training
        if is_text and labels_tokens(self._module):
            return calibration_metrics(prediction) | own
        several = getattr(prediction.label_ids, "ndim", 1) != 1  # also before training, when no likelihood is known
        if is_text or several or (config is not None and config.likelihood not in ONE_OF_CLASSES):
            return own
        return calibration_metrics(prediction) | own

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the posterior and Trainer's files as one; the adapter has the posterior mean.

        Raises:
            ValueError: if the folder has files with the names of the posterior's that bayes_kf did not write. Files
                with the names of Trainer's are replaced, except for a ``README.md``.
        """
        if self._trained.state is None:
            super()._save(output_dir, state_dict)
            return
        folder, save = Path(output_dir or self.args.output_dir or "."), super()._save
        posterior = self.posterior

        def write_others(staged: Path) -> None:
            save(str(staged), state_dict)

        if isinstance(posterior, MixturePosterior):
            pretrained.save_mixture_with(posterior.members, posterior.weights, folder, write_others)
        else:
            pretrained.save_with(posterior, folder, write_others)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the posterior, and give the model its mean."""
        folder = Path(resume_from_checkpoint)
        if not (folder / "trainer_state.json").is_file():
            raise ValueError(f"`resume_from_checkpoint` must be complete, got {folder} without trainer_state.json.")
        self._trained.restore(folder, self._reading, self.kalman)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None  # Trainer calls this only if there is one
        self._trained.restore(Path(best), self._reading, self.kalman)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Saves nothing: the posterior is the whole state."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads nothing: the posterior is the whole state."""
