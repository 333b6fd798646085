"""The examples of a loader in batches of other sizes: small ones in a new order in every pass, and large ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader

from bayes_kf.inference.fitting.defaults.default_likelihood import REAL, TEXT, default_likelihood
from bayes_kf.inference.fitting.loader import concatenate_inputs
from bayes_kf.inference.fitting.loop import inputs_and_targets
from bayes_kf.inference.fitting.selection.heldout_config_selection import ShuffledBatches, reads_all_examples, reloaded
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Batch, split_batch

SMALL, LARGE = 16, 512  # examples of a batch: of the steps of Adam, and of passes that do not move the mean


class Examples(NamedTuple):
    """A data set, as often as it is wanted.

    Attributes:
        small: batches of at most ``SMALL`` examples, in a new order in every pass.
        large: the same examples in batches of at most ``LARGE``; those of a list of batches that do not fit together,
            as texts of several lengths, have their own size.
    """

    small: Iterable[Any]
    large: Iterable[Any]


def holds_real_targets(loader: Iterable[Any], model: nn.Module | AdapterModel | None = None) -> bool:
    """Whether a loader has float targets that are real numbers, and its examples can be asked for again."""
    return inferred_likelihood(loader, model) == REAL


def holds_text(loader: Iterable[Any], model: nn.Module | AdapterModel | None = None) -> bool:
    """Whether a loader has tokens as targets, and its examples can be asked for again."""
    return inferred_likelihood(loader, model) == TEXT


def inferred_likelihood(loader: Iterable[Any], model: nn.Module | AdapterModel | None = None) -> dict[str, Any]:
    """The settings of the likelihood for the targets of a loader whose examples can be asked for again.

    Empty for class labels, for other loaders, and for batches that are malformed or whose targets are ambiguous; a fit
    refuses these when it reads them.
    """
    if not _repeats(loader):
        return {}
    batches = loader if isinstance(loader, list | tuple) else _resized(loader, SMALL, True)
    try:
        return default_likelihood((split_batch(batch)[1] for batch in batches), model)
    except ValueError:
        return {}


def repeated_examples(loader: Iterable[Any], seed: int = 0) -> Examples:
    """The examples of a list of batches, or of a DataLoader over a data set; ``seed`` is that of their orders.

    Raises:
        ValueError: if a batch has no targets, or the loader is of another kind.
    """
    if isinstance(loader, list | tuple):
        return _of_batches(loader, seed)
    if not _repeats(loader):
        raise ValueError(
            f"`loader` must be a DataLoader over a data set or a list of batches, got {type(loader).__name__}."
        )
    return Examples(_resized(loader, SMALL, True, seed), _resized(loader, LARGE, False))


def _repeats(loader: Iterable[Any]) -> bool:
    return len(loader) > 0 if isinstance(loader, list | tuple) else reads_all_examples(loader)


def _of_batches(batches: list[Any] | tuple[Any, ...], seed: int) -> Examples:
    pairs = [inputs_and_targets(batch, number) for number, batch in enumerate(batches)]
    wholes = [Batch.of(*pair) for pair in pairs]
    joined, total = Batch.of(concatenate_inputs([inputs for inputs, _ in pairs])), sum(one.size for one in wholes)
    shapes = {tuple(targets.shape[1:]) for _, targets in pairs}
    if joined.size != total or len(shapes) != 1:
        return Examples(ShuffledBatches(batches, SMALL), batches)
    everything = joined.with_targets(torch.cat([targets for _, targets in pairs]))
    return Examples(_Drawn(everything, seed), [(part.inputs, part.targets) for part in everything.chunks(LARGE)])


class _Drawn:
    """Batches of ``SMALL`` examples, drawn without replacement in every pass, the same for a seed."""

    def __init__(self, everything: Batch, seed: int) -> None:
        self._everything, self._generator = everything, torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-self._everything.size // SMALL)

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(self._everything.size, generator=self._generator)
        for which in order.to(self._everything.device).split(SMALL):
            part = self._everything[which]
            yield part.inputs, part.targets


def _resized(loader: Any, size: int, is_shuffled: bool, seed: int = 0) -> DataLoader[Any]:
    """A loader over the same data set in batches of ``size``."""
    return reloaded(loader, None, is_shuffled, size, torch.Generator().manual_seed(seed))
