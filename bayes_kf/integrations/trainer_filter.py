"""The filter that a KalmanTrainer trains with, and its state."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import DivergenceError, FilterState
from bayes_kf.inference.filtering.update_info import UpdateInfo
from bayes_kf.inference.fitting.passes import mean_pass, scale_refit
from bayes_kf.inference.mixture.mixture_posterior import MixturePosterior
from bayes_kf.inference.posterior import Posterior
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs

CALIBRATED = ("temperature", "softmax_temperature", "tune")  # settings that `Posterior.calibrate` sets


class TrainerFilter:
    """A filter and its state, updated in place by training steps; the model always has the mean.

    Attributes:
        kf: the filter; None before training and before a checkpoint is loaded.
        state: its state; None before training and before a checkpoint is loaded.
        history: series of the posterior, from its last steps.
    """

    def __init__(self) -> None:
        self.kf: KalmanFilter | None = None
        self.state: FilterState | None = None
        self.history: dict[str, Tensor] = {}

    @property
    def posterior(self) -> Posterior:
        """The current posterior.

        Raises:
            ValueError: before training and before a checkpoint is loaded.
        """
        kf, state = self._started()
        return Posterior(kf, state, self.history)

    def replace(self, posterior: Posterior) -> None:
        """Go on from another posterior over the same model, and give the model its mean."""
        self.kf, self.state, self.history = posterior.kf, posterior.state, posterior.history
        posterior.adapter.assign(posterior.mean_vector)

    def start(self, model: nn.Module | AdapterModel, config: KalmanConfig, scale_inputs: Inputs) -> None:
        """Start from the prior, with its scale measured on some inputs."""
        self.kf = KalmanFilter(model, config)
        self.state = self.kf.init(scale_inputs)

    def update(self, inputs: Inputs, targets: Tensor) -> UpdateInfo:
        """Update the filter with a batch; returns the report."""
        kf, state = self._started()
        self.state, info = kf.update(state, inputs, targets)
        kf.adapter.assign(self.state.belief.mean)
        return info

    def move_mean(self, inputs: Inputs, targets: Tensor, step_size: float, step: int) -> float:
        """Move the mean by a natural-gradient step; returns the log loss per example before it, in nats.

        Raises:
            DivergenceError: if the mean is not finite; the state does not change.
        """
        kf, state = self._started()
        after, loss = mean_pass.natural_gradient_step(kf.config, kf.adapter, state, inputs, targets, step_size)
        if not bool(torch.isfinite(after.belief.mean).all()):
            raise DivergenceError(state.step, f"the mean in step {step}", state)
        self.state = after
        kf.adapter.assign(after.belief.mean)
        return loss / len(targets)

    def refit_noise(self, batches: Iterable[Any]) -> None:
        """Refit an estimated σ² to the residuals of some batches."""
        kf, state = self._started()
        self.state = scale_refit.refit_scale(kf, state, batches)

    def restore(self, folder: Path, model: nn.Module | AdapterModel, config: KalmanConfig | None) -> None:
        """Load a posterior that was saved with this config, and give the model its mean.

        Raises:
            ValueError: if the posterior has other settings, or its files are incomplete or damaged.
        """
        saved = load(folder, model)
        if not isinstance(saved, Posterior):
            raise ValueError(
                f"`kalman` must be a list of the settings of the members in {folder}, which is a mixture, got one or "
                "none."
            )
        expected = config or (saved.config if self.kf is None else self.kf.config)
        chosen = CALIBRATED if "size" in saved.history else ()  # by the last steps of a training
        changed = [name for name in expected.differences(saved.config) if name not in chosen]
        if changed:
            raise ValueError(f"`kalman` must be as in {folder}, got another {', '.join(changed)}.")
        self.replace(saved)

    def _started(self) -> tuple[KalmanFilter, FilterState]:
        if self.kf is None or self.state is None:
            raise ValueError("`posterior` needs a trainer that has trained or loaded a checkpoint, got a new one.")
        return self.kf, self.state


def load(folder: Path, model: nn.Module | AdapterModel) -> Posterior | MixturePosterior:
    """The posterior in a folder, over a model or a reading of it."""
    if not isinstance(model, AdapterModel):
        return Posterior.from_pretrained(folder, model)
    return Posterior.from_pretrained(folder, model.model).with_adapter(model)
