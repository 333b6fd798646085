"""From a model and a loader to a posterior, under one setting or the best of several."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filtering import tempering
from bayes_kf.inference.filtering.state import DivergenceError
from bayes_kf.inference.fitting import checkpointing, holdout_selection
from bayes_kf.inference.fitting.divergence import FitDivergenceError
from bayes_kf.inference.fitting.loader import length
from bayes_kf.inference.fitting.passes import fit_one, mean_pass, one_pass
from bayes_kf.inference.fitting.progress import Bar, Record, shows_bars
from bayes_kf.inference.posterior import Posterior
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.validation import did_you_mean

STARTS = ("prior", "trained")


def fit(
    model: nn.Module | AdapterModel,
    loader: Iterable[Any],
    config: KalmanConfig | Sequence[KalmanConfig] | None = None,
    *,
    start: str = "prior",
    checkpoint: str | Path | None = None,
    every: int = 100,
    progress: bool | None = None,
) -> Posterior:
    """The posterior over a model's trainable tensors after one pass over a loader, or as many as configured.

    Args:
        model: a PEFT model or any module with trainable tensors, or a reading of one (``models.language``); its weights
            are not changed.
        loader: batches ``(inputs, targets)`` or mappings with ``labels``.
        config: the settings. Several: each learns seven eighths of the data, the rest says which predicts best and at
            which temperature, and that one goes on to learn the rest (``select``). None: ``KalmanConfig.dataset`` under
            a careful and a wide prior, and a narrow one where the careful one did better (``select.default``), where
            the loader can be split (a DataLoader over a data set, or a list of at least eight batches), else
            ``KalmanConfig.stream()``, a single pass; with ``start`` "trained" or a ``checkpoint``, ``KalmanConfig()``.
            Without settings and ``checkpoint``, the curvature of more than 32 outputs is "sampled", and the part that
            is held out also says what their logits are divided by (``softmax_temperature``).
        start: "prior": the model's present tensors are the prior mean, and the mean learns online. "trained": they
            are kept as the posterior mean (an adapter already trained by anything), and the pass gives the covariance
            of the model linearized there (a Laplace approximation), under a prior as wide as its evidence says
            unless ``initial_variance`` is given, and with temperature 0.1 unless one is (``post_hoc`` says why;
            :meth:`Posterior.calibrate` finds a better one on held-out data). With ``mean_passes`` of the configuration
            the mean then goes on from there toward the mode, for adapters whose training stopped short of it.
        checkpoint: a folder that the posterior of a single pass is kept in, written every so many updates, in the end,
            and when the pass is stopped (Ctrl-C, a loader that raises). Called again with the same loader, settings and
            folder, it goes on after the batches that it has learned, to the bit as if never stopped. None: none.
        every: updates between checkpoints.
        progress: whether to show a bar with online accuracy, log loss and innovation health (its mean over its
            degrees of freedom: 1 for a consistent filter). None: only where standard error is a terminal, or in a
            notebook.

    Raises:
        ValueError: for a bad ``start``, an empty loader, one that is used up by the first of several passes, one that
            cannot be split for several ``config``, or a batch that does not fit, with the batch's index.
        FitDivergenceError: a :class:`DivergenceError`, if the filter refuses an update; its attribute ``posterior`` is
            the posterior before that update. With several ``config``: only if all of them diverge.

    Example:
        >>> data = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(5)]
        >>> posterior = fit(nn.Linear(3, 1), data, KalmanConfig(likelihood="gaussian"), progress=False)
        >>> posterior.mean["weight"].shape, len(posterior.history["log_loss"])
        (torch.Size([1, 3]), 20)
    """
    if start not in STARTS:
        raise ValueError(
            f"`start` must be one of {', '.join(STARTS)}, got {start!r}{did_you_mean(start, STARTS) or '.'}"
        )
    if config is not None and not isinstance(config, KalmanConfig):
        config = holdout_selection.check(config)
    if not isinstance(loader, Iterable):
        raise ValueError(f"`loader` must be iterable, got {type(loader).__name__}.")
    posterior = _fit(model, loader, config, start, checkpoint, every, shows_bars(progress))
    given = [config] if isinstance(config, KalmanConfig) else config or []
    if posterior.temperature not in [setting.temperature for setting in given]:
        tempering.warn_of_mean_alone(posterior.temperature)
    return posterior


def _fit(
    model: nn.Module | AdapterModel,
    loader: Iterable[Any],
    config: KalmanConfig | Sequence[KalmanConfig] | None,
    start: str,
    checkpoint: str | Path | None,
    every: int,
    progress: bool,
) -> Posterior:
    """By the way that the settings and the loader ask for."""
    if checkpoint is not None:
        if start != "prior":
            raise ValueError(f"`start` must be 'prior' with a `checkpoint`, got {start!r}.")
        if config is not None and not isinstance(config, KalmanConfig):
            raise ValueError("`config` must be one with a `checkpoint`, got several.")
        return checkpointing.fit_kept(model, loader, config or KalmanConfig(), checkpoint, every, progress)
    if isinstance(config, KalmanConfig):
        return fit_one(model, loader, config, start, progress)
    if config is not None and start == "trained":
        raise ValueError("`config` must be one with `start` 'trained', whose mean stays, got several.")
    if config is None:
        return fit_default(model, loader, start, progress)
    parts = holdout_selection.split(loader)
    if parts is None:
        raise ValueError(
            "`loader` must be a DataLoader over a data set or a list of at least 8 batches for several `config`, "
            f"got {type(loader).__name__}."
        )
    return _fit_best(model, parts, config, progress)


class _Candidate(NamedTuple):
    """A setting's posterior of the fitted part, at its best temperature, and its log loss on the held-out part.

    Without a posterior, and infinite, where the setting diverged.
    """

    loss: float
    posterior: Posterior | None


def _fit_best(
    model: nn.Module | AdapterModel, parts: holdout_selection.Parts, configs: Sequence[KalmanConfig], progress: bool
) -> Posterior:
    """The candidate that predicts the held-out part best, gone on to learn it too."""
    tried = _tried(model, parts, configs, progress)
    return _finished(_best(tried), parts, [candidate.loss for candidate in tried], progress)


def fit_default(
    model: nn.Module | AdapterModel, loader: Iterable[Any], start: str, progress: bool, seed: int = 0
) -> Posterior:
    """What :func:`fit` does without a ``config``; ``seed`` is that of the settings that it chooses.

    Of the default's priors the best is taken; the narrow one is tried where the careful one did better than the wide.
    """
    parts = None if start == "trained" else holdout_selection.split(loader)
    if parts is None:
        once = KalmanConfig(seed=seed) if start == "trained" else KalmanConfig.stream(seed=seed)
        return fit_one(model, loader, once, start, progress, given=False)
    careful, wide, narrow = holdout_selection.default(model, parts.fitted, seed)
    tried = _tried(model, parts, [careful, wide], progress)
    if tried[0].loss <= tried[1].loss:
        tried += _tried(model, parts, [narrow], progress, len(tried))
    return _finished(_best(tried), parts, [candidate.loss for candidate in tried], progress)


def _tried(
    model: nn.Module | AdapterModel,
    parts: holdout_selection.Parts,
    configs: Sequence[KalmanConfig],
    progress: bool,
    before: int = 0,
) -> list[_Candidate]:
    """Every setting fitted and scored; ``before`` were so already.

    Raises:
        DivergenceError: when that happened to all.
    """
    found: list[_Candidate] = []
    failed = None
    for number, config in enumerate(configs, before + 1):
        try:
            fitted = fit_one(model, parts.fitted, config, "prior", progress, f"candidate {number}: ")
        except DivergenceError as error:
            failed = error
            found.append(_Candidate(math.inf, None))
            continue
        posterior, loss = holdout_selection.score(fitted, parts.held_out)
        found.append(_Candidate(loss, posterior))
    if failed is not None and all(candidate.posterior is None for candidate in found):
        raise failed
    return found


def _best(tried: Sequence[_Candidate]) -> Posterior:
    """The one with the least loss, of those that did not diverge."""
    found = min((c for c in tried if c.posterior is not None), key=lambda candidate: candidate.loss).posterior
    assert found is not None
    return found


def _finished(best: Posterior, parts: holdout_selection.Parts, losses: Sequence[float], progress: bool) -> Posterior:
    """A posterior gone on to learn the held-out part too; ``losses`` are kept in its history."""
    kf, record, refine_again = best.kf, Record(best.config.likelihood), best.config.mean_passes > 0
    try:
        with Bar(length(parts.held_out), "the held-out part", progress) as bar:
            state = one_pass(kf, best.state, parts.held_out, record, bar, hold_mean=refine_again)
        if refine_again:  # the mean goes on as it did last, now over all examples
            everything, passes = itertools.chain(parts.fitted, parts.held_out), kf.config.mean_passes
            with Bar(None, "last mean pass", progress) as bar:
                state, _ = mean_pass(kf, state, everything, passes - 1, passes, bar)
    except DivergenceError as error:
        raise FitDivergenceError(error, best) from error
    later = record.history()
    history = {
        name: torch.cat([values, later[name]]) if name in later else values for name, values in best.history.items()
    }
    history["held_out_log_loss"] = torch.tensor(losses, dtype=torch.float64)
    return Posterior(kf, state, history)
