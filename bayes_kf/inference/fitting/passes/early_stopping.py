"""Passes of the mean, of which held-out examples choose the last: the latest one that is not clearly worse.

After each pass the outputs at the mean are scored on the held-out examples: by the log loss at the divisor of the
logits that suits them best, or for real targets at the noise variance that does. The pass with the least loss is a
noisy choice with 50 examples, and the learning rate falls to zero at the end. So the result is that of the latest pass
whose loss exceeds the least by at most one standard error of the difference, paired by example. The rate grows over
the first pass: without this, Adam's first steps are too long for some networks (measured:
``docs/development/decisions.md``, "Several posteriors"). For text, where this was not measured, it does not. If the
mean or its held-out loss is not finite after the first pass, the passes begin anew at a third of the rate. Ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import DivergenceError, FilterState
from bayes_kf.inference.fitting.passes.mode_steps import ModeSteps
from bayes_kf.inference.fitting.passes.noise_refit import refit_noise
from bayes_kf.inference.fitting.progress import ProgressBar
from bayes_kf.inference.heldout.choice import near_best
from bayes_kf.inference.heldout.sharpness import point_log_losses
from bayes_kf.models.batch import Batch, join_targets

STANDARD_ERRORS = 1.0
LEARNING_RATE, WARM_UP = 0.02, 1.0  # in prior standard deviations; in passes
RATE_FACTOR, SMALLEST_RATE = 1 / 3, 0.005  # of passes that begin anew: at most two times


class StoppedPasses(NamedTuple):
    """The result of early stopping.

    Attributes:
        state: after the chosen pass.
        losses: mean held-out loss in nats before the first pass and after each one.
        chosen: index of the chosen pass; 0 if none helped.
    """

    state: FilterState
    losses: list[float]
    chosen: int


def early_stopped_passes(
    kf: KalmanFilter,
    state: FilterState,
    loader: Iterable[Any],
    heldout: Sequence[Batch],
    passes: int,
    bar: Callable[[str], ProgressBar],
) -> StoppedPasses:
    """The state after the latest pass of the mean that held-out examples do not reject.

    Args:
        kf: the filter.
        state: after the filter's pass.
        loader: the examples of that pass.
        heldout: other examples, on the model's device.
        passes: the number of passes, without those that are begun anew.
        bar: from a text to a progress bar.

    Raises:
        DivergenceError: as :meth:`ModeSteps.run`.
    """
    rate, warm_up = LEARNING_RATE, 0.0 if kf.config.likelihood == "tokens" else WARM_UP
    states, losses = [state], [heldout_point_losses(kf, state, heldout)]
    steps = ModeSteps(kf, state, passes, rate, warm_up=warm_up)
    while len(states) <= passes:
        with bar(f"mean pass {len(states)} of {passes}") as progress:
            steps.use_noise_of(refit_noise(kf, states[-1], loader))
            may_begin_anew = len(states) == 1 and rate >= SMALLEST_RATE
            try:
                following = steps.run(loader, progress)
                loss = heldout_point_losses(kf, following, heldout)
                fails = not bool(torch.isfinite(loss).all())
            except DivergenceError:
                if not may_begin_anew:
                    raise
                fails = True
        if fails and may_begin_anew:
            rate *= RATE_FACTOR
            steps = ModeSteps(kf, state, passes, rate, warm_up=warm_up)
            continue
        states.append(following)
        losses.append(loss)
    chosen = latest_not_worse(losses)
    return StoppedPasses(states[chosen], [float(loss.mean()) for loss in losses], chosen)


def latest_not_worse(losses: Sequence[Tensor]) -> int:
    """The last index whose losses (N,) exceed those of the best one by at most one paired standard error."""
    return int(near_best(losses, STANDARD_ERRORS).nonzero().max())


def heldout_point_losses(kf: KalmanFilter, state: FilterState, heldout: Iterable[Batch]) -> Tensor:
    """The held-out log losses of the mean's outputs at their best sharpness, (N,)."""
    outputs, targets = list[Tensor](), list[Tensor]()
    with kf.adapter.full_precision():
        for batch in heldout:
            outputs.append(kf.linearize.outputs(state.belief.mean, batch))
            targets.append(batch.required_targets)
    return point_log_losses(kf.config.likelihood, torch.cat(outputs), join_targets(targets))
