"""The four methods of the demo; each gives a row of the table with a report."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from bayes_kf.evaluation import Report, evaluate, evaluate_predictions
from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.fitting.fit import fit
from bayes_kf.inference.posterior import Posterior
from bayes_kf.models.zoo import digits_vit, lora_digits_vit
from tutorials.digits_demo.data import DemoData

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
"""Candidate learning rates of AdamW."""


class Row(NamedTuple):
    """A method and its scores.

    Attributes:
        name: name of the method.
        report: report on its predictions for the held-out images, and on the stream.
        history: "correct" and "log_loss" of each image of the stream before its update.
        seconds: duration of one pass over the stream.
        notes: further values by name.
    """

    name: str
    report: Report
    history: Mapping[str, Tensor]
    seconds: float
    notes: dict[str, Any]


def frozen_row(name: str, data: DemoData, progress: bool) -> Row:
    """The frozen model."""
    model = digits_vit()
    history, seconds = stream(model, data.stream_loader, None, _bar(progress, name))
    return Row(name, point_report(model, data, history, name), history, seconds, {})


def best_adamw_row(name: str, data: DemoData, rank: int, seed: int, progress: bool) -> Row:
    """LoRA trained by AdamW, one step per image, at the learning rate of `RATES` with the best accuracy online."""
    rows = [adamw_row(name, rate, data, rank, seed, progress) for rate in RATES]
    best = max(rows, key=lambda row: row.report.scores["online_accuracy"])
    accuracy_by_rate = {row.notes["learning_rate"]: row.report.scores["online_accuracy"] for row in rows}
    notes = {"online_accuracy_by_rate": accuracy_by_rate, "seconds_of_all_rates": sum(row.seconds for row in rows)}
    return best._replace(notes=best.notes | notes)


def adamw_row(name: str, rate: float, data: DemoData, rank: int, seed: int, progress: bool) -> Row:
    """LoRA trained by AdamW at one learning rate."""
    model = lora_digits_vit(rank, seed=seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    history, seconds = stream(model, data.stream_loader, optimizer, _bar(progress, f"{name}, rate {rate:g}"))
    return Row(name, point_report(model, data, history, name), history, seconds, {"learning_rate": rate})


def kalman_row(name: str, config: KalmanConfig, data: DemoData, rank: int, progress: bool) -> tuple[Row, Posterior]:
    """LoRA filtered with these settings, and the posterior."""
    start = time.perf_counter()
    with tqdm(data.stream_loader, **_bar(progress, name)) as bar:
        posterior = fit(lora_digits_vit(rank, seed=config.seed), bar, config, progress=False)
    seconds = time.perf_counter() - start
    report = evaluate(posterior, data.heldout_loader, ood=data.ood, class_names=_digits(), title=f"UCI digits: {name}")
    return Row(name, report, posterior.history, seconds, {"temperature": posterior.temperature}), posterior


def stream(
    model: nn.Module, loader: Iterable[Any], optimizer: torch.optim.Optimizer | None, bar: dict[str, Any]
) -> tuple[dict[str, Tensor], float]:
    """The history and the duration of a stream: predict each batch, then learn it if there is an optimizer."""
    correct, losses, start = [], [], time.perf_counter()
    with torch.set_grad_enabled(optimizer is not None):
        for inputs, targets in tqdm(loader, **bar):
            logits = model(inputs).logits
            loss = F.cross_entropy(logits, targets, reduction="none")
            correct.append((logits.argmax(-1) == targets).float())
            losses.append(loss.detach())
            if optimizer is not None:
                optimizer.zero_grad()
                loss.mean().backward()
                optimizer.step()
    return {"correct": torch.cat(correct), "log_loss": torch.cat(losses)}, time.perf_counter() - start


def point_report(model: nn.Module, data: DemoData, history: Mapping[str, Tensor], name: str) -> Report:
    """The report on the softmax of a model."""
    log_probs, labels = log_softmax(model, data.heldout_loader), data.heldout.labels
    return evaluate_predictions(
        log_probs.exp(),
        labels,
        log_prob=log_probs.gather(1, labels.unsqueeze(1)).squeeze(1),
        ood={kind: log_softmax(model, loader).exp() for kind, loader in data.ood.items()},
        history=history,
        class_names=_digits(),
        title=f"UCI digits: {name}",
    )


@torch.no_grad()
def log_softmax(model: nn.Module, loader: Iterable[Any]) -> Tensor:
    """Log probabilities, (N, C), float64."""
    return torch.cat([model(batch[0]).logits for batch in loader]).double().log_softmax(-1)


def _bar(progress: bool, name: str) -> dict[str, Any]:
    return {"desc": f"{name:<26}", "unit": "image", "disable": not progress}


def _digits() -> list[str]:
    return [str(digit) for digit in range(10)]
