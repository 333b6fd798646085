"""Passes over the data that move only the mean, toward the mode of the posterior, by natural-gradient steps.

The filter linearizes the model once for every example, at the mean of that moment. If the model is not linear, the mean
after one pass is not yet the mode. With the covariance P of that pass, each batch b of B of the N examples moves it by

    μ ← μ − r P g / (1 + r gᵀPg),    g = −∇ log p(y_b | θ) + (B/N) P₀⁻¹(μ − μ₀) at μ.

This is stochastic descent on −log p(y, θ) in the metric of the posterior; a pass with r = 1 makes about one Newton
step. The denominator is that of a Kalman update with an observation along g, so no example moves the mean further than
the filter would. r decreases linearly from ``STEP_SIZE`` to zero over the passes. No example counts twice: the steps do
not change the minimum, and P stays that of the first pass. A pass costs as much as one of gradient descent. Ours;
natural gradients are from Amari (1998).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import DivergenceError, FilterState
from bayes_kf.inference.fitting.loop import LoopStep, run_loop
from bayes_kf.inference.fitting.passes.filter_pass import check_same_examples
from bayes_kf.inference.fitting.progress import ProgressBar
from bayes_kf.inference.measurement_model import noise
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Batch, Inputs, check_inputs
from bayes_kf.models.likelihood import Likelihood
from bayes_kf.processes import shared_work

STEP_SIZE = 1.0  # r of the first step


def mean_pass(
    kf: KalmanFilter,
    before: FilterState,
    loader: Iterable[Any],
    number: int,
    passes: int,
    progress: ProgressBar,
    step_size: float = STEP_SIZE,
) -> tuple[FilterState, float]:
    """The state after one mean pass, and the log loss per example, in nats, each before its own step.

    Args:
        kf: the filter.
        before: the state after the passes that estimated P.
        loader: the same examples.
        number: index of this mean pass, from 0.
        passes: the number of mean passes.
        progress: advanced after every batch.
        step_size: r of the first step of the first pass.

    Raises:
        ValueError: if the loader yields another number of examples.
        DivergenceError: if the mean is not finite; its state is ``before``.
    """

    def step(state: FilterState, inputs: Inputs, targets: Tensor, examples: int) -> tuple[FilterState, float]:
        done = (number + examples / before.examples) / passes
        return natural_gradient_step(kf.config, kf.adapter, state, inputs, targets, step_size * (1.0 - done))

    return pass_of_steps(before, loader, step, progress)


def pass_of_steps(
    before: FilterState,
    loader: Iterable[Any],
    step: Callable[[FilterState, Inputs, Tensor, int], tuple[FilterState, float]],
    progress: ProgressBar,
) -> tuple[FilterState, float]:
    """The state after a step with every batch, and the log loss per example, in nats, each before its own step.

    Args:
        before: the state before the pass; its ``examples`` are those that the loader must yield.
        loader: the same examples as in earlier passes.
        step: from a state, inputs, targets and the number of examples so far to the state after the batch and its
            summed log loss before.
        progress: advanced after every batch.

    Raises:
        ValueError: if the loader yields another number of examples.
        DivergenceError: if the mean is not finite; its state is ``before``.
    """
    total, examples = 0.0, 0

    def update(state: FilterState, inputs: Inputs, targets: Tensor) -> tuple[FilterState, float]:
        after, loss = step(state, inputs, targets, examples)
        if not bool(torch.isfinite(after.belief.mean).all()):
            raise DivergenceError(before.step, f"the mean in batch {progress.done} of a mean pass", before)
        return after, loss

    def add_loss(step: LoopStep[FilterState, float]) -> None:
        nonlocal total, examples
        total, examples = total + step.info, examples + len(step.targets)

    state = run_loop(loader, before, update, [add_loss], progress, lambda: f"log loss {total / examples:.3f}")
    check_same_examples(before.examples, examples)
    return state, total / examples


def natural_gradient_step(
    config: KalmanConfig, adapter: AdapterModel, state: FilterState, inputs: Inputs, targets: Tensor, step_size: float
) -> tuple[FilterState, float]:
    """The state with its mean moved by a batch, and the batch's −log p(y | θ) before, summed over examples, in nats.

    Args:
        config: the settings.
        adapter: the model.
        state: after the passes that estimated P; its ``examples`` are N.
        inputs: a batch of B examples.
        targets: their targets.
        step_size: r.

    Raises:
        ValueError: if the inputs or targets do not fit.
    """
    check_inputs(inputs)
    mean = state.belief.mean
    loss, gradient = loss_gradient(config, adapter, state, inputs, targets)
    gradient = gradient + len(targets) / state.examples * (mean - state.prior.mean) / state.prior.variance
    direction = state.belief.product(gradient)
    direction = direction / (1.0 + step_size * (gradient @ direction).clamp_min(0.0))
    return state._replace(belief=state.belief.with_mean(mean - step_size * direction)), loss


def loss_gradient(
    config: KalmanConfig, adapter: AdapterModel, state: FilterState, inputs: Inputs, targets: Tensor
) -> tuple[float, Tensor]:
    """−log p(y | θ) of a batch, and its gradient, (n,)."""
    family, leaves = noise.likelihood(config.noise_settings, state.noise), adapter.leaves(state.belief.mean)
    with (
        adapter.full_precision(),
        adapter.eval_mode(),
        adapter.preserved_gradients(),
        torch.enable_grad(),
        adapter.substituted(leaves),
    ):
        return gradient_at(adapter, family, leaves, inputs, targets)


def gradient_at(
    adapter: AdapterModel,
    family: Likelihood,
    leaves: Mapping[str, Tensor],
    inputs: Inputs,
    targets: Tensor,
    divisor: float = 1.0,
) -> tuple[float, Tensor]:
    """−log p(y | θ) of a batch over ``divisor``, and its gradient, (n,), inside ``adapter.substituted(leaves)``.

    Processes that share the work each compute those of a part of the examples.
    """

    def of_some(inputs: Inputs, targets: Tensor) -> Tensor:
        for leaf in leaves.values():
            leaf.grad = None
        outputs = adapter.run(inputs).to(adapter.dtype)
        log_prob = family.log_prob(outputs, family.check(outputs.detach(), targets.to(outputs.device)))
        loss = -log_prob.sum() / divisor
        loss.backward()  # reentrant gradient checkpointing does not support autograd.grad
        parts = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
        return torch.cat([adapter.flatten(parts), loss.detach().reshape(1)])

    batch = Batch.of(inputs, targets)
    share = shared_work.share_of(batch.size)
    if share is None:
        both = of_some(inputs, targets)
    else:
        own = adapter.part(batch, share.where)
        both = shared_work.done_everywhere(lambda: of_some(own.inputs, own.required_targets), is_share=True)
        both = shared_work.all_reduced(torch.zeros_like(both) if share.is_empty else both)
    return float(both[-1]), both[:-1]
