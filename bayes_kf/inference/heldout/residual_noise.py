"""σ² of Gaussian noise, estimated again from single held-out residuals e ~ N(0, T·J P Jᵀ + σ²). Ours.

It is used where σ² cannot be chosen together with the size of the covariance (:mod:`.noise_and_size`): under dynamics,
which do not keep the data's share of the precision apart, and before the first update.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from bayes_kf.inference.heldout.heldout_examples import heldout_outputs
from bayes_kf.inference.heldout.noise_and_size import NOISE_COUNT
from bayes_kf.inference.measurement_model import noise
from bayes_kf.inference.predictive.gaussian_posterior import GaussianPosterior

NOISE_CANDIDATES = 201  # values of σ², from a thousandth to a thousand times the present one

P = TypeVar("P", bound=GaussianPosterior)


def with_heldout_noise(posterior: P, loader: Iterable[Any], present: Tensor | None) -> P:
    """The posterior with the most probable σ² given held-out residuals at its covariance.

    Args:
        posterior: with a Gaussian likelihood whose σ² is estimated.
        loader: batches with targets that the posterior was not fitted on.
        present: the σ² of the fit, (m,), which weighs ``NOISE_COUNT`` observations; None: 1.
    """
    held = heldout_outputs(posterior, loader)
    assert held.covariance is not None  # of real targets always
    residual, output_var = (held.targets - held.outputs).double(), held.covariance.diagonal(dim1=1, dim2=2)
    if present is None:
        present = torch.ones_like(residual[0])
    variance = heldout_noise_variance(present, residual, output_var)
    count = torch.full_like(variance, NOISE_COUNT + len(residual))
    state = posterior.state._replace(noise=noise.with_variance(posterior.state.noise, variance, count))
    return replace(posterior, state=state)


def heldout_noise_variance(present: Tensor, residual: Tensor, output_var: Tensor) -> Tensor:
    """The most probable σ² of each output given held-out residuals e ~ N(0, s + σ²), (m,).

    Its prior is scaled inverse χ² around the present σ² and weighs ``NOISE_COUNT`` observations. A few held-out
    examples change σ² little, and residuals with s ≫ σ² do not change it.

    Args:
        present: the present σ², (m,).
        residual: e, (N, m).
        output_var: s, the diagonal of T·J P Jᵀ, (N, m).
    """
    factors = torch.logspace(-3, 3, NOISE_CANDIDATES, dtype=torch.float64, device=present.device)
    candidates = factors.view(-1, 1, 1) * present  # (G, 1, m)
    total = output_var + candidates
    loss = 0.5 * (total.log() + residual.square() / total).sum(1)  # (G, m)
    loss = loss + 0.5 * NOISE_COUNT * (candidates.log() + present / candidates).squeeze(1)
    return factors[loss.argmin(0)] * present
