"""The noise variance of a Gaussian likelihood and the size of the covariance, chosen together by held-out examples.

With the data precision Λ = P⁻¹ − P₀⁻¹ at the present σ², the covariance under r·σ² and the size s is
P(s, r)⁻¹ = s P₀⁻¹ + Λ/r. The pair maximizes

    log N(y_V; f, J P(s, r) Jᵀ + rσ²I) − ½ (log₁₀ s)² − (ν/2)(ln r + 1/r),    ν = ``NOISE_COUNT``,

over the held-out examples V, with the joint likelihood in blocks. The prior of r is scaled inverse χ² around the
present σ², the evidence's, and counts for each output; of several outputs all σ² get one factor.

With u = s·r the whole covariance is r·(J P(u, 1) Jᵀ + σ²I), so that one Cholesky factor for each u gives the likelihood
at every r. Ours.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.heldout.choice import Choice, most_probable
from bayes_kf.inference.heldout.covariance_size import DECADES, is_static
from bayes_kf.inference.heldout.heldout_examples import heldout_blocks
from bayes_kf.inference.measurement_model import noise
from bayes_kf.inference.predictive.gaussian_posterior import GaussianPosterior
from bayes_kf.models.likelihood import Gaussian

NOISE_COUNT = 20.0  # ν, the weight of the present σ² in observations
PRODUCTS = tuple(10.0 ** (0.5 * k) for k in range(-2, 8))  # u, 0.1 to 3,162
NOISE_FACTORS = tuple(10.0 ** (k / 16) for k in range(-48, 49))  # r, a thousandth to a thousand

P = TypeVar("P", bound=GaussianPosterior)


class NoiseAndSize(NamedTuple):
    """The most probable pair.

    Attributes:
        size: s, with the interval at the chosen r.
        noise_factor: r, with the interval at the chosen u.
        examples: the number of held-out examples.
    """

    size: Choice
    noise_factor: Choice
    examples: int


class _Joint(NamedTuple):
    """Of one u, summed over blocks: log det(J P(u, 1) Jᵀ + σ²I), eᵀ(…)⁻¹e, and the number of residuals e."""

    log_det: float
    quadratic: float
    residuals: int


def chooses_noise(posterior: GaussianPosterior) -> bool:
    """Whether σ² of Gaussian noise is estimated, and the prior has its full share in the covariance."""
    config = posterior.config
    estimated = (config.likelihood, config.noise_variance) == ("gaussian", "estimated")
    return estimated and posterior.state.noise.variance is not None and is_static(config.dynamics_settings)


def choose_noise_and_size(posterior: P, loader: Iterable[Any]) -> NoiseAndSize:
    """The most probable σ² and size of a posterior, at its present mean.

    Args:
        posterior: Gaussian, with an estimated σ², at the size 1 and the temperature 1.
        loader: batches with targets that the posterior was not fitted on.

    Raises:
        ValueError: if σ² is not estimated, the loader yields nothing, or a batch has no targets or does not fit.
    """
    if not chooses_noise(posterior):
        config = posterior.config
        raise ValueError(
            "`posterior` must have `likelihood` 'gaussian', `noise_variance` 'estimated' and no dynamics, got "
            f"{config.likelihood!r} and {config.noise_variance!r}."
        )
    blocks = list(heldout_blocks(posterior, loader))
    family = posterior.likelihood
    assert isinstance(family, Gaussian)
    outputs = blocks[0].outputs.shape[1]
    noise_var = family.noise_variance.double().expand(outputs)
    residuals = [(block.targets - block.outputs).double().flatten() for block in blocks]

    @functools.cache
    def joint(product: float) -> _Joint:
        belief = _scaled_belief(posterior.state, product)
        parts = [
            _joint(belief.joint_output_covariance(block.jacobian), noise_var.repeat(len(block.outputs)), residual)
            for block, residual in zip(blocks, residuals, strict=True)
        ]
        return _Joint(*(sum(values) for values in zip(*parts, strict=True)))

    def best_noise(product: float) -> Choice:
        return most_probable(lambda r: _log_density(joint(product), product, r, outputs), NOISE_FACTORS)

    product = most_probable(lambda u: best_noise(u).log_density, PRODUCTS)
    factor = best_noise(product.value)
    value, low, high = (number / factor.value for number in (product.value, product.low, product.high))
    size = Choice(value, low, high, product.at_edge, product.log_density)
    return NoiseAndSize(size, factor, joint(product.value).residuals // outputs)


def with_noise_and_size(posterior: P, chosen: NoiseAndSize) -> P:
    """The posterior with the chosen σ² and the covariance under it, at the chosen size."""
    state, size, factor = posterior.state, chosen.size.value, chosen.noise_factor.value
    assert state.noise.variance is not None
    belief = _scaled_belief(state, size * factor).predict(1.0 / factor, 0.0)
    variance = factor * state.noise.variance
    settled = noise.with_variance(state.noise, variance, torch.full_like(variance, NOISE_COUNT + chosen.examples))
    prior = state.prior._replace(variance=state.prior.variance / size)
    state = state._replace(belief=belief, noise=settled, prior=prior)
    if posterior.config.temperature == 1.0:
        return replace(posterior, state=state)
    return replace(posterior.with_settings(temperature=1.0), state=state)


def _scaled_belief(state: FilterState, product: float) -> Any:
    """P(u, 1): the belief with u times the prior's precision."""
    return state.belief if product == 1.0 else state.belief.add_precision((product - 1.0) / state.prior.variance)


def _joint(output_cov: Tensor, noise_var: Tensor, residual: Tensor) -> _Joint:
    chol = torch.linalg.cholesky(output_cov.double() + torch.diag(noise_var))
    half = torch.linalg.solve_triangular(chol, residual.unsqueeze(1), upper=False)
    return _Joint(2.0 * float(chol.diagonal().log().sum()), float(half.square().sum()), len(residual))


def _log_density(joint: _Joint, product: float, factor: float, outputs: int) -> float:
    """The maximized density at u and r."""
    count = joint.residuals
    log_likelihood = -0.5 * (count * math.log(2.0 * math.pi * factor) + joint.log_det + joint.quadratic / factor)
    log_noise = -0.5 * NOISE_COUNT * outputs * (math.log(factor) + 1.0 / factor)
    return log_likelihood + log_noise - 0.5 * (math.log10(product / factor) / DECADES) ** 2
