"""Where to expand the likelihood: at the posterior mode of the outputs, not at their prior mean.

A confident classifier that meets a surprise has V ≈ 0 at its prior outputs, so the plain extended Kalman filter takes
the whole gradient step and learns almost no precision from it. The step that is right for the linearized model is the
mode of

    log p(y | η) − ½ (η − f)ᵀ Σ⁻¹ (η − f),   Σ = J P Jᵀ,

a concave problem in the k outputs of the batch alone: no pass through the network, no n-vector. Newton's method on
η = f + Σα finds it, and the filter then conditions on the likelihood expanded there. For a Gaussian likelihood the
mode is where plain conditioning puts it, and nothing changes. Ours; the papers expand at the prior mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayes_kf.inference.linearization.jacobian import congruence
from bayes_kf.models.likelihood import Likelihood

MAX_NEWTON = 20
MAX_HALVINGS = 20


def expand_at_mode(
    family: Likelihood, outputs: Tensor, targets: Tensor, output_cov: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Whitening factor and residual of the likelihood expanded at the mode, referred back to the prior outputs.

    Args:
        family: the likelihood.
        outputs: f, (B, m), float64.
        targets: as the likelihood's ``check`` returned them.
        output_cov: Σ over the whole batch, (B·m, B·m).

    Returns:
        W (B, m, m) at the mode η*, u(η*) + W (η* − f), (B, m), so that Wᵀu is the gradient at f of the expansion, and
        η*, (B, m).
    """
    shape, cov = outputs.shape, output_cov.double()
    alpha = torch.zeros(outputs.numel(), dtype=torch.float64, device=outputs.device)
    value = family.log_prob(outputs, targets).sum()
    for _ in range(MAX_NEWTON):
        step = _newton(family, outputs, targets, cov, alpha) - alpha
        slope = torch.dot(step, cov @ (family.residual(_at(outputs, cov, alpha), targets).reshape(-1) - alpha))
        if not float(slope) > 1e-10 * (1.0 + abs(float(value))):
            break
        alpha, value, moved = _search(family, outputs, targets, cov, alpha, step, value, slope)
        if not moved:
            break
    mode = _at(outputs, cov, alpha)
    factor, residual = family.whiten(mode, targets)
    return factor, residual + (factor @ (mode - outputs).view(*shape, 1)).squeeze(-1), mode


def _at(outputs: Tensor, cov: Tensor, alpha: Tensor) -> Tensor:
    """η = f + Σα, (B, m)."""
    return outputs + (cov @ alpha).view_as(outputs)


def _newton(family: Likelihood, outputs: Tensor, targets: Tensor, cov: Tensor, alpha: Tensor) -> Tensor:
    """The α that solves the problem expanded at the present one, α = Wᵀ (I + WΣWᵀ)⁻¹ u."""
    point = _at(outputs, cov, alpha)
    factor, residual = family.whiten(point, targets)
    residual = residual + (factor @ (point - outputs).unsqueeze(-1)).squeeze(-1)
    gram = congruence(factor, cov)
    root = torch.linalg.cholesky(gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    weights = torch.cholesky_solve(residual.reshape(-1, 1), root).view(*residual.shape, 1)
    return (factor.mT @ weights).flatten()


def _search(
    family: Likelihood,
    outputs: Tensor,
    targets: Tensor,
    cov: Tensor,
    alpha: Tensor,
    step: Tensor,
    value: Tensor,
    slope: Tensor,
) -> tuple[Tensor, Tensor, bool]:
    """Halve the step until the objective grows enough; α, its value, and whether it moved."""
    scale = 1.0
    for _ in range(MAX_HALVINGS):
        tried = alpha + scale * step
        found = family.log_prob(_at(outputs, cov, tried), targets).sum() - 0.5 * tried @ cov @ tried
        if bool(found >= value + 1e-4 * scale * slope):
            return tried, found, True
        scale *= 0.5
    return alpha, value, False
