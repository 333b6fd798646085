"""The interface between rows and loops: learners, which learn from batches and predict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayes_kf import Bank, KalmanConfig, KalmanFilter, Posterior
from bayes_kf.inference.filtering.state import DIVERGED
from bayes_kf.inference.fitting.passes import mean_pass
from benchmarks.common.learners import Inputs, logits


class Learner(Protocol):
    """A row with one model.

    A learner that diverges raises one of :data:`STOPS`.
    """

    def learn(self, inputs: Inputs, labels: Tensor) -> Tensor:
        """Learn a batch; return the logits before the update, (B, m)."""

    def begin_epoch(self, number: int, epochs: int, examples: int) -> None:
        """Called before epoch ``number`` (from 0) of several over the same ``examples``; not in the online bench."""

    def settle(self) -> None:
        """Write the learned point into the model."""

    def probs(self, inputs: Inputs) -> Tensor:
        """Predicted probabilities, (B, m), float64."""

    def bytes(self) -> int:
        """Bytes of its state besides the model."""


STOPS = (*DIVERGED, OverflowError, ZeroDivisionError)
"""Errors of a divergence; any other error is one of the code."""


class GradientLearner:
    """An optimizer with the interface of ``torch.optim``; the model itself holds the learned point.

    An optimizer with its own ``backward(loss, outputs)``, such as K-FAC, gets both.

    Args:
        model: in evaluation mode; its trainable tensors are changed.
        optimizer: over those tensors.
        decay_over: updates over which the learning rate falls linearly to zero; None: constant.
        forward: a context for the forward passes of learning (double backward through attention needs one).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        decay_over: int | None = None,
        forward: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model, self.optimizer, self._forward = model, optimizer, forward
        self._backward = getattr(optimizer, "backward", None)
        self._schedule = None if decay_over is None else linear_decay(optimizer, decay_over)

    def learn(self, inputs: Inputs, labels: Tensor) -> Tensor:
        """An optimizer step."""
        with self._forward():
            outputs = logits(self.model, inputs)
            loss = F.cross_entropy(outputs, labels)
            before = outputs.detach().clone()
            check_finite(before)
            self.optimizer.zero_grad()
            if self._backward is None:
                loss.backward()
            else:
                self._backward(loss, outputs)
        self.optimizer.step()
        if self._schedule is not None:
            self._schedule.step()
        return before

    def begin_epoch(self, number: int, epochs: int, examples: int) -> None:
        """Nothing: a gradient step does not depend on earlier epochs."""

    def settle(self) -> None:
        """Nothing: the model has the point."""

    @torch.no_grad()
    def probs(self, inputs: Inputs) -> Tensor:
        """Softmax."""
        outputs = logits(self.model, inputs).double()
        check_finite(outputs)
        return outputs.softmax(1)

    def bytes(self) -> int:
        """Bytes of the optimizer's tensors, without gradients."""
        return optimizer_bytes(self.optimizer)


class KalmanLearner:
    """A filter, which predicts with its posterior (linearized); the learned point is its mean.

        Several epochs count no example twice: the first is the filter's pass. In later ones only the mean changes, by
    natural-gradient steps under the covariance of the first (``bayes_kf.inference.fitting.passes.mean_pass``).

    Args:
        model: changed only by :meth:`settle`.
        config: the filter's settings.
        inputs: for the scale of the prior.
    """

    def __init__(self, model: nn.Module, config: KalmanConfig, inputs: Inputs) -> None:
        self.kf = KalmanFilter(model, config)
        self.state = self.kf.init(inputs)
        self._done: float | None = None  # completed share of the mean passes; None in the filter's pass
        self._per_example = 0.0

    def learn(self, inputs: Inputs, labels: Tensor) -> Tensor:
        """An update of the filter or, in later epochs, of its mean."""
        if self._done is None:
            self.state, info = self.kf.update(self.state, inputs, labels)
            check_finite(info.outputs)
            return info.outputs
        outputs = self.kf.adapter.outputs(self.state.belief.mean, inputs)
        check_finite(outputs)
        rate = mean_pass.STEP_SIZE * (1.0 - self._done)
        self.state, _ = mean_pass.natural_gradient_step(
            self.kf.config, self.kf.adapter, self.state, inputs, labels, rate
        )
        self._done = min(1.0, self._done + len(labels) * self._per_example)
        return outputs

    def begin_epoch(self, number: int, epochs: int, examples: int) -> None:
        """From the second epoch on, only the mean changes."""
        if number:
            self._done = (number - 1) / (epochs - 1)
            self._per_example = 1.0 / (examples * (epochs - 1))

    def settle(self) -> None:
        """Write the mean."""
        self.kf.adapter.assign(self.state.belief.mean)

    def probs(self, inputs: Inputs) -> Tensor:
        """Probabilities of the posterior."""
        predicted = Posterior(self.kf, self.state).predict(inputs).probs
        assert predicted is not None  # a classifier
        check_finite(predicted)
        return predicted.double()

    def bytes(self) -> int:
        """Bytes of Gaussian, prior, noise and scores."""
        return sum(tensor.numel() * tensor.element_size() for tensor in distinct(self.state))


