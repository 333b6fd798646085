"""Further passes over the data in which only the mean moves, toward the mode, by natural-gradient steps.

A filter linearizes every example once, at what it believed then; where the network bends, the mean that a single pass
ends with is not yet the mode. With P the covariance after that pass, every batch b of N examples moves it by

    μ ← μ − r P g / (1 + r gᵀPg),    g = −∇ log p(y_b | θ) + (B/N) P₀⁻¹(μ − μ₀) at μ,

which is stochastic descent on −log p(y, θ) in the metric of the posterior: a pass of full steps (r = 1) makes about one
Newton step. The denominator is the filter's own, for an observation along g: however far an example lies off, a step
goes no further than the filter would. r falls linearly from ``RATE`` to zero. No example counts twice, as the minimum
stays where it was; P stays as the first pass left it. A pass costs what one of gradient descent does. Ours; natural
gradients: Amari 1998.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.measurement_model import noise
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs, check_inputs

RATE = 1.0


def step(
    config: KalmanConfig, adapter: AdapterModel, state: FilterState, inputs: Inputs, targets: Tensor, rate: float
) -> tuple[FilterState, float]:
    """The state with its mean moved by a batch, and the batch's −log p(y | θ) before that, summed, in nats.

    Args:
        config: the settings.
        adapter: the model.
        state: after the passes that made P; its ``examples`` are N.
        inputs: a batch of B examples.
        targets: theirs.
        rate: r.
    """
    check_inputs(inputs)
    mean = state.belief.mean
    loss, gradient = _gradient(config, adapter, state, inputs, targets)
    gradient = gradient + len(targets) / state.examples * (mean - state.prior.mean) / state.prior.variance
    moved = state.belief.product(gradient)
    moved = moved / (1.0 + rate * (gradient @ moved).clamp_min(0.0))
    return state._replace(belief=state.belief.with_mean(mean - rate * moved)), loss


def _gradient(
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
        outputs = adapter.run(inputs).to(adapter.dtype)
        loss = -family.log_prob(outputs, family.check(outputs.detach(), targets.to(outputs.device))).sum()
        loss.backward()  # not autograd.grad, which reentrant checkpoints do not let through
    known = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    return float(loss.detach()), adapter.flatten(known)
