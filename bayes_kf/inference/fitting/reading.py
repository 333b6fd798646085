"""How a model and its loader are read for a fit: preference pairs are known by their names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from bayes_kf.inference.fitting.loader import num_batches
from bayes_kf.inference.fitting.selection.heldout_config_selection import reads_all_examples
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.language import PreferencePairs
from bayes_kf.models.language.logits import forward_parameters
from bayes_kf.models.preference_batch import is_certain, read_pairs
from bayes_kf.processes.whole_loader import whole_loader

TRL_COLUMNS = ("chosen_ids", "rejected_ids")  # of the examples that TRL's collator of preference pairs takes


def read_data(model: nn.Module | AdapterModel, loader: Iterable[Any]) -> tuple[nn.Module | AdapterModel, Iterable[Any]]:
    """The model, read as a reward model if its loader holds preference pairs, and the loader as that reading reads it.

    A reading that is given stays, and so does a model that takes both texts itself.
    """
    if not isinstance(model, AdapterModel) and holds_pairs(loader) and not _takes_pairs(model):
        model = PreferencePairs(model)
    return model, read_loader(model, loader)


def holds_pairs(loader: Iterable[Any]) -> bool:
    """Whether a list of batches, or a DataLoader over a list or a data set with columns, holds preference pairs.

    Only names decide: those of both texts, margins beside twice as many texts, or TRL's columns. Batches of TRL
    without margins could be inputs without labels.
    """
    if isinstance(loader, list | tuple):
        return len(loader) > 0 and isinstance(loader[0], Mapping) and is_certain(loader[0])
    return isinstance(loader, DataLoader) and has_pair_columns(loader.dataset)


def has_pair_columns(data: Any) -> bool:
    """Whether a data set's examples have the columns of TRL, or names of both texts; it is not asked for examples."""
    columns = getattr(data, "column_names", None)
    if columns is None and isinstance(data, list | tuple) and data and isinstance(data[0], Mapping):
        columns = list(data[0])
    if not isinstance(columns, list):
        return has_pair_columns(data.dataset) if hasattr(data, "dataset") and hasattr(data, "indices") else False
    return set(TRL_COLUMNS) <= set(columns) or is_certain(dict.fromkeys(columns))


def _takes_pairs(model: nn.Module) -> bool:
    """Whether the forward pass of a model of one's own takes both texts."""
    return "input_ids_chosen" in forward_parameters(model)


def read_loader(model: nn.Module | AdapterModel, loader: Iterable[Any]) -> Iterable[Any]:
    """The loader, of its own kind, with every batch as the model's reading reads it."""
    loader = whole_loader(loader)
    if not isinstance(model, PreferencePairs):
        return loader
    if isinstance(loader, list | tuple):
        return [model.read(batch) for batch in loader]
    if isinstance(loader, Iterator):
        return map(model.read, loader)
    if reads_all_examples(loader):
        return _with_collate(loader, _Collate(loader.collate_fn))
    return _ReadBatches(loader, model)


class _Collate:
    """A loader's collator, followed by the reading of its batch."""

    def __init__(self, collate: Any) -> None:
        self._collate = collate

    def __call__(self, examples: list[Any]) -> Any:
        return read_pairs(self._collate(examples))


class _ReadBatches:
    """The batches of a loader, each as the model's reading reads it."""

    def __init__(self, loader: Iterable[Any], model: AdapterModel) -> None:
        self._loader, self._model = loader, model

    def __iter__(self) -> Iterator[Any]:
        return map(self._model.read, self._loader)

    def __len__(self) -> int:
        length = num_batches(self._loader)
        if length is None:
            raise TypeError("a loader over a stream has no length")
        return length


def _with_collate(loader: DataLoader[Any], collate: Any) -> DataLoader[Any]:
    """A loader over the same examples, in the same order, with another collator."""
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=loader.sampler,
        num_workers=loader.num_workers,
        collate_fn=collate,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
        worker_init_fn=loader.worker_init_fn,
        generator=loader.generator,
    )
