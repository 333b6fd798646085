"""A pass with checkpoints, which a later call can resume."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.filtering.update_info import UpdateInfo
from bayes_kf.inference.fitting.defaults.default_likelihood import default_likelihood
from bayes_kf.inference.fitting.divergence import posterior_on_divergence
from bayes_kf.inference.fitting.loader import first_batches, num_batches, scale_inputs
from bayes_kf.inference.fitting.loop import LoopStep, run_loop
from bayes_kf.inference.fitting.progress import FitHistory, ProgressBar
from bayes_kf.inference.posterior import Posterior
from bayes_kf.inference.saving import pretrained
from bayes_kf.inference.saving.file_names import STATE_FILE
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs, batch_size, split_batch
from bayes_kf.models.peft_adapters.in_use import is_peft
from bayes_kf.processes import shared_work
from bayes_kf.validation import check_whole

SINGLE_PASS: dict[str, Any] = {"tune": None, "passes": 1, "mean_passes": 0}  # settings of one pass


def fit_with_checkpoints(
    model: nn.Module | AdapterModel,
    loader: Iterable[Any],
    config: KalmanConfig | None,
    folder: str | Path,
    every: int,
    progress: bool,
) -> Posterior:
    """The posterior after one pass, saved in ``folder`` after every ``every`` updates, at the end, and on errors.

    Args:
        model: as for ``fit``.
        loader: yields the same batches in every call; those that an earlier call used are skipped.
        config: settings of one pass; None: ``KalmanConfig()`` with the likelihood of the targets.
        folder: new, or with the posterior of an earlier call with these settings. Other files in it are not changed.
        every: updates between checkpoints.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if the config has several passes, the loader shuffles without a generator, other files are in the
            way, the batches are not those of the earlier call, or a batch does not fit. The posterior before the error
            is in the folder.
        FitDivergenceError: if the filter refuses an update.
    """
    folder = Path(folder)
    check_whole("every", every)
    batches: Iterator[Any] | None = None
    if config is None:
        check_single_pass(KalmanConfig(), loader)
        batches = iter(loader)
        first = first_batches(batches)
        config, batches = (
            KalmanConfig(**default_likelihood((split_batch(b)[1] for b in first), model)),
            itertools.chain(first, batches),
        )
    check_single_pass(config, loader)
    resumed = shared_work.done_everywhere(lambda: _resume(folder, model, config))
    shared_work.check_same("the posterior in `checkpoint`", None if resumed is None else resumed.state.step)
    batches = batches or iter(loader)
    if resumed is None:
        start, batches = _start(model, config, batches)
    else:
        start = resumed
        _skip_batches(batches, start.state.step, start.state.examples, folder)
    writer = CheckpointWriter(start, folder, every)
    with ProgressBar(num_batches(loader), "fit", progress) as bar:
        bar.skip(start.state.step)
        try:
            with posterior_on_divergence(lambda _: writer.posterior()):
                run_loop(batches, start.state, start.kf.update, [writer], bar, writer.history.summary)
        except BaseException:  # also Ctrl-C, or an error of the loader; other processes may be gone
            if shared_work.is_first() and not start.adapter.is_divided:  # whose fingerprint needs all processes
                writer.save()
            raise
        writer.save_in_step()
    return writer.posterior()


class CheckpointWriter:
    """A callback that saves the posterior of a pass after every ``every`` updates.

    Args:
        start: the posterior before the pass.
        folder: to save it in.
        every: updates between checkpoints.

    Attributes:
        history: of the pass.
    """

    def __init__(self, start: Posterior, folder: Path, every: int) -> None:
        self.history = FitHistory(start.config.likelihood)
        self._start, self._folder, self._every = start, folder, every
        self._state, self._saved_step = start.state, start.state.step

    def __call__(self, step: LoopStep[FilterState, UpdateInfo]) -> None:
        """Record an update, and save the posterior if it is time."""
        self._state = step.state
        self.history.add(step.info)
        if (step.number + 1) % self._every == 0:
            self.save_in_step()

    def save_in_step(self) -> None:
        """Save the posterior if the folder does not hold it; all processes return when the first one has saved it."""
        saves = shared_work.is_first() or self._start.adapter.is_divided  # all have a part of the base's fingerprint
        shared_work.done_everywhere(self.save if saves else lambda: None)

    def save(self) -> None:
        """Save the posterior if the folder does not hold it."""
        if self._state.step > self._saved_step:
            self.posterior().save_pretrained(self._folder)
            self._saved_step = self._state.step

    def posterior(self) -> Posterior:
        """The posterior so far, with the histories of earlier calls and this one joined."""
        return Posterior(self._start.kf, self._state, self.history.appended_to(self._start.history))


def check_single_pass(config: KalmanConfig, loader: Iterable[Any]) -> None:
    """Raise ValueError if a pass with this config over this loader cannot be resumed."""
    for name, needed in SINGLE_PASS.items():
        if getattr(config, name) != needed:
            raise ValueError(f"`{name}` must be {needed} with a `checkpoint`, got {getattr(config, name)!r}.")
    if (
        isinstance(loader, DataLoader)
        and isinstance(loader.sampler, RandomSampler)
        and loader.sampler.generator is None
    ):
        raise ValueError(
            "`loader` must yield the same order in every call with a `checkpoint`, got one that shuffles without a "
            "generator; give it `generator=torch.Generator().manual_seed(...)`."
        )


def _start(
    model: nn.Module | AdapterModel, config: KalmanConfig, batches: Iterator[Any]
) -> tuple[Posterior, Iterator[Any]]:
    """The prior, with its scale measured on the first batches, and all batches."""
    first = first_batches(batches)
    if not first:
        raise ValueError("`loader` must yield at least one batch, got none.")
    kf = KalmanFilter(model, config)
    return Posterior(kf, kf.init(scale_inputs(kf, first))), itertools.chain(first, batches)


def _resume(folder: Path, model: nn.Module | AdapterModel, config: KalmanConfig) -> Posterior | None:
    """The posterior that an earlier call saved; None if there is none in the folder."""
    base = model.model if isinstance(model, AdapterModel) else model
    pretrained.check_folder(folder, of_peft=is_peft(base))  # now, not after the first updates
    if not (folder / STATE_FILE).is_file():
        return None
    saved = Posterior.from_pretrained(folder, base)
    changed = config.differences(saved.config)
    if changed:
        raise ValueError(f"`checkpoint` must hold a pass with the same settings, got another {', '.join(changed)}.")
    return saved.with_adapter(model) if isinstance(model, AdapterModel) else saved


def _skip_batches(batches: Iterator[Any], steps: int, examples: int, folder: Path) -> None:
    """Skip the batches that an earlier call used.

    Raises:
        ValueError: if the loader has fewer batches, or they have another number of examples.
    """

    def count(total: tuple[int, int], inputs: Inputs, targets: Tensor) -> tuple[tuple[int, int], None]:
        return (total[0] + 1, total[1] + batch_size(inputs)), None

    skipped, skipped_examples = run_loop(itertools.islice(batches, steps), (0, 0), count)
    if skipped < steps:
        raise ValueError(f"`loader` must yield the {steps} batches of the pass in {folder}, got {skipped}.")
    if skipped_examples != examples:
        raise ValueError(
            f"`loader` must yield the batches of the pass in {folder} with {examples} examples, got {skipped_examples}."
        )
