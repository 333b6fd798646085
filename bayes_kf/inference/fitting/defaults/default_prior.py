"""The prior of class labels in a fit without a config: wide for a new classifier, narrower for one that knows them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bayes_kf.inference.heldout.sharpness import point_log_losses
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs, to_device

NEW: dict[str, Any] = {"initial_spread": "bounded", "initial_logit_sd": 5.0}
TRAINED: dict[str, Any] = {"initial_spread": "modules", "initial_logit_sd": 3.0}
STANDARD_ERRORS = 2.0


def default_prior(adapter: AdapterModel, batches: Sequence[tuple[Inputs, Tensor]]) -> dict[str, Any]:
    """The settings of the prior for class labels.

    The model as it is given knows the labels if its log loss, at the sharpness that suits these examples, is below that
    of the labels' frequencies by more than two standard errors of the difference. Under a prior for a new classifier it
    would forget what it knows where labels are few or wrong. Ours.

    Args:
        adapter: the model.
        batches: some of the examples, inputs and labels (B,). If they do not fit, the fit says so when it reads them.
    """
    try:
        gain = _gain_over_frequencies(adapter, batches)
    except (TypeError, ValueError):
        return NEW
    error = float(gain.std()) / math.sqrt(len(gain)) if len(gain) > 1 else math.inf
    return TRAINED if float(gain.mean()) > STANDARD_ERRORS * error else NEW


def _gain_over_frequencies(adapter: AdapterModel, batches: Sequence[tuple[Inputs, Tensor]]) -> Tensor:
    """By how much the log loss of the labels' frequencies exceeds that of the model, (N,) in nats."""
    outputs = torch.cat([adapter.outputs(adapter.vector(), to_device(x, adapter.device)) for x, _ in batches])
    labels = torch.cat([y for _, y in batches]).to(outputs.device)
    losses = point_log_losses("categorical", outputs, labels)
    counts = torch.bincount(labels, minlength=outputs.shape[1]).double()
    return -(counts / counts.sum()).log()[labels] - losses
