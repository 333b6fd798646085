"""A pass over a loader on several processes, and scores of all of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bayes_kf.distributed.data_parallel import DataParallelFilter
from bayes_kf.distributed.distributed_filter import FilterOfMany
from bayes_kf.distributed.process_group import Group
from bayes_kf.distributed.sharded import ShardedFilter
from bayes_kf.evaluation.classification.streaming_scores import StreamingScores
from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filtering import tempering
from bayes_kf.inference.fitting.loader import SCALE_EXAMPLES, complete, first, length, located, scaling
from bayes_kf.inference.fitting.progress import Bar, Record, shows_bars
from bayes_kf.inference.posterior import Posterior
from bayes_kf.inference.saving.pretrained import check_folder
from bayes_kf.models.peft_adapters.in_use import is_peft

FORMS: dict[str, type[FilterOfMany]] = {"sharded": ShardedFilter, "data_parallel": DataParallelFilter}


def fit(
    model: nn.Module,
    loader: Iterable[Any],
    config: KalmanConfig | None = None,
    *,
    form: str = "sharded",
    group: Any = None,
    checkpoint: str | Path | None = None,
    every: int = 100,
    progress: bool | None = None,
) -> Posterior:
    """The posterior after one pass over what the processes of a group were given, whole on every one of them.

    Update k learns the k-th batch of every process together, process after process. Shares may be of different
    lengths: a process that has come to its end goes on with the others, with nothing to add. With Accelerate, prepare
    the loader with ``even_batches=False``: otherwise it repeats examples, which would then count twice.

    Args:
        model: the same on every process; its weights are not changed.
        loader: this process's share: batches ``(inputs, targets)`` or mappings with ``labels``.
        config: the settings, the same on every process; by default those that ``form`` serves.
        form: "sharded" (:class:`ShardedFilter`) or "data_parallel" (:class:`DataParallelFilter`).
        group: of torch.distributed; by default that of ``init_process_group``.
        checkpoint: a folder that the first process keeps a whole posterior in, written anew every so many updates and
            in the end; other files in it stay as they are. None: none.
        every: updates between checkpoints.
        progress: whether the first process shows a bar; None: only where standard error is a terminal, or in a
            notebook.

    Raises:
        ValueError: for a bad argument, or a batch that does not fit, with its index.
        OtherProcessError: where another process raised an error; the last checkpoint is whole.
        DivergenceError: on every process, when an update had to be refused.
    """
    if form not in FORMS:
        raise ValueError(f"`form` must be one of {', '.join(FORMS)}, got {form!r}.")
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"`every` must be a whole number >= 1, got {every!r}.")
    if config is None:
        information: dict[str, Any] = {"covariance": "diagonal_information", "expansion": "mean"}
        config = KalmanConfig(**(information if form == "data_parallel" else {}))
    kf = FORMS[form](model, config, group)
    failed, few = None, []
    batches: Iterator[Any] = iter(())
    try:
        batches = iter(loader)
        few = first(batches, SCALE_EXAMPLES)
        inputs = scaling(kf.kf, few) if few else None
        if checkpoint is not None and kf.group.rank == 0:
            check_folder(Path(checkpoint), of_peft=is_peft(kf.adapter.model))
    except Exception as error:  # whatever it is, the others must not wait for this process
        failed = error
    kf.shares.all_or_none(failed)
    if not few and kf.group.rank == 0:
        failed = ValueError("`loader` must yield at least one batch on the first process, got none.")
    kf.shares.all_or_none(failed)
    state, record = kf.init(inputs), Record(config.likelihood)
    shown = shows_bars(progress) and kf.group.rank == 0
    with Bar(length(loader) if shown else None, f"fit on {kf.group.size} processes", shown) as bar:
        for share in _together(kf, itertools.chain(few, batches)):
            with located(bar.done):
                state, info = kf.update(state, *share)
            if len(info.log_loss):
                record.add(info)
            bar.advance(record.summary() if record.per_update["dof"] else "")
            if checkpoint is not None and bar.done % every == 0:
                kf.save_pretrained(state, checkpoint)
    posterior = Posterior(kf.kf, kf.gather(state), record.history() if record.per_update["dof"] else {})
    if kf.group.rank == 0 and isinstance(config.temperature, str):
        tempering.warn_of_mean_alone(posterior.temperature)
    if checkpoint is not None:
        kf.save_pretrained(state, checkpoint)
    return posterior


def merge_scores(scores: StreamingScores, group: Any = None) -> None:
    """Make the scores of each process, which saw its own examples, those of all examples.

    Args:
        scores: with the same settings on every process; changed.
        group: of torch.distributed; by default that of ``init_process_group``.

    Raises:
        RuntimeError: where torch.distributed was not initialized, or the processes' scores are not of the same shapes.
    """
    among = Group(group)
    shapes = {name: tuple(total.shape) for name, total in scores.state.items()}
    among.check_alike("`scores`", sorted(shapes.items()), device=torch.device("cpu"))
    scores.load_state({name: among.total(total) for name, total in sorted(scores.state.items())})


def _together(kf: FilterOfMany, batches: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
    """This process's batches; nothing, once they are over and as long as another process has some."""
    for number in itertools.count():
        failed, share = None, None
        try:
            batch = next(batches, None)
            share = None if batch is None else complete(batch, number)
        except Exception as error:  # whatever it is, the others must not wait for this process
            failed = error
        kf.shares.all_or_none(failed)
        if not any(kf.group.numbers(int(share is not None), kf.adapter.device)):
            return
        yield share or (None, None)
