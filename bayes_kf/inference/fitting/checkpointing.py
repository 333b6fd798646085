"""A pass over a loader that is kept on disk as it goes, and goes on where it was."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import DivergenceError
from bayes_kf.inference.fitting.divergence import FitDivergenceError
from bayes_kf.inference.fitting.loader import SCALE_EXAMPLES, complete, first, length, located, scaling
from bayes_kf.inference.fitting.progress import Bar, Record
from bayes_kf.inference.posterior import Posterior
from bayes_kf.inference.saving import pretrained
from bayes_kf.inference.saving.file_names import STATE_FILE
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import batch_size
from bayes_kf.models.peft_adapters.in_use import is_peft

ONE_PASS = {"tune": None, "passes": 1, "mean_passes": 0}


def fit_kept(
    model: nn.Module | AdapterModel,
    loader: Iterable[Any],
    config: KalmanConfig,
    folder: str | Path,
    every: int,
    progress: bool,
) -> Posterior:
    """The posterior after one pass, written into ``folder`` every so many updates, at the end, and when stopped.

    Args:
        model: as for ``fit``.
        loader: the same batches each time: those that the folder has learned are passed over.
        config: of one pass.
        folder: new, or holding what an earlier call with these settings left; other files in it stay as they are.
        every: updates between checkpoints.
        progress: whether to show a bar.

    Raises:
        ValueError: for a config of several passes, a loader that shuffles without a generator, a folder with
            other files in the way, other batches than before, or a batch that does not fit; what was learned before is
            in the folder.
    """
    folder = Path(folder)
    for name, plain in ONE_PASS.items():
        if getattr(config, name) != plain:
            raise ValueError(f"`{name}` must be {plain} with a `checkpoint`, got {getattr(config, name)!r}.")
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"`every` must be a whole number >= 1, got {every!r}.")
    if (
        isinstance(loader, DataLoader)
        and isinstance(loader.sampler, RandomSampler)
        and loader.sampler.generator is None
    ):
        raise ValueError(
            "`loader` must come in the same order each time with a `checkpoint`, got one that shuffles as it likes: "
            "give it `generator=torch.Generator().manual_seed(...)`."
        )
    before, batches = _opened(folder, model, config), iter(loader)
    record = Record(config.likelihood)
    if before is None:
        few = first(batches, SCALE_EXAMPLES)
        if not few:
            raise ValueError("`loader` must yield at least one batch, got none.")
        kf, history = KalmanFilter(model, config), {}
        batches, state = itertools.chain(few, batches), kf.init(scaling(kf, few))
    else:
        kf, state, history = before.kf, before.state, before.history
        _pass_over(batches, state.step, state.examples, folder)

    def joined() -> Posterior:
        if not record.per_update["dof"]:
            return Posterior(kf, state, history)
        later = record.history()
        added = {k: torch.cat([history[k], v]) if k in history else v for k, v in later.items()}
        return Posterior(kf, state, history | added)

    saved = state.step
    with Bar(length(loader), "fit", progress) as bar:
        bar.skip(state.step)
        try:
            for batch in batches:
                inputs, targets = complete(batch, bar.done)
                with located(bar.done):
                    state, info = kf.update(state, inputs, targets)
                record.add(info)
                bar.advance(record.summary())
                if bar.done % every == 0:
                    joined().save_pretrained(folder)
                    saved = state.step
        except DivergenceError as error:
            raise FitDivergenceError(error, joined()) from error
        finally:  # also when somebody presses Ctrl-C, or the loader raises
            if state.step > saved:
                joined().save_pretrained(folder)
    return joined()


def _opened(folder: Path, model: nn.Module | AdapterModel, config: KalmanConfig) -> Posterior | None:
    """What an earlier call left; None for a folder without a posterior."""
    base = model.model if isinstance(model, AdapterModel) else model
    pretrained.check_folder(folder, of_peft=is_peft(base))  # now, not after the first updates
    if not (folder / STATE_FILE).is_file():
        return None
    found = Posterior.from_pretrained(folder, base)
    changed = config.differences(found.config)
    if changed:
        raise ValueError(f"`checkpoint` must hold a pass with the same settings, got another {', '.join(changed)}.")
    return found.with_adapter(model) if isinstance(model, AdapterModel) else found


def _pass_over(batches: Iterator[Any], steps: int, examples: int, folder: Path) -> None:
    """Leave out the batches that were learned."""
    seen = 0
    for number in range(steps):
        batch = next(batches, None)
        if batch is None:
            raise ValueError(f"`loader` must yield the {steps} batches that {folder} has learned, got {number}.")
        seen += batch_size(complete(batch, number)[0])
    if seen != examples:
        raise ValueError(f"`loader` must yield the batches that {folder} has learned, {examples} examples, got {seen}.")
