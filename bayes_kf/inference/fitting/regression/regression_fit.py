"""The fit of real targets without a config.

1. One pass of the filter, from the default prior.
2. Passes of Adam toward the mode (``fitting/passes/mode_steps.py``). In between, at passes whose numbers grow
   geometrically, the covariance at the present mean gives the prior's scale for each tensor and σ² (:mod:`.evidence`).
3. The covariance at the last mean, under the scales and the σ² there.

A network trained from scratch needs many passes: up to ``PASSES``, or as many as make ``STEPS`` steps. Where only some
of the tensors are trainable, as in fine-tuning, at most ``FINE_TUNING_PASSES`` are made. Nothing is held out.

``docs/how-to/regression.md`` explains it; ``benchmarks/quality/split`` measures it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.fitting.divergence import posterior_on_divergence
from bayes_kf.inference.fitting.fit_config import fit_config
from bayes_kf.inference.fitting.loader import num_batches
from bayes_kf.inference.fitting.passes.mode_steps import ModeSteps
from bayes_kf.inference.fitting.progress import ProgressBar
from bayes_kf.inference.fitting.regression.evidence import (
    approximate_at_mean,
    refitted_scales,
    under_scales,
    with_scales,
)
from bayes_kf.inference.fitting.regression.examples import SMALL, repeated_examples
from bayes_kf.inference.posterior import Posterior
from bayes_kf.models.adapter import AdapterModel

PASSES, FINE_TUNING_PASSES, STEPS = 100, 10, 3_200  # the most passes, the most with frozen tensors, the most steps
FEWEST_PASSES = 6
REFITS = 10  # in 100 passes
LEARNING_RATE = 0.06  # of Adam's first step, in prior standard deviations
LAST_REFITS = 3  # steps of the fixed point at the last mean
FULL_PARAMETERS = 1_000  # up to which the covariance is a full matrix
RANK = 60  # beyond that


def regression_config(adapter: AdapterModel, seed: int = 0) -> KalmanConfig:
    """The settings of the fit."""
    structure: dict[str, Any] = {"covariance": "full"}
    if adapter.num_parameters > FULL_PARAMETERS:
        structure = {"covariance": "low_rank", "rank": RANK}
    return KalmanConfig(
        likelihood="gaussian", noise_variance="estimated", initial_logit_sd=1.0, temperature=1.0, seed=seed, **structure
    )


def fit_regression(model: nn.Module | AdapterModel, loader: Iterable[Any], progress: bool, seed: int = 0) -> Posterior:
    """The posterior of a Gaussian likelihood at a mean near its mode, with the prior's scales and σ² by evidence.

    Args:
        model: as for :func:`bayes_kf.fit`.
        loader: a list of batches, or a DataLoader over a data set.
        progress: whether to show progress bars.
        seed: of the settings, and of the orders of the batches.

    Raises:
        ValueError: if the loader is of another kind, or a batch does not fit.
        FitDivergenceError: if the filter or Adam diverges.
    """
    adapter = model if isinstance(model, AdapterModel) else AdapterModel(model)
    examples = repeated_examples(loader, seed)
    posterior = fit_config(adapter, loader, regression_config(adapter, seed), "prior", progress)
    kf, state, first_variance = posterior.kf, posterior.state, posterior.state.prior.variance
    passes = number_of_passes(adapter, state.examples)
    noise_vars, done = list[torch.Tensor](), 0
    with posterior_on_divergence(lambda before: Posterior(kf, before, posterior.history)):
        for end in refit_passes(passes):
            steps = ModeSteps(kf, state, passes, LEARNING_RATE, done)
            for number in range(done, end):
                with _bar(examples.small, progress)(f"mean pass {number + 1} of {passes}") as bar:
                    state = steps.run(examples.small, bar)
            with _bar(examples.large, progress)("covariance at the mean") as bar:
                at_mean = approximate_at_mean(kf, state, examples.large, bar)
            state, done = with_scales(at_mean.state, refitted_scales(kf, at_mean, first_variance)), end
            assert state.noise.variance is not None
            noise_vars.append(state.noise.variance.mean())
    for _ in range(LAST_REFITS):
        at_mean = under_scales(at_mean, refitted_scales(kf, at_mean, first_variance))
    state = at_mean.state
    return Posterior(kf, state, posterior.history | {"noise_variance": torch.stack(noise_vars).cpu()})


def number_of_passes(adapter: AdapterModel, examples: int) -> int:
    """The number of passes of Adam over so many examples."""
    most = FINE_TUNING_PASSES if is_partly_frozen(adapter) else PASSES
    return max(FEWEST_PASSES, min(most, STEPS // math.ceil(examples / SMALL)))


def is_partly_frozen(adapter: AdapterModel) -> bool:
    """Whether the model has parameters that are not trainable, as in fine-tuning."""
    return any(not parameter.requires_grad for parameter in adapter.model.parameters())


def refit_passes(passes: int) -> list[int]:
    """The numbers of the passes after which the prior's scales and σ² are refitted, ascending; the last one is all."""
    count = max(3, round(REFITS * math.log(passes) / math.log(PASSES)))
    exponents = [number / (count - 1) for number in range(count)]
    return sorted({round(2.0 * (passes / 2.0) ** exponent) for exponent in exponents})


def _bar(loader: Iterable[Any], progress: bool) -> Callable[[str], ProgressBar]:
    return lambda text: ProgressBar(num_batches(loader), text, progress)
