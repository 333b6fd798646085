"""Steps of Adam toward the mode of a Gaussian likelihood and the prior, in units of the prior's standard deviations.

With z = (θ − μ₀)/σ₀ the objective is |y − f(θ)|²/2σ²B over a batch of B plus |z|²/2N, and Adam (Kingma and Ba 2015)
descends it. Adam's steps do not depend on the scale of a gradient, so these are steps of θ with a learning rate for
each parameter that is proportional to its σ₀. The model is prepared once for a pass, so that a step costs as much as
one of ``torch.optim.Adam``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import DivergenceError, FilterState
from bayes_kf.inference.fitting.loop import run_loop
from bayes_kf.inference.fitting.progress import ProgressBar
from bayes_kf.models.batch import Inputs, to_device

LEARNING_RATE = 0.06  # of the first step, in prior standard deviations
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam


class ModeSteps:
    """Passes of Adam under one prior and one σ²; the learning rate falls linearly to zero over all passes of a fit.

    Args:
        kf: the filter.
        state: gives the mean that is moved, the prior and σ².
        passes: the number of passes of the whole fit.
        done: those that were made before.
    """

    def __init__(self, kf: KalmanFilter, state: FilterState, passes: int, done: int) -> None:
        assert state.noise.variance is not None
        self._adapter, self._state, self._passes, self._done = kf.adapter, state, passes, done
        self._weight = 1.0 / state.noise.variance.to(state.belief.mean)  # 1/σ², (m,)
        self._sd = state.prior.variance.sqrt()
        self._z = (state.belief.mean - state.prior.mean) / self._sd
        self._first, self._second, self._steps = torch.zeros_like(self._z), torch.zeros_like(self._z), 0  # moments
        self._theta = state.belief.mean.clone()
        self._leaves = self._adapter.leaves(self._theta)  # views of θ, or copies of another dtype
        self._are_views = all(leaf.dtype == self._theta.dtype for leaf in self._leaves.values())

    def run(self, loader: Iterable[Any], progress: ProgressBar) -> FilterState:
        """The state with its mean after one more pass.

        Args:
            loader: batches of the N examples of the state.
            progress: advanced after every batch.

        Raises:
            DivergenceError: if the mean is not finite.
        """
        adapter = self._adapter
        with (
            adapter.full_precision(),
            adapter.eval_mode(),
            adapter.preserved_gradients(),
            torch.enable_grad(),
            adapter.substituted(self._leaves),
        ):
            run_loop(loader, 0, self._step, progress=progress)
        self._done += 1
        mean = self._theta.clone()
        if not bool(torch.isfinite(mean).all()):
            raise DivergenceError(self._state.step, "the mean in a pass of Adam", self._state)
        return self._state._replace(belief=self._state.belief.with_mean(mean))

    def _step(self, examples: int, inputs: Inputs, targets: Tensor) -> tuple[int, None]:
        """The number of examples of this pass after a step on a batch."""
        done = (self._done + examples / self._state.examples) / self._passes
        self._descend(self._gradient(inputs, targets), LEARNING_RATE * max(0.0, 1.0 - done))
        return examples + len(targets), None

    def _gradient(self, inputs: Inputs, targets: Tensor) -> Tensor:
        """The gradient of Σ (y − f)²/2σ² over a batch, divided by its size, (n,)."""
        for leaf in self._leaves.values():
            leaf.grad = None
        outputs = self._adapter.run(to_device(inputs, self._adapter.device)).to(self._theta)
        residual = targets.to(outputs).reshape(outputs.shape) - outputs
        (0.5 / len(outputs) * (self._weight * residual.square()).sum()).backward()
        leaves = self._leaves.items()
        return self._adapter.flatten(
            {n: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for n, leaf in leaves}
        )

    @torch.no_grad()
    def _descend(self, gradient: Tensor, learning_rate: float) -> None:
        """One step of Adam."""
        self._steps += 1
        gradient = torch.addcmul(self._z / self._state.examples, gradient, self._sd)
        self._first.lerp_(gradient, 1.0 - BETAS[0])
        self._second.lerp_(gradient.square_(), 1.0 - BETAS[1])
        first, second = (1.0 - beta**self._steps for beta in BETAS)
        size = (self._second / second).sqrt_().add_(EPSILON)
        self._z.addcdiv_(self._first, size, value=-learning_rate / first)
        torch.addcmul(self._state.prior.mean, self._sd, self._z, out=self._theta)
        if not self._are_views:
            for name, tensor in self._adapter.unflatten(self._theta).items():
                self._leaves[name].copy_(tensor)