class BankLearner:
    """A bank of filters, whose predictions are averaged by evidence.

    Args:
        model: changed only by :meth:`settle`.
        configs: the filters' settings.
        inputs: for the scales of the priors.
        until: examples after which only the filter with the most evidence continues, as in ``fit``; None: never.
        margin: of the bank.
    """

    def __init__(
        self,
        model: nn.Module,
        configs: Sequence[KalmanConfig],
        inputs: Inputs,
        until: int | None = None,
        margin: float = 0.0,
    ) -> None:
        self.bank, self._until, self._seen = Bank(model, configs, margin), until, 0
        self.state = self.bank.init(inputs)

    def learn(self, inputs: Inputs, labels: Tensor) -> Tensor:
        """An update of all filters."""
        self.state, info = self.bank.update(self.state, inputs, labels)
        check_finite(info.outputs)
        self._seen += len(labels)
        if self._until is not None and self._seen >= self._until and len(self.bank.filters) > 1:
            best = self.bank.best(self.state)
            self.bank = Bank(self.bank.adapter, [self.bank.filters[best].config])
            self.state = self.bank.init()._replace(states=(self.state.states[best],), step=self.state.step)
        return info.outputs

    def begin_epoch(self, number: int, epochs: int, examples: int) -> None:
        """Nothing: a bank learns streams only."""

    def settle(self) -> None:
        """Write the mean of the filter with the most evidence."""
        self.bank.adapter.assign(self.bank.posterior(self.state).mean_vector)

    def probs(self, inputs: Inputs) -> Tensor:
        """Probabilities averaged by evidence."""
        predicted = self.bank.predict(self.state, inputs).probs
        assert predicted is not None  # a classifier
        check_finite(predicted)
        return predicted.double()

    def bytes(self) -> int:
        """Bytes of Gaussians, priors, noise and scores."""
        return sum(tensor.numel() * tensor.element_size() for tensor in distinct(self.state))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The trainable tensors."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def linear_decay(optimizer: torch.optim.Optimizer, num_steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A learning rate that falls linearly to zero."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1.0 - step / num_steps))


def check_finite(outputs: Tensor) -> None:
    """Raise FloatingPointError if a prediction is not finite."""
    if not bool(torch.isfinite(outputs).all()):
        raise FloatingPointError("the outputs are not finite")


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's tensors, without the parameters and their gradients."""
    parameters = {p.data_ptr() for group in optimizer.param_groups for p in group["params"]}
    held = [value for name, value in vars(optimizer).items() if name not in ("param_groups", "defaults")]
    tensors = [tensor for tensor in distinct(held) if tensor.data_ptr() not in parameters]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def distinct(value: Any) -> list[Tensor]:
    """The tensors in nested containers and plain objects, each once, without those of modules."""
    tensors: dict[int, Tensor] = {}
    seen: set[int] = set()

    def visit(item: Any) -> None:
        if isinstance(item, Tensor):
            if item.numel():
                tensors.setdefault(item.data_ptr(), item)
            return
        if id(item) in seen or isinstance(item, nn.Module | str | bytes | type):
            return
        seen.add(id(item))
        for part in parts(item):
            visit(part)

    def parts(item: Any) -> Iterator[Any]:
        if isinstance(item, Mapping):
            return iter(item.values())
        if isinstance(item, list | tuple | set | frozenset):
            return iter(item)
        if type(item).__module__.startswith(("bayes_kf", "bench")):
            return iter(vars(item).values() if hasattr(item, "__dict__") else ())
        return iter(())

    visit(value)
    return list(tensors.values())
