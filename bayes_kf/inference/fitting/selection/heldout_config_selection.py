"""Selection of settings on held-out data: candidates are fitted to most of the data, the rest chooses among them.

A stream's own predictions can choose settings too (``KalmanConfig.tune``), but they include the first examples, when
the belief is still wide. For a data set that is passed over several times, another candidate is often best. So one
example in ``HELDOUT_SHARE`` is held out, scores every candidate at its best size and sharpness, and is used for the
last updates. Ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple, TypeGuard, cast

import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset

from bayes_kf.inference.config import KalmanConfig, check_config
from bayes_kf.inference.heldout import calibration
from bayes_kf.inference.posterior import Posterior
from bayes_kf.models.batch import Batch, split_batch

HELDOUT_SHARE = 8  # one example in 8 is held out


class Split(NamedTuple):
    """A data set in two parts.

    Attributes:
        fitted: most batches; candidates are fitted to them.
        heldout: the other batches.
    """

    fitted: Iterable[Any]
    heldout: Iterable[Any]


def check_candidates(configs: Iterable[KalmanConfig]) -> Sequence[KalmanConfig]:
    """The candidates as a list.

    Raises:
        ValueError: if there are none, or they are not KalmanConfigs with the same likelihood.
    """
    if isinstance(configs, str | Mapping) or not isinstance(configs, Iterable):
        check_config(configs)
    candidates = list(configs)
    if not candidates:
        raise ValueError("`config` must be a KalmanConfig or several, got none.")
    for config in candidates:
        check_config(config)
    likelihoods = sorted({config.likelihood for config in candidates})
    if len(likelihoods) > 1:
        raise ValueError(f"`config` must have one `likelihood` in all candidates, got {', '.join(likelihoods)}.")
    return candidates


class ShuffledBatches:
    """Batches in a new order in every iteration, the same at every start of the program.

    Args:
        batches: kept as they are, but cut into pieces of at most ``size`` examples.
        size: the most examples of a batch.
    """

    def __init__(self, batches: Iterable[Any], size: int) -> None:
        self._generator, self._pieces = torch.Generator().manual_seed(0), list[Any]()
        for batch in batches:
            inputs, targets = split_batch(batch)
            whole = Batch.of(inputs, targets)
            self._pieces += [batch] if whole.size <= size else [(b.inputs, b.targets) for b in whole.chunks(size)]

    def __len__(self) -> int:
        return len(self._pieces)

    def __iter__(self) -> Iterator[Any]:
        for number in torch.randperm(len(self._pieces), generator=self._generator).tolist():
            yield self._pieces[number]


def shuffled(split: Split, size: int) -> Split:
    """The split with batches of at most ``size`` examples for the fitted part, in a new order in every pass.

    A DataLoader's examples are divided into other batches in every pass; those of a list stay together.
    """
    if isinstance(split.fitted, DataLoader):
        return Split(reloaded(split.fitted, None, True, size), split.heldout)
    return Split(ShuffledBatches(split.fitted, size), split.heldout)


def split_loader(loader: Iterable[Any], part: int = 0) -> Split | None:
    """A loader in two parts; None if it cannot be split, or is too small.

    There are eight held-out parts that have no example in common; ``part``, from 0 on, says which. Of a list, every
    eighth batch is held out. Of a DataLoader over a data set, one example in eight is held out, drawn
    with a fixed seed because a data set may be sorted. Both parts have batches of the loader's own size and kind, and
    together they hold all examples.
    """
    if isinstance(loader, list | tuple):
        if len(loader) < HELDOUT_SHARE:
            return None
        is_heldout = [(number + 1 + part) % HELDOUT_SHARE == 0 for number in range(len(loader))]
        fitted = [batch for batch, is_out in zip(loader, is_heldout, strict=True) if not is_out]
        return Split(fitted, [batch for batch, is_out in zip(loader, is_heldout, strict=True) if is_out])
    if not reads_all_examples(loader):
        return None  # the split could not keep the order or the choice of another sampler
    size, shuffled = len(cast(Sized, loader.dataset)), isinstance(loader.sampler, RandomSampler)
    if size < HELDOUT_SHARE:
        return None
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0)).tolist()
    first, last = ((part + step) * (size // HELDOUT_SHARE) for step in (0, 1))
    others = sorted(order[:first] + order[last:])
    return Split(reloaded(loader, others, shuffled), reloaded(loader, sorted(order[first:last]), False))


def heldout_loss(posterior: Posterior, heldout: Iterable[Any]) -> tuple[Posterior, float]:
    """The posterior at the size and sharpness that held-out data choose, and its log loss on them, in nats an example.

    If the settings give the temperature as a number, neither is changed.

    Raises:
        ValueError: if a batch has no targets or does not fit.
    """
    if posterior.config.temperature == "prequential":
        posterior = calibration.calibrate([posterior], [1.0], heldout)[0]
    log_prob = posterior.predict_loader(heldout).log_prob
    if log_prob is None:
        raise ValueError("`loader` must yield targets with every batch, got none in a held-out batch.")
    loss = -float(log_prob.double().mean())
    return posterior, loss if math.isfinite(loss) else math.inf


def reads_all_examples(loader: Iterable[Any]) -> TypeGuard[DataLoader[Any]]:
    """Whether a loader is a DataLoader that reads every example of a data set once in a pass."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return False
    sampler: Any = loader.sampler
    known = isinstance(sampler, RandomSampler | SequentialSampler) and not getattr(sampler, "replacement", False)
    return known and len(sampler) == len(cast(Sized, loader.dataset))


def reloaded(
    loader: DataLoader[Any],
    indices: list[int] | None,
    shuffled: bool,
    size: int | None = None,
    generator: torch.Generator | None = None,
) -> DataLoader[Any]:
    """A loader with the same options over some of the examples, or over all.

    Args:
        loader: the loader.
        indices: of the examples; None: all.
        shuffled: whether every pass has another order.
        size: of the batches; None: the loader's. With a size, the order depends on nothing outside the loader.
        generator: of the order; None: the loader's.
    """
    generator = loader.generator if generator is None else generator
    if size is not None and generator is None:
        generator = torch.Generator().manual_seed(0)
    return DataLoader(
        loader.dataset if indices is None else Subset(loader.dataset, indices),
        batch_size=size or loader.batch_size,
        shuffle=shuffled,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        generator=generator,
    )
