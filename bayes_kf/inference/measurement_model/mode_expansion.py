"""Expansion of the likelihood at the posterior mode of the outputs instead of at their prior mean.

If a confident classifier meets a surprise, V ≈ 0 at the prior outputs. The plain extended Kalman filter then takes the
whole gradient step and gains almost no precision. The right step for the linearized model is the mode of

    log p(y | η) − ½ (η − f)ᵀ Σ⁻¹ (η − f),   Σ = J P Jᵀ,

a concave problem in the k outputs of the batch alone: it needs no pass through the network and no n-vector. Newton's
method on η = f + Σα finds the mode, and the filter conditions on the likelihood expanded there. For a Gaussian
likelihood plain conditioning reaches the mode, and nothing changes. Ours; the papers expand at the prior mean.

The log densities of two likelihoods are not concave. Student-t noise takes moments instead (``moment_matching``). With
heteroscedastic noise the joint mode of means and log variances is useless: where the mean is uncertain it moves to the
target, and the variance to zero. There the log variance is fitted to the expected squared residual r² + V, where V is
the variance of the mean given the targets (a variational approximation): a single target with an unknown mean then says
nothing about its variance. The precision is the Fisher information.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayes_kf.inference.linearization.jacobian import congruence, diagonal_blocks
from bayes_kf.models.likelihood import HeteroscedasticGaussian, Likelihood
from bayes_kf.models.likelihoods.canonical import CanonicalLikelihood

MAX_NEWTON = 20
MAX_SEARCH = 50  # steps if the log density is not concave
MAX_HALVINGS = 20


def expand_at_mode(
    family: Likelihood, outputs: Tensor, targets: Tensor, output_cov: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The whitening factor and the residual of the likelihood expanded at the mode, relative to the prior outputs.

    Args:
        family: any likelihood but Student's t.
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
    for _ in range(MAX_NEWTON if isinstance(family, CanonicalLikelihood) else MAX_SEARCH):
        W, u = family.whiten(eta, targets)
        if isinstance(family, HeteroscedasticGaussian):
            family = family.with_output_cov(_posterior_cov(W, cov))
            objective = family.log_prob(eta, targets).sum() - 0.5 * alpha @ cov @ alpha
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


def _posterior_cov(W: Tensor, cov: Tensor) -> Tensor:
    """Covariance of the outputs of each example given the targets, (B, m, m), for the precision WᵀW of the targets."""
    chol = torch.linalg.cholesky(congruence(W, cov) + torch.eye(len(cov), dtype=cov.dtype, device=cov.device))
    joint = (W @ cov.view(len(W), W.shape[2], -1)).flatten(0, 1)  # (B·r, B·m)
    explained = torch.linalg.solve_triangular(chol, joint, upper=False)
    return diagonal_blocks(cov - explained.mT @ explained, len(W))
