"""Several fits of real targets from other starts, as a mixture with equal weights.

A network that is trained from scratch has many modes of like probability, and their mean predicts better than each
(Lakshminarayanan et al. 2017). Every member but the first starts from, and has as its prior mean, the network's own
initial tensors with the elements of each in another order: for elements that were drawn independently this is another
draw of them, whatever their distribution, and tensors of one number stay. Where some tensors are frozen, the trainable
ones may come from elsewhere, and the members differ in the orders of their batches alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from bayes_kf.inference.fitting.regression.regression_fit import fit_regression, is_partly_frozen
from bayes_kf.inference.mixture.mixture_posterior import MixturePosterior
from bayes_kf.models.adapter import AdapterModel

MEMBERS = 3


def fit_regression_mixture(
    model: nn.Module | AdapterModel, loader: Iterable[Any], progress: bool, members: int = MEMBERS, seed: int = 0
) -> MixturePosterior:
    """The mixture of ``members`` fits; other arguments and errors as for :func:`.regression_fit.fit_regression`."""
    adapter = model if isinstance(model, AdapterModel) else AdapterModel(model)
    fits = [fit_regression(adapter, loader, progress, seed)]
    for other in range(seed + 1, seed + members):
        fits.append(fit_regression(other_start(adapter, other), loader, progress, other).with_adapter(adapter))
    return MixturePosterior(tuple(fits), (1.0 / members,) * members, fits[0].history)


def other_start(adapter: AdapterModel, seed: int) -> AdapterModel:
    """A copy of the model with the elements of each tensor in another order; the model itself if some are frozen."""
    if is_partly_frozen(adapter):
        return adapter
    generator, tensors = torch.Generator().manual_seed(seed), adapter.unflatten(adapter.vector())
    for name, tensor in tensors.items():
        order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
        tensors[name] = tensor.flatten()[order].view(tensor.shape)
    other = AdapterModel(copy.deepcopy(adapter.model))
    other.assign(adapter.flatten(tensors))
    return other
