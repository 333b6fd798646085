"""Passes over the data that move the mean to the mode by Adam, in units of the prior's standard deviations.

With z = (θ − μ₀)/σ₀ the objective is −Σ log p(yᵢ | θ)/N + |z|²/2N, and Adam (Kingma and Ba 2015, ``torch.optim.Adam``)
descends it from the filter's mean. All parameters have one scale in z, so that one learning rate serves every prior;
it decreases linearly to zero. A pass costs as much as an epoch of AdamW.

The natural-gradient steps of :mod:`.mean_pass` are bounded by the Kalman gain and stop short of the mode
(``docs/development/decisions.md``, "Several posteriors"). Ours in this use.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.fitting.passes.mean_pass import loss_gradient, pass_of_steps
from bayes_kf.inference.fitting.progress import ProgressBar
from bayes_kf.models.batch import Inputs, check_inputs

LEARNING_RATE = 0.02  # of the first step, in prior standard deviations


class MapPasses:
    """Passes of Adam over one data set, one at a time.

    Args:
        kf: the filter.
        start: the state whose mean is moved; its ``examples`` are N.
        passes: the number of passes, over which the learning rate decreases.
        learning_rate: of the first step.
    """

    def __init__(self, kf: KalmanFilter, start: FilterState, passes: int, learning_rate: float = LEARNING_RATE) -> None:
        self._kf, self._start, self._passes = kf, start, passes
        self._sd = start.prior.variance.sqrt()
        self._z = torch.nn.Parameter((start.belief.mean - start.prior.mean) / self._sd)
        self._optimizer = torch.optim.Adam([self._z], lr=learning_rate)
        self._rate, self._done = learning_rate, 0  # passes done

    def run(self, state: FilterState, loader: Iterable[Any], progress: ProgressBar) -> tuple[FilterState, float]:
        """The state after one more pass, and the log loss per example, in nats, each before its own step.

        Args:
            state: after the pass before; its noise variance may be another than then, its mean is not used.
            loader: the same N examples.
            progress: advanced after every batch.

        Raises:
            ValueError: if the loader yields another number of examples.
            DivergenceError: if the mean is not finite; its state is the one before the pass.
        """
        after, loss = pass_of_steps(state, loader, self._step, progress)
        self._done += 1
        return after, loss

    def _step(self, state: FilterState, inputs: Inputs, targets: Tensor, examples: int) -> tuple[FilterState, float]:
        """The state after a step, and the batch's summed log loss before it; ``examples`` of this pass are done."""
        check_inputs(inputs)
        done = (self._done + examples / self._start.examples) / self._passes
        self._optimizer.param_groups[0]["lr"] = self._rate * max(0.0, 1.0 - done)
        loss, gradient = loss_gradient(self._kf.config, self._kf.adapter, state, inputs, targets)
        with torch.no_grad():
            self._z.grad = gradient * self._sd / len(targets) + self._z / self._start.examples
        self._optimizer.step()
        mean = state.prior.mean + self._sd * self._z.detach()
        return state._replace(belief=state.belief.with_mean(mean)), loss
