"""Fits and scores on several processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kf.distributed import divided_checkpoint
from bayes_kf.distributed.data_parallel_filter import DataParallelFilter
from bayes_kf.distributed.distributed_filter import DistributedFilter
from bayes_kf.distributed.sharded_filter import ShardedFilter
from bayes_kf.evaluation.classification.streaming_scores import StreamingScores
from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filtering import prequential_temperature
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.filtering.update_info import UpdateInfo
from bayes_kf.inference.fitting.loader import first_batches, num_batches, scale_inputs
from bayes_kf.inference.fitting.loop import Callback, LoopStep, every_updates, inputs_and_targets, run_loop
from bayes_kf.inference.fitting.progress import FitHistory, ProgressBar, shows_progress
from bayes_kf.inference.posterior import Posterior
from bayes_kf.inference.saving.pretrained import check_folder
from bayes_kf.models.batch import Inputs, batch_size
from bayes_kf.models.peft_adapters.in_use import is_peft
from bayes_kf.processes.process_group import Group
from bayes_kf.validation import check_one_of, check_whole

FORMS: dict[str, type[DistributedFilter]] = {"sharded": ShardedFilter, "data_parallel": DataParallelFilter}


def fit(
    model: nn.Module,
    loader: Iterable[Any],
    config: KalmanConfig | None = None,
    *,
    form: str = "sharded",
    group: Any = None,
    checkpoint: str | Path | None = None,
    every: int = 100,
    divided: bool = False,
    progress: bool | None = None,
) -> Posterior:
    """The posterior after one pass over the loaders of all processes of a group; every process gets the whole of it.

    Update k takes the k-th batch of every process as one global batch, ordered by process. The loaders may have
    different lengths: a process whose loader has ended takes part in the remaining updates without examples. With
    Accelerate, prepare the loader with ``even_batches=False``; otherwise it repeats examples, which then count twice.

    Args:
        model: the same on every process; its weights are not changed.
        loader: this process's batches, ``(inputs, targets)`` or mappings with ``labels``.
        config: the settings, the same on every process; by default settings that ``form`` supports.
        form: "sharded" (:class:`ShardedFilter`) or "data_parallel" (:class:`DataParallelFilter`).
        group: of torch.distributed; by default that of ``init_process_group``.
        checkpoint: a folder in which the first process saves the whole posterior after every ``every`` updates and at
            the end; other files in it are not changed. None: no checkpoints.
        every: updates between checkpoints.
        divided: whether checkpoints are those of :meth:`ShardedFilter.save_divided`, so that no process needs the whole
            belief before the end, and a later call with the same batches, on any number of processes, resumes.
        progress: whether the first process shows a progress bar. None: only if standard error is a terminal, or in a
            notebook.

    Raises:
        ValueError: for an invalid argument, or a batch that does not fit, with its index.
        OtherProcessError: if another process raised an error; the last checkpoint stays complete.
        DivergenceError: on every process, if the filter refuses an update.
    """
    check_one_of("form", form, FORMS)
    check_whole("every", every)
    if divided and (form != "sharded" or checkpoint is None):
        raise ValueError('`divided` must be False without `form="sharded"` and a `checkpoint`, got True.')
    if config is None:
        information: dict[str, Any] = {"covariance": "diagonal_information", "expansion": "mean"}
        config = KalmanConfig(**(information if form == "data_parallel" else {}))
    kf = FORMS[form](model, config, group)
    batches, inputs = _open_together(kf, loader, None if divided else checkpoint)
    state, history = _resumed(kf, checkpoint, batches, inputs) if divided else None, FitHistory(config.likelihood)
    done = 0 if state is None else state.step
    state = kf.init(inputs) if state is None else state

    def save(state: FilterState) -> None:
        assert checkpoint is not None
        if divided and isinstance(kf, ShardedFilter):
            kf.save_divided(state, checkpoint)
        else:
            kf.save_pretrained(state, checkpoint)

    callbacks: list[Callback[FilterState, UpdateInfo]] = [_record_own_examples(history)]
    if checkpoint is not None:
        callbacks.append(every_updates(every, save))
    shown = shows_progress(progress) and kf.group.rank == 0
    with ProgressBar(num_batches(loader) if shown else None, f"fit on {kf.group.size} processes", shown) as bar:
        bar.skip(done)
        shards = _global_batches(kf, batches)
        state = run_loop(shards, state, kf.update, callbacks, bar, history.summary, split=lambda shard, _: shard)
    posterior = Posterior(kf.kf, kf.gather(state), {} if history.is_empty else history.series())
    if kf.group.rank == 0 and isinstance(config.temperature, str):
        prequential_temperature.warn_of_edge(posterior.temperature)
    if checkpoint is not None:
        save(state)
    return posterior


def merge_scores(scores: StreamingScores, group: Any = None) -> None:
    """Replace each process's scores by the scores over the examples of all processes.

    Args:
        scores: with the same settings on every process; changed in place.
        group: of torch.distributed; by default that of ``init_process_group``.

    Raises:
        RuntimeError: if torch.distributed is not initialized, or the shapes of the scores differ between processes.
    """
    processes = Group(group)
    shapes = {name: tuple(total.shape) for name, total in scores.state.items()}
    processes.check_equal("`scores`", sorted(shapes.items()), device=torch.device("cpu"))
    scores.load_state({name: processes.all_reduce(total) for name, total in sorted(scores.state.items())})


def _open_together(
    kf: DistributedFilter, loader: Iterable[Any], checkpoint: str | Path | None
) -> tuple[Iterator[Any], Inputs | None]:
    """This process's batches, and the inputs that scale the prior, once every process has opened its loader."""
    failure, few, inputs = None, list[Any](), None
    batches: Iterator[Any] = iter(())
    try:
        batches = iter(loader)
        few = first_batches(batches)
        inputs = scale_inputs(kf.kf, few) if few else None
        if checkpoint is not None and kf.group.rank == 0:
            check_folder(Path(checkpoint), of_peft=is_peft(kf.adapter.model))
    except Exception as raised:  # of any kind, or the other processes would wait for this one
        failure = raised
    kf.group.raise_together(failure)
    if not few and kf.group.rank == 0:
        failure = ValueError("`loader` must yield at least one batch on the first process, got none.")
    kf.group.raise_together(failure)
    return itertools.chain(few, batches), inputs


