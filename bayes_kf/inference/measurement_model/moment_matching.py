"""Student-t noise: the outputs' exact mean and covariance given each target, one target after the other.

log p(y | η) is not concave, so p(η | y) may have two modes: under a wide belief, an outlier drags one of them along. A
filter that went there with the precision of an ordinary example would take all later targets for outliers. Assumed
density filtering (Minka 2001) takes the moments. For an output η ~ N(f, c) and log p(y) = log ∫ p(y | η) N(η; f, c) dη,

    g = ∂ log p(y) / ∂f,   h = −∂² log p(y) / ∂f²,   E[η | y] = f + c g,   Var[η | y] = c − c² h,

both by quadrature in one dimension. h/(1 − ch) is the precision of a Gaussian observation with the same effect. Where
an outlier makes the distribution wider (h < 0), it is almost zero: the mean moves, and the variance stays. Targets
follow each other, so the result is that of batches of one, and their observations are one observation of the block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayes_kf.models.likelihood import StudentT

MIN_INFORMATION = 1e-9  # least h, relative to 1/σ²: u = (...)/√h must be finite
MAX_SHARE = 0.999  # of c h: rounding must not take all of a variance


def match_moments(
    family: StudentT, outputs: Tensor, targets: Tensor, output_cov: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The linear observation of a block whose conditioning gives the moments.

    Args:
        family: the likelihood.
        outputs: f, (B, m), float64.
        targets: as the likelihood's ``check`` returned them, (B, m).
        output_cov: Σ over the whole block, (B·m, B·m).

    Returns:
        W (B, m, m), diagonal; u (B, m), so that Wᵀu is the gradient at f of the observation's log density; and the mean
        of the outputs given the targets, (B, m).
    """
    start, mean, cov = outputs.flatten(), outputs.flatten().clone(), output_cov.double()
    values, families = targets.double().flatten(), [family.of_output(k) for k in range(outputs.shape[1])]
    precision, linear = torch.zeros_like(mean), torch.zeros_like(mean)  # of the observations, about `start`
    for number in range(len(mean)):
        own, column = families[number % len(families)], cov[:, number]
        variance = column[number].clamp_min(0.0)  # negative only by rounding
        gradient, information = own.evidence_derivatives(mean[number], variance, values[number])
        information = torch.maximum(information, MIN_INFORMATION / own.noise_variance.to(mean))
        information = torch.minimum(information, MAX_SHARE / variance.clamp_min(torch.finfo(mean.dtype).tiny))
        precision[number] = information / (1.0 - variance * information)
        # the natural parameter that moves the mean from f' to f' + c g, where f' is the mean before this target
        shift = gradient + precision[number] * variance * gradient
        linear[number] = shift + precision[number] * (mean[number] - start[number])
        mean = mean + column * gradient
        cov = cov - information * torch.outer(column, column)
    root = precision.sqrt()
    return torch.diag_embed(root.view_as(outputs)), (linear / root).view_as(outputs), mean.view_as(outputs)
