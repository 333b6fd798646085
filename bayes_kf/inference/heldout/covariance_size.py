"""The size of a posterior's covariance, chosen by the joint likelihood of held-out examples.

The size is s, a factor on the precision of the prior: P_s⁻¹ = P⁻¹ + (s − 1) P₀⁻¹. It changes the directions about which
the data say little and leaves the others, whatever their number; a factor on P would change both, and 50 examples are
not enough to choose it. Under settings with dynamics the share of the prior in P is unknown, and the size is the factor
1/s on P, the temperature.

s is at least 1: held-out examples may narrow the prior under which the mean was fitted, not widen it. It maximizes
log p(y₁ … y_N) − ½ (log₁₀ s)², with the joint likelihood in blocks (:mod:`.joint_likelihood`). The likelihoods of the
single examples hardly depend on s where P is small against the noise of the labels. Where they do, under wide priors of
networks, the joint likelihood alone chose covariances whose predictions were much worse. So s grows from there until
the mean loss of single examples is at most 0.02 nats above its minimum, or at most two standard errors, paired by
example. These losses are of all classes; a block makes one class of the unlikely ones, and so hides what a wide
covariance gives to each. Without the first number, differences of a few thousandths that all examples share would
decide. Where the held-out examples are learned by an update at the chosen size (``start`` "trained"), the standard
errors do not count: an update at too wide a covariance leaves a mean that is worse. Ours.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from bayes_kf.inference.config_groups import DynamicsSettings
from bayes_kf.inference.covariance.gaussian_belief import GaussianBelief
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.heldout.choice import Choice, most_probable, near_best
from bayes_kf.inference.heldout.heldout_examples import (
    HeldoutBlock,
    HeldoutOutputs,
    heldout_blocks,
    heldout_outputs_of,
    thinned,
)
from bayes_kf.inference.heldout.joint_likelihood import joint_log_likelihood
from bayes_kf.inference.heldout.sharpness import COARSE, choose_sharpness
from bayes_kf.inference.predictive.gaussian_posterior import GaussianPosterior

SIZES = tuple(10.0 ** (0.5 * k) for k in range(7))  # s, 1 to 1,000
DECADES = 1.0  # standard deviation of log10 s under its prior
STANDARD_ERRORS, LEAST_EXCESS = 2.0, 0.02  # by which the mean loss of single examples may exceed its minimum, in nats
MOST_OUTPUTS, LEAST_EXAMPLES = 2**13, 100  # of single examples: about so many outputs, or more of so many examples

WHOLE_MATRICES = ("full", "block_diagonal")  # covariances of which one at a time is in memory

P = TypeVar("P", bound=GaussianPosterior)


def choose_size(
    posterior: GaussianPosterior, loader: Iterable[Any], standard_errors: float = STANDARD_ERRORS
) -> Choice:
    """The chosen s of a posterior, and the interval of the joint likelihood.

    Args:
        posterior: at the size 1.
        loader: batches with targets that the posterior was not fitted on.
        standard_errors: by which the mean loss of single examples may exceed its minimum.

    Raises:
        ValueError: if the loader yields nothing, or a batch has no targets or does not fit.
    """
    return choose_common_size([(posterior, loader)], standard_errors)


def choose_common_size(
    pairs: Iterable[tuple[GaussianPosterior, Iterable[Any]]], standard_errors: float = STANDARD_ERRORS
) -> Choice:
    """One s for several posteriors under the same settings, each with held-out batches of its own.

    Args:
        pairs: a posterior at the size 1, and batches with targets that it was not fitted on.
        standard_errors: as for :func:`choose_size`.

    Raises:
        ValueError: as :func:`choose_size`.
    """
    held = [(posterior, list(loader)) for posterior, loader in pairs]
    blocks = [(posterior, block) for posterior, loader in held for block in heldout_blocks(posterior, loader)]

    @functools.cache
    def log_density(size: float) -> float:
        joint = sum(_joint_log_likelihood(with_size(posterior, size), block) for posterior, block in blocks)
        return joint - 0.5 * (math.log10(size) / DECADES) ** 2

    joint = most_probable(log_density, SIZES, evaluations=1)
    candidates = [joint.value, *(size for size in SIZES if size > joint.value)]
    value = candidates[first_not_worse(_losses(held, candidates), standard_errors)]
    return Choice(value, min(joint.low, value), max(joint.high, value), value == SIZES[-1], joint.log_density)


def first_not_worse(losses: Sequence[Tensor], standard_errors: float = STANDARD_ERRORS) -> int:
    """The first index whose mean loss (N,) exceeds the least by no more than the standard errors and nats allowed."""
    return int(near_best(losses, standard_errors, LEAST_EXCESS).nonzero().min())


def with_size(posterior: P, size: float) -> P:
    """The posterior with the covariance of size s."""
    if not is_static(posterior.config.dynamics_settings):
        return posterior.with_settings(temperature=1.0 / size)
    state = posterior.state if size == 1.0 else scale_prior(posterior.state, 1.0 / size)
    if posterior.config.temperature == 1.0:
        return replace(posterior, state=state)
    return replace(posterior.with_settings(temperature=1.0), state=state)


def scale_prior(state: FilterState, scale: float) -> FilterState:
    """The state with the prior variance multiplied by ``scale``, and the belief under that prior."""
    variance = scale * state.prior.variance
    added = 1.0 / variance - 1.0 / state.prior.variance
    belief = state.belief.add_precision(added)
    return state._replace(belief=belief, prior=state.prior._replace(variance=variance))


def is_static(settings: DynamicsSettings) -> bool:
    """Whether the prior has its full share in the belief."""
    return (settings.forgetting, settings.drift_variance, settings.prior_pull) == (1.0, 0.0, 0.0)


def _joint_log_likelihood(posterior: GaussianPosterior, block: HeldoutBlock) -> float:
    belief: GaussianBelief = posterior.state.belief
    covariance = posterior.temperature * belief.joint_output_covariance(block.jacobian)
    return float(joint_log_likelihood(block.family, block.outputs, covariance, block.targets, [1.0])[0])


def _losses(held: Sequence[tuple[P, Sequence[Any]]], sizes: Sequence[float]) -> list[Tensor]:
    """The log losses of held-out examples at each size, (N,), for classes at the best S of that size."""
    most = max(LEAST_EXAMPLES, MOST_OUTPUTS // max(1, held[0][0].kf.linearize.num_outputs))
    at_once = 1 if held[0][0].config.covariance in WHOLE_MATRICES else len(sizes)
    each = []
    for posterior, loader in held:
        some, parts = thinned(posterior, loader, -(-most // len(held))), list[HeldoutOutputs]()
        for first in range(0, len(sizes), at_once):
            sized = [with_size(posterior, size) for size in sizes[first : first + at_once]]
            parts += heldout_outputs_of(sized, some)
        each.append(parts)
    if each[0][0].family.name != "categorical":  # the noise of each posterior is its own
        return [torch.cat([one.log_loss() for one in parts]) for parts in zip(*each, strict=True)]
    outputs = [HeldoutOutputs.joined(parts) for parts in zip(*each, strict=True)]
    return [at.log_loss(choose_sharpness([at], COARSE, evaluations=1).value) for at in outputs]
