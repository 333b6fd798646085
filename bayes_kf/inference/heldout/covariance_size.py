"""The size of a posterior's covariance, chosen by the joint likelihood of held-out examples.

The size is s, a factor on the precision of the prior: P_s⁻¹ = P⁻¹ + (s − 1) P₀⁻¹. It changes the directions about which
the data say little and leaves the others, whatever their number; a factor on P would change both, and 50 examples are
not enough to choose it. Under settings with dynamics the share of the prior in P is unknown, and the size is the factor
1/s on P, the temperature.

s maximizes log p(y₁ … y_N) + max_S Σ log p(yᵢ; S) − ½ (log₁₀ s)²: the joint likelihood in blocks
(:mod:`.joint_likelihood`), and the likelihood of each example by itself at the best divisor S of the logits. The second
hardly depends on s where P is small against the noise of the labels, and then the joint likelihood decides. The joint
likelihood alone chose covariances of wide priors under which the predictions of single examples were much worse. The
sum is a composite likelihood over blocks of one and of all examples. Ours.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

from bayes_kf.inference.config_groups import DynamicsSettings
from bayes_kf.inference.covariance.gaussian_belief import GaussianBelief
from bayes_kf.inference.covariance.gaussian_sampling import semidefinite
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.heldout.choice import Choice, most_probable
from bayes_kf.inference.heldout.heldout_examples import HeldoutBlock, HeldoutOutputs, heldout_blocks
from bayes_kf.inference.heldout.joint_likelihood import joint_log_likelihood
from bayes_kf.inference.heldout.sharpness import COARSE, choose_sharpness
from bayes_kf.inference.linearization.jacobian import diagonal_blocks
from bayes_kf.inference.predictive.gaussian_posterior import GaussianPosterior

SIZES = tuple(10.0 ** (0.5 * k) for k in range(-4, 7))  # s, a hundredth to a thousand
DECADES = 1.0  # standard deviation of log10 s under its prior

P = TypeVar("P", bound=GaussianPosterior)


def choose_size(posterior: P, loader: Iterable[Any]) -> Choice:
    """The most probable s of a posterior.

    Args:
        posterior: at the temperature 1 or another number, of which s is to be independent.
        loader: batches with targets that the posterior was not fitted on.

    Raises:
        ValueError: if the loader yields nothing, or a batch has no targets or does not fit.
    """
    blocks = list(heldout_blocks(posterior, loader))

    @functools.cache
    def log_density(size: float) -> float:
        sized = with_size(posterior, size)
        total = sum(_log_likelihood(sized, block) for block in blocks)
        return total - 0.5 * (math.log10(size) / DECADES) ** 2

    return most_probable(log_density, SIZES)


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


def _log_likelihood(posterior: GaussianPosterior, block: HeldoutBlock) -> float:
    """Joint and marginal log-likelihood of a block under the posterior's covariance."""
    belief: GaussianBelief = posterior.state.belief
    covariance = posterior.temperature * belief.joint_output_covariance(block.jacobian)
    joint = float(joint_log_likelihood(block.family, block.outputs, covariance, block.targets, [1.0])[0])
    each = semidefinite(diagonal_blocks(covariance, len(block.outputs)))
    outputs = HeldoutOutputs(block.family, block.outputs, each, None, block.targets)
    if block.family.name != "categorical":
        return joint - float(outputs.log_loss().sum())
    return joint + choose_sharpness([outputs], COARSE).log_density
