"""The joint likelihood log p(y₁ … y_N) of several examples under correlated outputs η ~ N(f, C).

The examples share the parameters, so their outputs are correlated: C = J P Jᵀ over all of them. The sum of their own
log p(yᵢ) hardly depends on the size of C; the joint likelihood does, as the evidence of a Gaussian process.

For a Gaussian likelihood it is in closed form. Otherwise it is Laplace's approximation (Rasmussen and Williams 2006,
sections 3.4 and 3.5): with the mode ĝ of log p(y | f + g) − ½ gᵀC⁻¹g and V = WᵀW the variance of y there,

    log p(y) ≈ log p(y | f + ĝ) − ½ ĝᵀC⁻¹ĝ − ½ log det(I + W C Wᵀ).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayes_kf.inference.linearization.jacobian import congruence
from bayes_kf.models.likelihood import Gaussian, Likelihood

MAX_NEWTON = 50  # steps toward the mode
CONVERGED = 1e-6  # nats of a Newton step, below which it is the last
MAX_HALVINGS = 12  # of a Newton step that would lower the objective


def joint_log_likelihood(
    family: Likelihood, outputs: Tensor, output_cov: Tensor, targets: Tensor, temperatures: Sequence[float]
) -> Tensor:
    """log p(y₁ … y_N) under η ~ N(outputs, t·output_cov) at each temperature t, (K,) in nats, float64.

    Args:
        family: the likelihood.
        outputs: f, (N, m).
        output_cov: C, (N·m, N·m), example after example.
        targets: as the likelihood's ``check`` returned them.
        temperatures: t, K of them.
    """
    outputs, output_cov = outputs.double(), output_cov.double()
    if isinstance(family, Gaussian):
        return torch.stack([_gaussian(family, outputs, t * output_cov, targets) for t in temperatures])
    start = torch.zeros_like(outputs)  # weights a with g = t·C a; each temperature starts at the last one's mode
    values = []
    for t in temperatures:
        value, start = _laplace(family, outputs, t * output_cov, targets, start)
        values.append(value)
    return torch.stack(values)


def _gaussian(family: Gaussian, outputs: Tensor, output_cov: Tensor, targets: Tensor) -> Tensor:
    noise_var = family.noise_variance.to(outputs).expand_as(outputs).flatten()
    residual = (targets.double() - outputs).flatten()
    normal = torch.distributions.MultivariateNormal(
        torch.zeros_like(residual), output_cov + torch.diag(noise_var), validate_args=False
    )
    return normal.log_prob(residual)


def _laplace(
    family: Likelihood, outputs: Tensor, output_cov: Tensor, targets: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """The Laplace approximation, a scalar, and the weights a (N, m) of the mode ĝ = C a."""

    def deviation(weights: Tensor) -> Tensor:
        return (output_cov @ weights.flatten()).view_as(outputs)

    def objective(weights: Tensor, g: Tensor) -> Tensor:
        return family.log_prob(outputs + g, targets).sum() - 0.5 * (weights * g).sum()

    weights = start
    g = deviation(weights)
    value = objective(weights, g)
    for _ in range(MAX_NEWTON):
        chol, proposal = _newton(family, outputs, output_cov, targets, g)
        step, share = proposal - weights, 1.0
        for _ in range(MAX_HALVINGS):
            candidate = weights + share * step
            moved = deviation(candidate)
            after = objective(candidate, moved)
            if bool(after >= value):
                break
            share *= 0.5
        else:
            break  # no step along this direction helps: rounding is larger than what is left to gain
        gain, weights, g, value = float(after - value), candidate, moved, after
        if gain < CONVERGED:
            break
    chol, _ = _newton(family, outputs, output_cov, targets, g)
    return value - chol.diagonal().log().sum(), weights


def _newton(
    family: Likelihood, outputs: Tensor, output_cov: Tensor, targets: Tensor, g: Tensor
) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of I + W C Wᵀ at g, and the weights (N, m) that Newton's step goes to.

    With b = Vg + e they are a = b − Wᵀ(I + W C Wᵀ)⁻¹ W C b.
    """
    factor, whitened = family.whiten(outputs + g, targets)
    inner = congruence(factor, output_cov)
    chol = torch.linalg.cholesky(inner + torch.eye(len(inner), dtype=inner.dtype, device=inner.device))
    pulled = whitened + (factor @ g.unsqueeze(-1)).squeeze(-1)  # b = Wᵀ(u + W g)
    b = (factor.mT @ pulled.unsqueeze(-1)).squeeze(-1)
    spread = (factor @ (output_cov @ b.flatten()).view_as(outputs).unsqueeze(-1)).squeeze(-1)  # W C b, (N, r)
    solved = torch.cholesky_solve(spread.reshape(-1, 1), chol).view_as(spread)
    return chol, b - (factor.mT @ solved.unsqueeze(-1)).squeeze(-1)
