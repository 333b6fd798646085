"""AdamW as careful practitioners use it: early stopping, the rate and the temperature chosen on a held-out eighth.

Batches of 16 in a new order each epoch, weight decay 1e-2, a rate that falls linearly to zero over the allowed epochs.
After each epoch the held-out loss is measured; training stops after ``patience`` epochs without a better one, and the
weights of the best epoch are kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from benchmarks.common.learners import Stream, logits
from benchmarks.quality.rows import raw

BATCH, WEIGHT_DECAY = 16, 1e-2
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
MEMBERS = 3
MAX_TEMPERATURE = 10.0  # and its inverse is the least
PRIOR_SD = 0.5  # of ln S


class Plan(NamedTuple):
    """The most epochs, those without a better held-out loss after which training stops, the loss, and the rates."""

    epochs: int
    patience: int
    loss: Callable[[Tensor, Tensor], Tensor]
    rates: Sequence[float] = RATES


FINE_TUNING = Plan(10, 3, F.cross_entropy)
FROM_SCRATCH = Plan(100, 10, F.mse_loss)  # ten epochs are for adapters; a new network needs more


class Run(NamedTuple):
    """A trained model.

    Attributes:
        model: with the weights of the best epoch.
        loss: its held-out loss; infinite if no epoch had a finite one.
        epochs: that were run.
        best_epoch: counted from 1; 0 if there is none.
        rate: the learning rate.
        seconds: processor seconds, with those of the held-out losses.
    """

    model: nn.Module
    loss: float
    epochs: int
    best_epoch: int
    rate: float
    seconds: float


def train(model: nn.Module, fitted: Stream, heldout: Stream, seed: int, rate: float, plan: Plan) -> Run:
    """AdamW with early stopping; ``model`` is changed."""
    begun = time.process_time()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=WEIGHT_DECAY)
    steps = plan.epochs * math.ceil(len(fitted.labels) / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(seed)
    best, best_loss, best_epoch, epoch = [], math.inf, 0, 0
    while epoch < plan.epochs and epoch - best_epoch < plan.patience:
        epoch += 1
        for inputs, labels in fitted.at(torch.randperm(len(fitted.labels), generator=generator)).batches(BATCH):
            optimizer.zero_grad(set_to_none=True)
            plan.loss(logits(model, inputs), labels).backward()
            optimizer.step()
            schedule.step()
        loss = plan.loss(raw(model, heldout), _in_double(heldout.labels)).item()
        if loss < best_loss:
            best, best_loss, best_epoch = [p.detach().clone() for p in parameters], loss, epoch
    with torch.no_grad():
        for parameter, value in zip(parameters, best or parameters, strict=True):
            parameter.copy_(value)
    return Run(model, best_loss, epoch, best_epoch, rate, time.process_time() - begun)


def search(make: Callable[[int], nn.Module], fitted: Stream, heldout: Stream, seed: int, plan: Plan) -> list[Run]:
    """A run at each rate, the one with the least held-out loss first.

    Raises:
        FloatingPointError: if no run has a finite loss.
    """
    runs = sorted(
        (train(make(seed), fitted, heldout, seed, rate, plan) for rate in plan.rates), key=lambda run: run.loss
    )
    if math.isinf(runs[0].loss):
        raise FloatingPointError("no learning rate has a finite held-out loss")
    return runs


def members(
    make: Callable[[int], nn.Module], fitted: Stream, heldout: Stream, seed: int, plan: Plan
) -> tuple[list[Run], list[Run]]:
    """The members of an ensemble, and the runs of the search that are not used.

    The first member is the best run of :func:`search`; the others are runs at its rate with another adapter, classifier
    and order. So the members cost as much as three runs, and the search three runs more.
    """
    runs = search(make, fitted, heldout, seed, plan)
    return [runs[0], *more_members(make, fitted, heldout, seed, plan, runs[0].rate)], runs[1:]


def more_members(
    make: Callable[[int], nn.Module], fitted: Stream, heldout: Stream, seed: int, plan: Plan, rate: float
) -> list[Run]:
    """The members of an ensemble after the first."""
    seeds = [1000 + MEMBERS * seed + number for number in range(1, MEMBERS)]
    return [train(make(s), fitted, heldout, s, rate, plan) for s in seeds]


def fitted_temperature(probs: Tensor, labels: Tensor, prior_sd: float = PRIOR_SD) -> float:
    """The temperature S of p^(1/S), normalized, that held-out examples choose.

    It minimizes Σ −log p(label) + ½ (ln S / prior_sd)² between 0.1 and 10, on a grid in ln S that is then refined.
    Without the prior (infinite ``prior_sd``) a small held-out part whose answers are all right asks for S = 0, so that
    the limit decides: on ants and bees S = 0.1 and a test NLL of 2. The prior costs nothing where labels inform on S.

    Args:
        probs: held-out probabilities (N, C).
        labels: (N,).
        prior_sd: standard deviation of ln S.
    """
    logs = probs.log().clamp_min(-1e4)

    def objective(log_temperature: float) -> float:
        loss = F.cross_entropy(logs / math.exp(log_temperature), labels, reduction="sum").item()
        return loss + 0.5 * (log_temperature / prior_sd) ** 2

    limit = math.log(MAX_TEMPERATURE)
    grid = torch.linspace(-limit, limit, 201, dtype=torch.float64).tolist()
    best = min(grid, key=objective)
    step = grid[1] - grid[0]
    bounds = max(best - step, -limit), min(best + step, limit)
    refined = minimize_scalar(objective, bounds=bounds, method="bounded", options={"xatol": 1e-8}).x
    return math.exp(min(refined, best, *bounds, key=objective))


def scaled(probs: Tensor, temperature: float) -> Tensor:
    """Probabilities p^(1/S), normalized, (N, C)."""
    return (probs.log() / temperature).softmax(1)


def facts(used: Sequence[Run], unused: Sequence[Run]) -> dict[str, object]:
    """The chosen rate, epochs of all runs, and the processor seconds of the runs that predict nothing."""
    return {
        "rate": used[0].rate,
        "epochs": [run.epochs for run in (*used, *unused)],
        "best_epochs": [run.best_epoch for run in used],
        "search_seconds": sum(run.seconds for run in unused),
    }


def _in_double(labels: Tensor) -> Tensor:
    return labels.double() if labels.is_floating_point() else labels
