"""Passes over the data that move the mean to the mode by Adam, in units of the prior's standard deviations.

With z = (θ − μ₀)/σ₀ the objective is −Σ log p(y_b | θ)/B over a batch of B plus |z|²/2N, and Adam (Kingma and Ba 2015)
descends it. Adam's steps do not depend on the scale of a gradient, so these are steps of θ with a learning rate for
each parameter that is proportional to its σ₀; the rate falls linearly to zero over all passes, and may first grow over
the passes of a warm-up. The model is prepared once for a pass, so that a step costs about as much as one of
``torch.optim.Adam``.

The natural-gradient steps of :mod:`.mean_pass` are bounded by the Kalman gain and stop short of the mode
(``docs/development/decisions.md``, "Several posteriors"). Ours in this use.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import DivergenceError, FilterState
from bayes_kf.inference.fitting.loop import run_loop
from bayes_kf.inference.fitting.passes.filter_pass import check_same_examples
from bayes_kf.inference.fitting.passes.mean_pass import gradient_at
from bayes_kf.inference.fitting.progress import ProgressBar
from bayes_kf.inference.measurement_model import noise
from bayes_kf.models.batch import Inputs, check_inputs, to_device

BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam


class ModeSteps:
    """Passes of Adam under one prior.

    Args:
        kf: the filter.
        state: gives the mean that is moved, the prior and the noise; its ``examples`` are N.
        passes: the number of passes of the whole fit.
        learning_rate: from which it falls, in prior standard deviations.
        done: the passes that were made before.
        warm_up: the number of passes over which the rate grows in proportion to the examples seen.
    """

    def __init__(
        self,
        kf: KalmanFilter,
        state: FilterState,
        passes: int,
        learning_rate: float,
        done: int = 0,
        warm_up: float = 0.0,
    ) -> None:
        self._kf, self._adapter, self._state = kf, kf.adapter, state
        self._passes, self._rate, self._done, self._warm_up = passes, learning_rate, done, warm_up
        self._family = noise.likelihood(kf.config.noise_settings, state.noise)
        self._sd = state.prior.variance.sqrt()
        self._z = (state.belief.mean - state.prior.mean) / self._sd
        self._first, self._second, self._steps = torch.zeros_like(self._z), torch.zeros_like(self._z), 0  # moments
        self._theta = state.belief.mean.clone()
        self._leaves = self._adapter.leaves(self._theta)  # views of θ, or copies of another dtype
        self._are_views = all(leaf.dtype == self._theta.dtype for leaf in self._leaves.values())

    def use_noise_of(self, state: FilterState) -> None:
        """Go on with the noise variance of another state, and return states that have it."""
        self._state = self._state._replace(noise=state.noise)
        self._family = noise.likelihood(self._kf.config.noise_settings, state.noise)

    def run(self, loader: Iterable[Any], progress: ProgressBar) -> FilterState:
        """The state with its mean after one more pass.

        Args:
            loader: batches of the N examples of the state.
            progress: advanced after every batch.

        Raises:
            ValueError: if the loader yields another number of examples.
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
            examples = run_loop(loader, 0, self._step, progress=progress)
        check_same_examples(self._state.examples, examples)
        self._done += 1
        mean = self._theta.clone()
        if not bool(torch.isfinite(mean).all()):
            raise DivergenceError(self._state.step, "the mean in a pass of Adam", self._state)
        return self._state._replace(belief=self._state.belief.with_mean(mean))

    def _step(self, examples: int, inputs: Inputs, targets: Tensor) -> tuple[int, None]:
        """The number of examples of this pass after a step on a batch."""
        check_inputs(inputs)
        before, after = (self._done + seen / self._state.examples for seen in (examples, examples + len(targets)))
        rate = self._rate * max(0.0, 1.0 - before / self._passes)
        if after < self._warm_up:
            rate *= after / self._warm_up
        self._descend(self._gradient(inputs, targets), rate)
        return examples + len(targets), None

    def _gradient(self, inputs: Inputs, targets: Tensor) -> Tensor:
        """The gradient of −Σ log p(y | θ) over a batch, divided by its size, (n,)."""
        inputs = to_device(inputs, self._adapter.device)
        return gradient_at(self._adapter, self._family, self._leaves, inputs, targets, len(targets))[1]

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
