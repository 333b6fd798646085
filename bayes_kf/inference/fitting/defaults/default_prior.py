"""The prior of class labels in a fit without a config: wide for a new classifier, narrower for one that knows them.

Under a prior that is too wide for a network, each step of the filter changes far more than the example that it learns,
and the next examples are predicted worse than by the labels' frequencies. Then the next narrower prior is tried, and
kept if its pass predicted better: a model that is surely wrong before the fit loses to the frequencies too, and needs a
wide prior.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.heldout.sharpness import point_log_losses
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs, to_device

NEW: dict[str, Any] = {"initial_spread": "bounded", "initial_logit_sd": 5.0}
TRAINED: dict[str, Any] = {"initial_spread": "modules", "initial_logit_sd": 3.0}
CAREFUL: dict[str, Any] = {"initial_spread": "modules", "initial_logit_sd": 1.0}
KNOWN = 0.5  # loss of a classifier that knows the labels, relative to that of their frequencies


def default_prior(adapter: AdapterModel, batches: Sequence[tuple[Inputs, Tensor]]) -> dict[str, Any]:
    """The settings of the prior for class labels.

    The model as it is given knows the labels if its log loss, at the sharpness that suits these examples, is below half
    that of the labels' frequencies. Under a prior for a new classifier it would forget what it knows where labels are
    few or wrong; under a narrower one it would not learn enough where it knows them by halves. Ours.

    Args:
        adapter: the model.
        batches: some of the examples, inputs and labels (B,). If they do not fit, the fit says so when it reads them.
    """
    try:
        return TRAINED if _relative_loss(adapter, batches) < KNOWN else NEW
    except (TypeError, ValueError):
        return NEW


def narrower_priors(config: KalmanConfig) -> list[dict[str, Any]]:
    """The priors to try after that of ``config``, a default one of class labels; none after others."""
    if config.likelihood != "categorical":
        return []
    ladder = [NEW, TRAINED, CAREFUL]
    own = {"initial_spread": config.initial_spread, "initial_logit_sd": config.initial_logit_sd}
    return ladder[ladder.index(own) + 1 :] if own in ladder else []


def later_loss(log_losses: Tensor) -> float:
    """Mean log loss of the later half of a pass, each example before its update, in nats."""
    return float(log_losses[len(log_losses) // 2 :].double().mean())


def learned_nothing(log_losses: Tensor, labels: Sequence[Tensor]) -> bool:
    """Whether the later half of a pass was predicted no better than by the labels' frequencies.

    Args:
        log_losses: of each example before its update, (N,), in nats.
        labels: of each batch, (B,).
    """
    counts = torch.bincount(torch.cat([some.flatten().cpu().long() for some in labels])).double()
    shares = counts[counts > 0] / counts.sum()
    return later_loss(log_losses) >= float(torch.special.entr(shares).sum())


def _relative_loss(adapter: AdapterModel, batches: Sequence[tuple[Inputs, Tensor]]) -> float:
    """The log loss of the model over that of the labels' frequencies; infinite if all labels are the same."""
    outputs = torch.cat([adapter.outputs(adapter.vector(), to_device(x, adapter.device)) for x, _ in batches])
    labels = torch.cat([y for _, y in batches]).to(outputs.device)
    losses = point_log_losses("categorical", outputs, labels)
    counts = torch.bincount(labels, minlength=outputs.shape[1]).double()
    of_frequencies = -(counts / counts.sum()).log()[labels].mean()
    return float(losses.mean() / of_frequencies) if float(of_frequencies) > 0.0 else math.inf
