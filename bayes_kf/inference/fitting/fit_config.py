"""A fit under one config: the filter's pass, then Gauss-Newton passes or mean passes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.filtering.update_info import UpdateInfo
from bayes_kf.inference.fitting.defaults.default_curvature import EXACT_IN_ONE_PASS, default_curvature
from bayes_kf.inference.fitting.defaults.default_likelihood import TEXT, as_text, default_likelihood
from bayes_kf.inference.fitting.divergence import posterior_on_divergence
from bayes_kf.inference.fitting.loader import first_batches, num_batches, scale_inputs
from bayes_kf.inference.fitting.loop import LoopStep, inputs_and_targets
from bayes_kf.inference.fitting.passes import prior_evidence
from bayes_kf.inference.fitting.passes.filter_pass import filter_pass
from bayes_kf.inference.fitting.passes.gauss_newton import gauss_newton_pass, refit_noise_and_mode
from bayes_kf.inference.fitting.passes.mean_pass import mean_pass
from bayes_kf.inference.fitting.passes.noise_refit import ResidualSums
from bayes_kf.inference.fitting.passes.scale_refit import refit_scale
from bayes_kf.inference.fitting.progress import FitHistory, ProgressBar
from bayes_kf.inference.fitting.selection.stream_config_selection import select_on_stream
from bayes_kf.inference.heldout import calibration, latest_examples
from bayes_kf.inference.posterior import Posterior
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import check_inputs, split_batch
from bayes_kf.models.language import LearnedTokens

LATEST = "latest"  # the word for a stream's latest examples as held-out data


class _Data(NamedTuple):
    """The data of a fit and its progress bars.

    Attributes:
        loader: iterated anew in every pass after the first.
        first: the first batches, on which the scale of the prior is measured.
        rest: the batches after these, for the first pass.
        label: the beginning of the text before progress bars.
        progress: whether to show them.
    """

    loader: Iterable[Any]
    first: list[Any]
    rest: Iterator[Any]
    label: str
    progress: bool

    def bar(self, text: str) -> ProgressBar:
        """A progress bar over one pass."""
        return ProgressBar(num_batches(self.loader), f"{self.label}{text}", self.progress)


def fit_config(
    model: nn.Module | AdapterModel,
    loader: Iterable[Any],
    config: KalmanConfig,
    start: str,
    progress: bool,
    label: str = "",
    *,
    choose_defaults: bool = False,
    prior_mean: Tensor | None = None,
    held_out: Iterable[Any] | str | None = None,
) -> Posterior:
    """The posterior under one config; ``model``, ``loader``, ``start`` and errors as for :func:`bayes_kf.fit`.

    Args:
        model: as there.
        loader: as there.
        config: the settings.
        start: as there.
        progress: whether to show progress bars.
        label: the beginning of the text before them.
        choose_defaults: whether to replace the config's likelihood and curvature by the defaults for the targets and
            the number of outputs.
        prior_mean: (n,); None: the model's tensors. Not with ``start`` "trained".
        held_out: as for :func:`bayes_kf.fit`, which calls this function in its second step.
    """
    is_trained = start == "trained"
    _check_held_out(config, held_out)
    gets_size = is_trained and config.temperature == "prequential" and config.tune is None
    if gets_size:
        config = dataclasses.replace(config, temperature=1.0)
    kf = KalmanFilter(model, config)
    _check_passes(kf.config, loader, is_trained)
    batches = iter(loader)
    data = _Data(loader, first_batches(batches), batches, label, progress)
    if not data.first:
        raise ValueError("`loader` must yield at least one batch, got none.")
    if choose_defaults:
        kf = _with_defaults(kf, data.first)
    if held_out == LATEST:
        return _fit_from_prior(kf, data, prior_mean, keeps_latest=True)
    posterior = _fit_trained(kf, data) if is_trained else _fit_from_prior(kf, data, prior_mean)
    posterior = _mean_passes(_gauss_newton_passes(posterior, data), data)
    if held_out is not None and not isinstance(held_out, str):
        return _learn_held_out(posterior, calibration.reiterable(held_out), data)
    is_real = posterior.config.likelihood == "gaussian"  # the evidence is exact if the model is linear
    if gets_size and config.initial_variance is None and not is_real:
        return calibration.with_given_size(posterior, prior_evidence.TRAINED_SIZE)
    return posterior


def _learn_held_out(posterior: Posterior, batches: Iterable[Any], data: _Data) -> Posterior:
    """The posterior at the size and sharpness that held-out batches choose, after an update with each of them.

    σ² stays as they chose it.
    """
    (chosen,) = calibration.calibrate([posterior], [1.0], batches, standard_errors=0.0, stacklevel=6)
    history = FitHistory(posterior.config.likelihood)  # not kept: the series are those of the training examples
    with ProgressBar(num_batches(batches), f"{data.label}the held-out part", data.progress) as bar:
        state = filter_pass(chosen.kf, chosen.state, batches, history, bar)
    return dataclasses.replace(chosen, state=state._replace(noise=chosen.state.noise))


def _check_held_out(config: KalmanConfig, held_out: Iterable[Any] | str | None) -> None:
    """Raise ValueError for settings under which held-out examples have nothing to choose, or no place."""
    if held_out is not None and config.temperature != "prequential":
        raise ValueError(f"`temperature` must be 'prequential' with `held_out`, got {config.temperature}.")
    if held_out == LATEST and config.passes + config.mean_passes > 1:
        raise ValueError(
            "`held_out` 'latest' needs one pass, since later passes learn the latest examples too, got "
            f"{config.passes + config.mean_passes}."
        )


def _check_passes(config: KalmanConfig, loader: Iterable[Any], is_trained: bool) -> None:
    """Raise ValueError for passes that the loader or the start does not allow."""
    if config.passes > 1 and is_trained:
        raise ValueError(f"`passes` must be 1 with `start` 'trained', which holds the mean, got {config.passes}.")
    total = config.passes + config.mean_passes
    if total > 1 and isinstance(loader, Iterator):
        raise ValueError(f"`loader` must allow a new iteration in each of {total} passes, got {type(loader).__name__}.")
    if config.tune is not None and is_trained:
        raise ValueError("`tune` must be None with `start` 'trained', which makes no predictions before its updates.")
    if is_trained and (config.likelihood, config.noise_variance) == ("student_t", "estimated"):
        raise ValueError(
            "`noise_variance` must be a number for `likelihood` 'student_t' with `start` 'trained', got 'estimated'."
        )
    if is_trained and config.initial_variance is None:
        prior_evidence.check_static_prior(config.dynamics_settings)


def _with_defaults(kf: KalmanFilter, batches: list[Any]) -> KalmanFilter:
    """The filter with the default likelihood for the targets, and the curvature for the number of outputs."""
    inputs, _ = inputs_and_targets(batches[0], 0)
    check_inputs(inputs)
    settings = default_likelihood((split_batch(batch)[1] for batch in batches), kf.adapter)
    if settings == TEXT:
        draws = kf.adapter.num_probes if isinstance(kf.adapter, LearnedTokens) else kf.config.curvature_draws
        return KalmanFilter(kf.adapter, as_text(kf.config, draws))
    settings = settings or {"curvature": default_curvature(kf.adapter, inputs, EXACT_IN_ONE_PASS)}
    return KalmanFilter(kf.adapter, dataclasses.replace(kf.config, **settings))


def _fit_from_prior(kf: KalmanFilter, data: _Data, prior_mean: Tensor | None, keeps_latest: bool = False) -> Posterior:
    """The posterior after the first pass, which starts from the prior; with ``tune``, under the best settings.

    With ``keeps_latest`` the latest examples choose its size and its sharpness.
    """
    history = FitHistory(kf.config.likelihood)
    batches, inputs = itertools.chain(data.first, data.rest), scale_inputs(kf, data.first)
    evidence: dict[str, Tensor] = {}
    with data.bar("fit") as bar:
        if kf.config.tune is None:
            state = kf.init(inputs, prior_mean)
        else:
            kf, state, evidence["evidence"] = select_on_stream(kf, batches, inputs, history, bar)
        latest = _Latest(state, batches)
        if keeps_latest:
            state = filter_pass(kf, state, latest, history, bar, callbacks=[latest.add])
        else:
            state = filter_pass(kf, state, batches, history, bar)
    posterior = Posterior(kf, state, history.series() | evidence)
    return latest_examples.calibrate(posterior, latest.examples, stacklevel=6) if keeps_latest else posterior


class _Latest:
    """Batches of a stream, with the latest examples that were learned.

    Attributes:
        examples: those.
    """

    def __init__(self, state: FilterState, batches: Iterable[Any]) -> None:
        self.examples, self._batches, self._present = latest_examples.init(state), batches, None

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            self._present = batch
            yield batch

    def add(self, step: LoopStep[FilterState, UpdateInfo]) -> None:
        """Add the batch that was learned, as a callback of a loop."""
        inputs, _ = split_batch(self._present)
        self.examples = latest_examples.add(self.examples, inputs, step.targets, step.state)


def _fit_trained(kf: KalmanFilter, data: _Data) -> Posterior:
    """The posterior after the first pass, which holds the mean at the trained weights."""
    history, residuals = FitHistory(kf.config.likelihood, trained_on=True), ResidualSums()
    batches, state = itertools.chain(data.first, data.rest), kf.init(scale_inputs(kf, data.first))
    callbacks = [residuals.add_step] if kf.config.likelihood == "gaussian" else []
    with data.bar("fit") as bar:
        state = filter_pass(kf, state, batches, history, bar, hold_mean=True, callbacks=callbacks)
    inputs, _ = inputs_and_targets(data.first[0], 0)
    state, evidence = prior_evidence.fit_prior_and_noise(kf, state, residuals, inputs)
    if kf.config.mean_passes:
        state = prior_evidence.recenter_prior(kf.adapter, state)
    return Posterior(kf, state, history.series() | evidence)


def _gauss_newton_passes(posterior: Posterior, data: _Data) -> Posterior:
    """The posterior after the configured number of passes, the first of which is done."""
    objectives: list[float] = []
    for number in range(2, posterior.config.passes + 1):
        posterior, objective = _gauss_newton_pass(posterior, data, number)
        objectives.append(objective)
    if not objectives:
        return posterior
    state = refit_noise_and_mode(posterior.kf, posterior.state, data.loader)
    history = posterior.history | {"objective": torch.tensor(objectives, dtype=torch.float64)}
    return Posterior(posterior.kf, state, history)


def _gauss_newton_pass(posterior: Posterior, data: _Data, number: int) -> tuple[Posterior, float]:
    """The posterior after one more pass, and the objective at its mean."""
    kf = posterior.kf
    with data.bar(f"pass {number} of {kf.config.passes}") as bar, posterior_on_divergence(lambda _: posterior):
        state, objective = gauss_newton_pass(kf, refit_scale(kf, posterior.state, data.loader), data.loader, bar)
    return Posterior(kf, state, posterior.history), objective


def _mean_passes(posterior: Posterior, data: _Data) -> Posterior:
    """The posterior after the configured number of mean passes."""
    kf, state, history = posterior.kf, posterior.state, posterior.history
    losses: list[float] = []
    for number in range(kf.config.mean_passes):
        with (
            data.bar(f"mean pass {number + 1} of {kf.config.mean_passes}") as bar,
            posterior_on_divergence(lambda before: Posterior(kf, before, history)),
        ):
            state = refit_scale(kf, state, data.loader)
            state, loss = mean_pass(kf, state, data.loader, number, kf.config.mean_passes, bar)
        losses.append(loss)
    if not losses:
        return posterior
    state = refit_scale(kf, state, data.loader)
    return Posterior(kf, state, history | {"fitted_log_loss": torch.tensor(losses, dtype=torch.float64)})
