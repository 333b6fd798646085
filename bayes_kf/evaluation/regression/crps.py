"""The continuous ranked probability score (CRPS): distance of a predictive distribution from the target."""

import numpy as np
import torch
from torch import Tensor

from bayes_kf.evaluation.inputs import Array
from bayes_kf.evaluation.regression.scores import check_gaussian, sample_blocks


def crps_gaussian(mean: Array, variance: Array, targets: Array) -> float:
    """Mean over all examples and outputs of the CRPS of N(mean, variance), in the targets' unit; lower is better.

    The CRPS is ∫ (F(x) − [target ≤ x])² dx, where F is the predictive distribution function. With
    z = (target − mean)/sd it is sd · (z (2Φ(z) − 1) + 2φ(z) − 1/√π). Without any variance it is the absolute error.

    Args:
        mean: Predictive means, (N,) or (N, m).
        variance: Predictive variances (noise included), of the same shape, positive.
        targets: Observed targets, of the same shape.

    Raises:
        ValueError: If a shape differs, a value is not finite, or a variance is not positive.

    Reference: Gneiting, Raftery, *Strictly proper scoring rules, prediction, and estimation*, 2007.

    Example:
        >>> round(crps_gaussian(torch.zeros(1), torch.ones(1), torch.zeros(1)), 4)
        0.2337
    """
    return gaussian_crps(*check_gaussian(mean, variance, targets)).mean().item()


def crps_samples(samples: Array, targets: Array) -> float:
    """Mean over all examples and outputs of the CRPS from predictive draws, in the targets' unit; lower is better.

    The *fair* estimate mean_s |x_s − y| − Σ_{s<t} |x_s − x_t| / (S (S − 1)) is an unbiased estimate of the CRPS of the
    distribution of the draws, so results for different numbers S of draws are comparable. (The plain estimate divides
    by S² and is larger: it is the CRPS of the S draws as a discrete forecast.) It takes O(S log S) per target, in
    blocks of targets.

    Args:
        samples: Draws of the *target* (noise included), (S, N) or (S, N, m), S ≥ 2.
        targets: Observed targets, (N,) or (N, m).

    Raises:
        ValueError: If a shape differs, a value is not finite, or there are fewer than two draws.

    Reference: Ferro, *Fair scores for ensemble forecasts*, 2014.

    Example:
        >>> crps_samples(torch.tensor([[0.0], [2.0]]), torch.tensor([1.0]))
        0.0
    """
    return sample_crps(samples, targets).mean().item()


def gaussian_crps(mean: Tensor, variance: Tensor, targets: Tensor) -> Tensor:
    """The CRPS of each target under N(mean, variance), in the targets' shape."""
    import scoringrules  # here, because it loads scipy.special

    values = scoringrules.crps_normal(targets.numpy(), mean.numpy(), variance.sqrt().numpy(), backend="numpy")
    return torch.as_tensor(values)


def sample_crps(samples: Array, targets: Array) -> Tensor:
    """The fair CRPS of each target from its draws, in the targets' shape."""
    import scoringrules

    parts = []
    for draws, observed in sample_blocks(samples, targets, min_draws=2):
        error = (draws - observed).T.numpy()  # of errors: large targets cost no precision
        parts.append(scoringrules.crps_ensemble(np.zeros(len(error)), error, estimator="pwm", backend="numpy"))
    return torch.from_numpy(np.concatenate(parts)).reshape(torch.as_tensor(targets).shape)
