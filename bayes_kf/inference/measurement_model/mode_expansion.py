"""Expansion of the likelihood at the posterior mode of the outputs instead of at their prior mean.

If a confident classifier meets a surprise, V ≈ 0 at the prior outputs. The plain extended Kalman filter then takes the
whole gradient step and gains almost no precision. The right step for the linearized model is the mode of

    log p(y | η) − ½ (η − f)ᵀ Σ⁻¹ (η − f),   Σ = J P Jᵀ,

a problem in the k outputs of the batch alone: it needs no pass through the network and no n-vector. Newton's method on
η = f + Σα finds the mode, and the filter conditions on the likelihood expanded there. The problem is concave for
likelihoods in their canonical link. The others take steps with another positive curvature (``newton_factor``), which
raise the objective to a mode, where their Fisher information is the precision. For a Gaussian likelihood plain
conditioning reaches the mode, and nothing changes. Ours; the papers expand at the prior mean.
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
    """The whitening factor and the residual of the likelihood expanded at the mode, relative to the prior outputs.

    Args:
        family: the likelihood.
        outputs: f, (B, m), float64.
        targets: as the likelihood's ``check`` returned them.
        output_cov: Σ over the whole batch, (B·m, B·m).

    Returns:
        W (B, m, m) at the mode η*; u(η*) + W (η* − f), (B, m), so that Wᵀ times it is the gradient at f of the
        expansion; and η*, (B, m).
    """
    f, cov = outputs, output_cov.double()
    eye = torch.eye(len(cov), dtype=cov.dtype, device=cov.device)
    alpha = torch.zeros(f.numel(), dtype=torch.float64, device=f.device)
    eta = f + (cov @ alpha).view_as(f)
    objective = family.log_prob(f, targets).sum()
    for _ in range(MAX_NEWTON):
        W, u = family.newton_factor(eta, targets)
        u = u + (W @ (eta - f).unsqueeze(-1)).squeeze(-1)  # relative to f
        # the Newton step: α = Wᵀ (I + WΣWᵀ)⁻¹ u solves the problem expanded at the present η
        chol = torch.linalg.cholesky(congruence(W, cov) + eye)
        weights = torch.cholesky_solve(u.reshape(-1, 1), chol).view(*u.shape, 1)
        step = (W.mT @ weights).flatten() - alpha
        slope = torch.dot(step, cov @ (family.residual(eta, targets).reshape(-1) - alpha))
        if not float(slope) > 1e-10 * (1.0 + abs(float(objective))):
            break
        scale = 1.0
        for _ in range(MAX_HALVINGS):  # until the objective grows enough (Armijo)
            new_alpha = alpha + scale * step
            new_eta = f + (cov @ new_alpha).view_as(f)
            new_objective = family.log_prob(new_eta, targets).sum() - 0.5 * new_alpha @ cov @ new_alpha
            if bool(new_objective >= objective + 1e-4 * scale * slope):
                break
            scale *= 0.5
        else:
            break  # no step along this direction raises the objective
        alpha, eta, objective = new_alpha, new_eta, new_objective
    W, u = family.whiten(eta, targets)
    return W, u + (W @ (eta - f).unsqueeze(-1)).squeeze(-1), eta
