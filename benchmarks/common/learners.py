"""Streams, and passes over them: one example at a time, each predicted before the update."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from bayes_kf import DivergenceError, KalmanConfig, KalmanFilter

HEAD_SD = 0.02  # of a new classifier, as in transformers
SCALE_EXAMPLES = 32  # first inputs for the scale of the prior, as in ``bayes_kf.fit``

Inputs = Tensor | dict[str, Tensor]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Stream(NamedTuple):
    """Inputs (N, ...), or a mapping of keyword arguments of length N, and labels (N,), in the order of the stream."""

    inputs: Inputs
    labels: Tensor

    def batches(self, size: int = 1) -> list[tuple[Inputs, Tensor]]:
        """The stream in batches; texts are cut to the longest of their batch."""
        labels = self.labels.split(size)
        if isinstance(self.inputs, Tensor):
            return list(zip(self.inputs.split(size), labels, strict=True))
        parts = {name: tensor.split(size) for name, tensor in self.inputs.items()}
        pairs = []
        for index, target in enumerate(labels):
            longest = int(parts["attention_mask"][index].sum(1).max())
            pairs.append(({name: part[index][:, :longest] for name, part in parts.items()}, target))
        return pairs

    def first(self, number: int) -> Stream:
        """The first ``number`` examples."""
        return self.at(slice(number))

    def at(self, which: Tensor | slice) -> Stream:
        """The examples at ``which``."""
        if isinstance(self.inputs, Tensor):
            return Stream(self.inputs[which], self.labels[which])
        return Stream({name: tensor[which] for name, tensor in self.inputs.items()}, self.labels[which])


class Pass(NamedTuple):
    """Numbers of a pass, before each update.

    Attributes:
        correct: whether the most probable class was the label, (T,) bool.
        log_loss: −log p(label), (T,), in nats.
        seconds: processor seconds per step.
        diverged_at: index of the refused update, or None.
        cause: the reason of the refusal, or None.
    """

    correct: Tensor
    log_loss: Tensor
    seconds: float
    diverged_at: int | None = None
    cause: str | None = None


def draw_classifier(model: nn.Module, seed: int) -> None:
    """Replace the trainable classifier's weights by new ones, drawn as in transformers, for new classes."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "classifier" in name:
            drawn = HEAD_SD * torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(drawn if name.endswith("weight") else torch.zeros_like(drawn))


def logits(model: nn.Module, inputs: Inputs) -> Tensor:
    """A model's logits, (B, m), which it returns as a tensor or in an object."""
    outputs = model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def gradient_pass(model: nn.Module, stream: Stream, make_optimizer: MakeOptimizer, decay: bool = False) -> Pass:
    """A pass of a gradient optimizer over ``model``, which is changed.

    Args:
        model: in evaluation mode; its trainable tensors are optimized.
        stream: to learn.
        make_optimizer: returns an optimizer of the parameters.
        decay: whether the learning rate falls linearly to zero over the stream.
    """
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    total = len(stream.labels)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total if decay else 1.0)
    correct, losses = [], []
    start = time.process_time()
    for inputs, labels in quiet_bar(stream.batches()):
        outputs = logits(model, inputs)
        loss = F.cross_entropy(outputs, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        correct.append(outputs.detach().argmax(1) == labels)
        losses.append(loss.detach().view(1))
    return _pass(correct, losses, start)


@torch.no_grad()
def frozen_pass(model: nn.Module, stream: Stream) -> Pass:
    """A pass that only predicts."""
    correct, losses = [], []
    start = time.process_time()
    for inputs, labels in quiet_bar(stream.batches()):
        outputs = logits(model, inputs)
        correct.append(outputs.argmax(1) == labels)
        losses.append(F.cross_entropy(outputs, labels).view(1))
    return _pass(correct, losses, start)


def kalman_pass(
    model: nn.Module, stream: Stream, config: KalmanConfig, give_up: Callable[[Tensor, Tensor], bool] | None = None
) -> Pass:
    """A pass of a filter, up to a refused update, if any.

    Args:
        model: not changed.
        stream: to learn.
        config: the filter's settings.
        give_up: whether to stop, from ``correct`` and ``log_loss`` so far; called after every hundredth example.

    Raises:
        FloatingPointError: if a state or a score is NaN or infinite.
    """
    kf = KalmanFilter(model, config)
    state = kf.init(stream.first(SCALE_EXAMPLES).inputs)
    correct: list[Tensor] = []
    losses: list[Tensor] = []
    refused = None
    start = time.process_time()
    for inputs, labels in quiet_bar(stream.batches()):
        try:
            state, info = kf.update(state, inputs, labels)
        except DivergenceError as error:
            state, refused = error.state, error
            break
        check_finite("state", state)
        check_finite("log_loss", info.log_loss)
        if math.isnan(info.innovation):
            raise FloatingPointError(f"the innovation of update {state.step - 1} is NaN")
        assert info.correct is not None  # a classifier
        correct.append(info.correct)
        losses.append(info.log_loss)
        if give_up is not None and len(losses) % 100 == 0 and give_up(torch.cat(correct), torch.cat(losses)):
            break
    result = _pass(correct, losses, start)
    check_finite("state", state)
    return result if refused is None else result._replace(diverged_at=refused.step, cause=refused.cause)


def check_finite(where: str, value: Any) -> None:
    """Raise FloatingPointError if a tensor in nested tuples has a NaN or an infinity."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            raise FloatingPointError(f"{bad} values of {where} are not finite")
    elif isinstance(value, tuple):
        names = getattr(value, "_fields", range(len(value)))
        for name, part in zip(names, value, strict=True):
            check_finite(f"{where}.{name}", part)


def quiet_bar(items: list[Any]) -> Iterable[Any]:
    """A progress bar that disappears at its end; none if standard error is not a terminal."""
    return tqdm(items, leave=False, disable=not sys.stderr.isatty(), position=1, mininterval=0.5)


def _pass(correct: list[Tensor], losses: list[Tensor], start: float) -> Pass:
    seconds = (time.process_time() - start) / max(1, len(correct))
    if not correct:
        return Pass(torch.empty(0, dtype=torch.bool), torch.empty(0), seconds)
    result = Pass(torch.cat(correct).bool(), torch.cat(losses), seconds)
    if bool(torch.isnan(result.log_loss).any()):
        raise FloatingPointError("a log loss of the pass is NaN")
    return result
