"""``fit``: from a model and a data loader to a posterior, under one config, the best of several, or without one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from torch import nn

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filtering import prequential_temperature
from bayes_kf.inference.filtering.state import DivergenceError
from bayes_kf.inference.fitting.checkpointing import fit_with_checkpoints
from bayes_kf.inference.fitting.defaults.default_likelihood import for_reading
from bayes_kf.inference.fitting.divergence import posterior_on_divergence
from bayes_kf.inference.fitting.fit_config import LATEST, fit_config
from bayes_kf.inference.fitting.fitting_together import fitting_together
from bayes_kf.inference.fitting.loader import num_batches
from bayes_kf.inference.fitting.mixture_fit import MEMBERS, fit_default_mixture
from bayes_kf.inference.fitting.passes.filter_pass import filter_pass
from bayes_kf.inference.fitting.passes.mean_pass import mean_pass
from bayes_kf.inference.fitting.progress import FitHistory, ProgressBar, shows_progress
from bayes_kf.inference.fitting.reading import read_data, read_loader
from bayes_kf.inference.fitting.regression.examples import holds_real_targets, holds_text
from bayes_kf.inference.fitting.regression.regression_fit import fit_regression
from bayes_kf.inference.fitting.regression.regression_mixture import fit_regression_mixture
from bayes_kf.inference.fitting.selection import heldout_config_selection
from bayes_kf.inference.fitting.selection.heldout_config_selection import Split
from bayes_kf.inference.mixture.mixture_posterior import MixturePosterior
from bayes_kf.inference.posterior import Posterior
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.language import LearnedTokens
from bayes_kf.validation import check_one_of

STARTS = ("prior", "trained")


@overload
def fit(
    model: nn.Module | AdapterModel,
    loader: Iterable[Any],
    config: KalmanConfig | Sequence[KalmanConfig],
    *,
    start: str = "prior",
    held_out: Iterable[Any] | str | None = None,
    checkpoint: str | Path | None = None,
    every: int = 100,
    progress: bool | None = None,
) -> Posterior: ...
@overload
def fit(
    model: nn.Module | AdapterModel,
    loader: Iterable[Any],
    config: None = None,
    *,
    start: str = "prior",
    held_out: Iterable[Any] | str | None = None,
    checkpoint: str | Path | None = None,
    every: int = 100,
    progress: bool | None = None,
) -> Posterior | MixturePosterior: ...
def fit(
    model: nn.Module | AdapterModel,
    loader: Iterable[Any],
    config: KalmanConfig | Sequence[KalmanConfig] | None = None,
    *,
    start: str = "prior",
    held_out: Iterable[Any] | str | None = None,
    checkpoint: str | Path | None = None,
    every: int = 100,
    progress: bool | None = None,
) -> Posterior | MixturePosterior:
    """The posterior over a model's trainable tensors given a loader's examples.

    Under one config it is that of one pass over the loader, or as many as the config asks for.

    Under ``torchrun`` or ``accelerate launch`` every process makes the same call with the same model and the whole
    loader. Each takes a part of every batch, and all get the posterior of one process, to rounding.

    Args:
        model: a PEFT model, any module with trainable tensors, or an adapter of a language model (``models.language``);
            its weights are not changed.
        loader: batches ``(inputs, targets)`` or mappings with ``labels``. Preference pairs
            (``models.language.PreferencePairs``) need no labels.
        config: the settings.

            Several configs are candidates: each is fitted to seven eighths of the data, the rest chooses the best,
            its size and its sharpness, and the best is then updated with the rest.

            None: if the loader can be split (a DataLoader over a data set, or a list of at least eight batches), the
            result for class labels is a mixture of two posteriors (:func:`fit_mixture`), a ``MixturePosterior`` whose
            ``best`` is one of them. For tokens (``labels`` of the shape of ``input_ids``) it is one posterior, fitted
            as a member of such a mixture is (``models.language.SupervisedTokens``). For float targets it is one
            posterior whose mean is moved by up to 100 passes, while the prior's scales and the noise variance maximize
            the evidence (``fitting.regression.regression_fit``). If the loader cannot be split, ``fit`` makes one pass
            with ``KalmanConfig.stream()``. With ``start`` "trained" or a ``checkpoint``, it uses ``KalmanConfig()``.
            The targets decide the likelihood: integers (B,) are class labels and (B, T) tokens, floats are real numbers
            with Gaussian noise of an estimated variance, bools are answers ("bernoulli"), as are all targets of a model
            whose own config has the ``problem_type`` "multi_label_classification". A config is used as it is, with its
            own likelihood.
        start: "prior": the model's tensors are the prior mean. "trained": the model's tensors, trained by any method,
            are the posterior mean. The pass then estimates the covariance of the model linearized there (a Laplace
            approximation). The prior width maximizes the Laplace evidence unless ``initial_variance`` is given; since
            that width is too large as a rule, its precision is multiplied by a size of 10, except under a Gaussian
            likelihood. ``held_out`` chooses a better size. A ``temperature`` that the config gives as a number is used
            instead. With ``mean_passes``, the mean moves on toward the mode, for adapters whose training was stopped
            early.
        held_out: with ``start`` "trained": batches on which the adapter was not trained, of 50 examples or more if
            possible. They choose the size of the covariance and the sharpness, as in :meth:`Posterior.calibrate`. Then
            they are learned: one update with each batch, which moves the mean. With ``start`` "prior": "latest": one
            pass, whose latest 64 to 128 examples choose them, before they are learned (``heldout.latest_examples``).
        checkpoint: a folder in which a single pass saves its posterior after every ``every`` updates, at the end, and
            when it is stopped (Ctrl-C, an error of the loader). A later call with the same loader, config and folder
            skips the batches of the earlier call; its result equals that of an uninterrupted pass to the bit. None: no
            checkpoints.
        every: updates between checkpoints.
        progress: whether to show a bar with accuracy, log loss and normalized innovation (1 for a consistent filter).
            None: only if standard error is a terminal, or in a notebook.

    Raises:
        ValueError: if ``start`` is unknown, the loader is empty, cannot be iterated again for several passes, or cannot
            be split for several configs, or a batch does not fit; the message gives the number of the batch. Also if
            ``held_out`` is given with another ``start`` or a number as ``temperature``.
        FitDivergenceError: a :class:`DivergenceError`, if the filter refuses an update; its attribute ``posterior`` is
            the posterior before that update. With several configs: only if all of them diverge.

    Example:
        >>> data = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(5)]
        >>> posterior = fit(nn.Linear(3, 1), data, KalmanConfig(likelihood="gaussian"), progress=False)
        >>> posterior.mean["weight"].shape, len(posterior.history["log_loss"])
        (torch.Size([1, 3]), 20)
    """
    check_one_of("start", start, STARTS)
    if config is not None and not isinstance(config, KalmanConfig):
        config = heldout_config_selection.check_candidates(config)
    if not isinstance(loader, Iterable):
        raise ValueError(f"`loader` must be iterable, got {type(loader).__name__}.")
    _check_held_out(held_out, start, config)
    model, loader = read_data(model, loader)
    if held_out is not None and not isinstance(held_out, str):
        held_out = read_loader(model, held_out)
    with fitting_together(model, loader, "fit", config, start, every):
        posterior = _fit(model, loader, config, start, held_out, checkpoint, every, shows_progress(progress))
    given = [config] if isinstance(config, KalmanConfig) else config or []
    if posterior.temperature not in [setting.temperature for setting in given]:
        prequential_temperature.warn_of_edge(posterior.temperature)
    return posterior


def _check_held_out(
    held_out: Iterable[Any] | str | None, start: str, config: KalmanConfig | Sequence[KalmanConfig] | None
) -> None:
    """Raise ValueError for held-out data that do not suit the start."""
    if held_out is None:
        return
    if isinstance(held_out, str):
        check_one_of("held_out", held_out, [LATEST])
    if not isinstance(held_out, Iterable):
        raise ValueError(f"`held_out` must be iterable, got {type(held_out).__name__}.")
    if start == "trained" and held_out == LATEST:
        raise ValueError("`held_out` must be batches with `start` 'trained', which has learned its data, got 'latest'.")
    if start == "prior" and held_out != LATEST:
        raise ValueError(
            "`held_out` must be None or 'latest' with `start` 'prior', got batches; `Posterior.calibrate` takes them."
        )
    if held_out == LATEST and not isinstance(config, KalmanConfig | None):
        raise ValueError("`config` must be one KalmanConfig with `held_out` 'latest', got several.")


def _fit(
    model: nn.Module | AdapterModel,
    loader: Iterable[Any],
    config: KalmanConfig | Sequence[KalmanConfig] | None,
    start: str,
    held_out: Iterable[Any] | str | None,
    checkpoint: str | Path | None,
    every: int,
    progress: bool,
) -> Posterior | MixturePosterior:
    """The posterior by the kind of fit that the config and the loader allow."""
    if checkpoint is not None:
        if start != "prior":
            raise ValueError(f"`start` must be 'prior' with a `checkpoint`, got {start!r}.")
        if config is not None and not isinstance(config, KalmanConfig):
            raise ValueError("`config` must be one KalmanConfig with a `checkpoint`, got several.")
        if held_out is not None:
            raise ValueError("`held_out` must be None with a `checkpoint`, got 'latest'.")
        return fit_with_checkpoints(model, loader, config, checkpoint, every, progress)
    if start == "trained" and not isinstance(config, KalmanConfig | None):
        raise ValueError("`config` must be one KalmanConfig with `start` 'trained', got several.")
    if isinstance(config, KalmanConfig) or held_out is not None or start == "trained":
        without = for_reading(KalmanConfig() if start == "trained" else KalmanConfig.stream(), model)
        settings = config if isinstance(config, KalmanConfig) else without
        is_default = config is None
        return fit_config(model, loader, settings, start, progress, choose_defaults=is_default, held_out=held_out)
    if config is None:
        return fit_default(model, loader, start, progress)
    split = heldout_config_selection.split_loader(loader)
    if split is None:
        raise ValueError(
            "`loader` must be a DataLoader over a data set or a list of at least 8 batches for several `config`, "
            f"got {type(loader).__name__}."
        )
    return _update_with_heldout(_fit_candidates(model, split, config, progress), split, progress)


def fit_default(
    model: nn.Module | AdapterModel,
    loader: Iterable[Any],
    start: str,
    progress: bool,
    seed: int = 0,
    members: int | None = None,
) -> Posterior | MixturePosterior:
    """The result of :func:`fit` without a ``config``, or of :func:`fit_mixture` if ``members`` is a number.

    Args:
        model: as for :func:`fit`; so are the others.
        loader: the data.
        start: of the mean.
        progress: whether to show it.
        seed: of the default settings.
        members: of a mixture.

    Raises:
        ValueError: if members are asked for where there is no mixture.
    """
    with fitting_together(model, loader, "fit_default", start, seed, members):
        return _fit_default(model, loader, start, progress, seed, members)


def _fit_default(
    model: nn.Module | AdapterModel, loader: Iterable[Any], start: str, progress: bool, seed: int, members: int | None
) -> Posterior | MixturePosterior:
    """:func:`fit_default` of processes that share the work."""
    if members is not None and (start == "trained" or heldout_config_selection.split_loader(loader) is None):
        raise ValueError(f"`members` needs `start` 'prior' and data that can be split, got {members} of {start!r}.")
    if start == "prior" and holds_real_targets(loader, model):
        if members is not None:
            return fit_regression_mixture(model, loader, progress, members, seed)
        return fit_regression(model, loader, progress, seed)
    if start == "trained" or heldout_config_selection.split_loader(loader) is None:
        single = KalmanConfig(seed=seed) if start == "trained" else KalmanConfig.stream(seed=seed)
        single = for_reading(single, model)
        return fit_config(model, loader, single, start, progress, choose_defaults=True)
    if members is None and (isinstance(model, LearnedTokens) or holds_text(loader, model)):
        return fit_default_mixture(model, loader, progress, seed, 1).best
    return fit_default_mixture(model, loader, progress, seed, members or MEMBERS)


class _CandidateFit(NamedTuple):
    """A candidate fitted to most of the data.

    Attributes:
        loss: its log loss on the held-out part at its best size and sharpness; infinite if it diverged.
        posterior: at these; None if it diverged.
    """

    loss: float
    posterior: Posterior | None


def _fit_candidates(
    model: nn.Module | AdapterModel, split: Split, configs: Sequence[KalmanConfig], progress: bool
) -> list[_CandidateFit]:
    """Every candidate fitted to most of the data and scored on the rest.

    Raises:
        FitDivergenceError: if all of them diverge.
    """
    fits: list[_CandidateFit] = []
    divergence = None
    for number, config in enumerate(configs, 1):
        try:
            posterior = fit_config(model, split.fitted, config, "prior", progress, f"candidate {number}: ")
        except DivergenceError as error:
            divergence = error
            fits.append(_CandidateFit(math.inf, None))
            continue
        posterior, loss = heldout_config_selection.heldout_loss(posterior, split.heldout)
        fits.append(_CandidateFit(loss, posterior))
    if divergence is not None and all(fit.posterior is None for fit in fits):
        raise divergence
    return fits


def _update_with_heldout(fits: Sequence[_CandidateFit], split: Split, progress: bool) -> Posterior:
    """The best candidate, updated with the held-out part; all losses are in its history."""
    best = min((fit for fit in fits if fit.posterior is not None), key=lambda fit: fit.loss).posterior
    assert best is not None
    kf, history, passes = best.kf, FitHistory(best.config.likelihood), best.config.mean_passes
    with posterior_on_divergence(lambda _: best):
        with ProgressBar(num_batches(split.heldout), "the held-out part", progress) as bar:
            state = filter_pass(kf, best.state, split.heldout, history, bar, hold_mean=passes > 0)
        if passes:  # the last mean pass again, now over all examples
            everything = itertools.chain(split.fitted, split.heldout)
            with ProgressBar(None, "last mean pass", progress) as bar:
                state, _ = mean_pass(kf, state, everything, passes - 1, passes, bar)
    losses = torch.tensor([fit.loss for fit in fits], dtype=torch.float64)
    return Posterior(kf, state, history.appended_to(best.history) | {"held_out_log_loss": losses})
