"""Which settings a data set asks for: candidates learn most of it, and the rest says which predicts best.

A stream's own predictions price a setting too (``KalmanConfig.tune``), but they pay for the first examples, when a
belief is still wide: on a data set that is passed over again, the setting that ends best is often another one. So one
example in ``SHARE`` is set aside, prices every candidate at every temperature, and is learned last.

Without settings the candidates are a careful prior and a wide one, both with passes of the mean, and, where the careful
one did better, a narrow one for networks that know the task already. Above 32 outputs the held-out part also
says what to divide the logits by. Ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset

from bayes_kf.inference.config import KalmanConfig, check_config
from bayes_kf.inference.posterior import Posterior
from bayes_kf.inference.predictive import heldout_calibration
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs, check_inputs, split_batch, to_device

SHARE = 8  # one in so many is held out
WIDE, NARROW = 10.0, 1.0  # sd of the logits under the wide prior and the narrow one
MANY = 32  # outputs above which the default looks at random directions of them


class Parts(NamedTuple):
    """A data set in two: most of it, and what is held out."""

    fitted: Iterable[Any]
    held_out: Iterable[Any]


def check(configs: Iterable[KalmanConfig]) -> Sequence[KalmanConfig]:
    """The candidates, which must be some and predict the same kind of targets.

    Raises:
        ValueError: otherwise.
    """
    if isinstance(configs, str | Mapping) or not isinstance(configs, Iterable):
        check_config(configs)
    found = list(configs)
    if not found:
        raise ValueError("`config` must be a KalmanConfig or several, got none.")
    for config in found:
        check_config(config)
    kinds = sorted({config.likelihood for config in found})
    if len(kinds) > 1:
        raise ValueError(f"`config` must have one `likelihood` in all candidates, got {', '.join(kinds)}.")
    return found


def default(model: nn.Module | AdapterModel, loader: Iterable[Any], seed: int = 0) -> Sequence[KalmanConfig]:
    """The candidates of a fit without settings: ``KalmanConfig.dataset``, a wider prior, and a narrower one."""
    adapter = model if isinstance(model, AdapterModel) else AdapterModel(model)
    inputs, _ = split_batch(next(iter(loader)))
    check_inputs(inputs)
    curvature = curvature_for(adapter, inputs)
    softmax = "held_out" if curvature == "sampled" else 1.0
    wide: dict[str, Any] = {"initial_spread": "constant", "initial_logit_sd": WIDE}
    settings: tuple[dict[str, Any], ...] = ({}, wide, {"initial_logit_sd": NARROW, "mean_passes": 0})
    common: dict[str, Any] = {"curvature": curvature, "softmax_temperature": softmax, "seed": seed}
    return [KalmanConfig.dataset(**common, **setting) for setting in settings]


def curvature_for(adapter: AdapterModel, inputs: Inputs) -> str:
    """The curvature of a fit without settings: "sampled" for more than ``MANY`` outputs, else "exact"."""
    outputs = adapter.outputs(adapter.vector(), to_device(inputs, adapter.device))
    return "sampled" if outputs.shape[1] > MANY else "exact"


def split(loader: Iterable[Any]) -> Parts | None:
    """A loader in two; None where that cannot be done, or would hold nothing out.

    Of a list every eighth batch is held out; of a data set behind a DataLoader one example in eight, drawn with a fixed
    seed (a data set may be sorted), in batches of the loader's own size and kind; none is dropped.
    """
    if isinstance(loader, list | tuple):
        if len(loader) < SHARE:
            return None
        held_out = loader[SHARE - 1 :: SHARE]
        return Parts([batch for number, batch in enumerate(loader) if (number + 1) % SHARE], held_out)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return None
    shuffled, data = isinstance(loader.sampler, RandomSampler), cast(Sized, loader.dataset)
    known = shuffled or isinstance(loader.sampler, SequentialSampler)
    if not known or getattr(loader.sampler, "replacement", False) or len(cast(Sized, loader.sampler)) != len(data):
        return None  # another order or choice of examples than this one could keep
    size = len(data)
    if size < SHARE:
        return None
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0)).tolist()
    cut = size // SHARE
    return Parts(_over(loader, sorted(order[cut:]), shuffled), _over(loader, sorted(order[:cut]), False))


def score(posterior: Posterior, held_out: Iterable[Any]) -> tuple[Posterior, float]:
    """The posterior at the temperature that predicts the held-out part best, and its log loss there, per example.

    And with the logits divided by the number that it asks for, where the settings say so. What was given as a number
    stays.
    """
    if posterior.config.softmax_temperature == "held_out":
        posterior = posterior.calibrate_softmax(held_out)
    if posterior.config.temperature == "prequential":
        posterior = heldout_calibration.calibrate_temperature(posterior, held_out)
    found = posterior.predict_loader(held_out)
    if found.log_prob is None:
        raise ValueError("`loader` must yield targets with every batch, got none in one that is held out.")
    loss = -float(found.log_prob.double().mean())
    return posterior, loss if math.isfinite(loss) else math.inf


def _over(loader: DataLoader[Any], which: list[int], shuffled: bool) -> DataLoader[Any]:
    """A loader like another one over some of its examples."""
    return DataLoader(
        Subset(loader.dataset, which),
        batch_size=loader.batch_size,
        shuffle=shuffled,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        generator=loader.generator,
    )
