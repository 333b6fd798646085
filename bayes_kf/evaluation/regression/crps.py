"""The continuous ranked probability score: how far a predicted distribution lies from what came, in its unit."""

import math

import torch
from torch import Tensor

from bayes_kf.evaluation.inputs import Array
from bayes_kf.evaluation.regression.scores import checked_gaussian, sample_blocks


def crps_gaussian(mean: Array, variance: Array, targets: Array) -> float:
    """Mean over all examples and outputs of the CRPS of N(mean, variance), in the targets' unit; lower is better.

    The CRPS is ∫ (F(x) − [target ≤ x])² dx, F the predicted distribution function. With z = (target − mean)/sd it is
    sd · (z (2Φ(z) − 1) + 2φ(z) − 1/√π). A prediction without spread would score its absolute error.

    Args:
        mean: Predictive means, (N,) or (N, m).
        variance: Predictive variances (noise included), of the same shape, positive.
        targets: What came, of the same shape.

    Raises:
        ValueError: If a shape differs, a value is not finite, or a variance is not positive.

    Reference: Gneiting, Raftery, *Strictly proper scoring rules, prediction, and estimation*, 2007.

    Example:
        >>> round(crps_gaussian(torch.zeros(1), torch.ones(1), torch.zeros(1)), 4)
        0.2337
    """
    return gaussian_crps(*checked_gaussian(mean, variance, targets)).mean().item()


def crps_samples(samples: Array, targets: Array) -> float:
    """Mean over all examples and outputs of the CRPS from predictive draws, in the targets' unit; lower is better.

    The *fair* estimate mean_s |x_s − y| − Σ_{s<t} |x_s − x_t| / (S (S − 1)): over draws it averages to the CRPS of the
    distribution that they come from, whatever their number S, so that results of different S can be compared. (The
    plain estimate divides by S² and scores the S draws themselves as a forecast; it is larger.) The double sum is
    taken over sorted draws, in O(S log S), a block of targets at a time.

    Args:
        samples: Draws of the *target* (noise included), (S, N) or (S, N, m), S ≥ 2.
        targets: What came, (N,) or (N, m).

    Raises:
        ValueError: If a shape differs, a value is not finite, or there are fewer than two draws.

    Reference: Ferro, *Fair scores for ensemble forecasts*, 2014.

    Example:
        >>> crps_samples(torch.tensor([[0.0], [2.0]]), torch.tensor([1.0]))
        0.0
    """
    return sample_crps(samples, targets).mean().item()


def gaussian_crps(mean: Tensor, variance: Tensor, targets: Tensor) -> Tensor:
    """The CRPS of each target under N(mean, variance), in their shape."""
    spread_sd = variance.sqrt()
    z = (targets - mean) / spread_sd
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    inside = torch.erf(z / math.sqrt(2))  # 2Φ(z) − 1
    return spread_sd * (z * inside + 2 * density - 1 / math.sqrt(math.pi))


def sample_crps(samples: Array, targets: Array) -> Tensor:
    """The fair CRPS of each target from its draws, in the targets' shape."""
    parts = []
    for draws, observed in sample_blocks(samples, targets, fewest=2):
        num_draws = len(draws)
        weight = 2 * torch.arange(num_draws, dtype=torch.float64) - (num_draws - 1)  # times sorted: Σ_{s<t} |x_s − x_t|
        error = draws - observed
        spread = weight @ error.sort(dim=0).values / (num_draws * (num_draws - 1))
        parts.append(error.abs().mean(dim=0) - spread)
    return torch.cat(parts).reshape(torch.as_tensor(targets).shape)
