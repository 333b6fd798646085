"""How far to trust the covariance: a factor on P in predictions, priced by the stream itself.

Before each update the filter's own linearized prediction is scored at every temperature of a grid. The one with the
lowest prequential log loss is the posterior's: no validation set, no extra pass through the network. Ours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayes_kf.inference.prediction import gaussian_draws, gaussian_moments
from bayes_kf.models.likelihood import Gaussian, Likelihood

GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
NUM_DRAWS = 32


def log_losses(family: Likelihood, outputs: Tensor, output_cov: Tensor, targets: Tensor, seed: int) -> Tensor:
    """Summed −log p(y) of a batch under η ~ N(outputs, t·output_cov), for every t of ``GRID``, (K,) in nats.

    Args:
        family: the likelihood.
        outputs: f, (B, m).
        output_cov: J P⁻ Jᵀ, (B, m, m).
        targets: as the likelihood's ``check`` returned them.
        seed: of the draws, the same for every temperature.
    """
    if isinstance(family, Gaussian):
        return torch.stack([_exact(family, outputs, t * output_cov, targets) for t in GRID])
    generator = torch.Generator(device=outputs.device).manual_seed(seed)
    spread = gaussian_draws(torch.zeros_like(outputs), output_cov, NUM_DRAWS, generator)  # (S, B, m)
    roots = torch.tensor(GRID, dtype=outputs.dtype, device=outputs.device).sqrt().view(-1, 1, 1, 1)
    log_prob = family.log_prob(outputs + roots * spread, targets)  # (K, S, B)
    return -(log_prob.double().logsumexp(1) - math.log(NUM_DRAWS)).sum(-1)


def best(scores: Tensor) -> float:
    """The temperature of the lowest score; 1 before anything was scored."""
    return GRID[int(scores.argmin())] if bool((scores != 0).any()) else 1.0


def _exact(family: Gaussian, outputs: Tensor, output_cov: Tensor, targets: Tensor) -> Tensor:
    log_prob = gaussian_moments(family, outputs, output_cov, None, targets).log_prob
    assert log_prob is not None
    return -log_prob.double().sum()
