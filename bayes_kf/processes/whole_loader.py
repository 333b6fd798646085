"""A loader that Accelerate has prepared for one of several processes, as it was before."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from bayes_kf.processes.launched import launched_group

OPTIONS = ("num_workers", "collate_fn", "pin_memory", "worker_init_fn")  # of a loader, which stay


def whole_loader(loader: Iterable[Any]) -> Iterable[Any]:
    """The batches of all processes, if Accelerate divided them; any other loader as it is.

    ``accelerator.prepare`` gives each process batches of its own, and repeats examples where they do not divide. Where
    processes share the work on each batch, all of them read the loader as it was before. So no example counts twice.
    """
    accelerate = sys.modules.get("accelerate.data_loader")  # loaded, if it has prepared anything
    if accelerate is None or launched_group() is None:
        return loader
    sampler: Any = getattr(loader, "batch_sampler", None)
    data: Any = getattr(loader, "dataset", None)
    options: dict[str, Any] = {name: getattr(loader, name, None) for name in OPTIONS}
    if isinstance(loader, accelerate.DataLoaderDispatcher):
        if isinstance(data, IterableDataset):
            return DataLoader(data, batch_size=loader.batch_size, drop_last=loader._drop_last, **options)
        inner = sampler
    elif isinstance(data, accelerate.IterableDatasetShard):
        return DataLoader(data.dataset, batch_size=data.batch_size, drop_last=data.drop_last, **options)
    elif isinstance(sampler, accelerate.BatchSamplerShard):
        inner = sampler.batch_sampler
    else:
        return loader
    if type(inner) is BatchSampler:
        size, last = inner.batch_size, inner.drop_last
        return DataLoader(data, batch_size=size, sampler=inner.sampler, drop_last=last, **options)
    return DataLoader(data, batch_sampler=inner, **options)