def _resumed(
    kf: DistributedFilter, folder: str | Path | None, batches: Iterator[Any], inputs: Inputs | None
) -> FilterState | None:
    """This process's shard of an earlier call's state, and its batches skipped; None if there is no checkpoint."""
    assert isinstance(kf, ShardedFilter)
    assert folder is not None
    found = kf.group.all_gather_int(int(divided_checkpoint.exists(folder)))
    if not any(found):
        return None
    state = kf.load_divided(folder, inputs)
    examples, failure = 0, None
    try:
        for number, batch in enumerate(itertools.islice(batches, state.step)):
            examples += batch_size(inputs_and_targets(batch, number)[0])
    except Exception as raised:  # of any kind, or the other processes would wait for this one
        failure = raised
    kf.group.raise_together(failure)
    skipped = sum(kf.group.all_gather_int(examples))
    if skipped != state.examples:
        raise ValueError(
            f"`loader` must yield the batches of the pass in {folder} with {state.examples} examples, got {skipped}."
        )
    return state


def _record_own_examples(history: FitHistory) -> Callback[FilterState, UpdateInfo]:
    """A callback that records the updates to which this process contributes examples."""

    def callback(step: LoopStep[FilterState, UpdateInfo]) -> None:
        if len(step.info.log_loss):
            history.add(step.info)

    return callback


def _global_batches(kf: DistributedFilter, batches: Iterator[Any]) -> Iterator[tuple[Inputs | None, Tensor | None]]:
    """This process's batches, then (None, None) until the loaders of all processes have ended."""
    for number in itertools.count():
        failure, shard = None, None
        try:
            batch = next(batches, None)
            shard = None if batch is None else inputs_and_targets(batch, number)
        except Exception as raised:  # of any kind, or the other processes would wait for this one
            failure = raised
        kf.group.raise_together(failure)
        if not any(kf.group.all_gather_int(int(shard is not None), kf.adapter.device)):
            return
        yield shard or (None, None)
