"""Observation noise models: from outputs and targets to the whitening factor W and residual u.

The exponential-family model whitens the likelihood itself. The others give a covariance R to the residual e of the
mean parameter, linearized as H = V J, and whiten by R = LLᵀ: W = L⁻¹V, u = L⁻¹e. On the probability simplex both e
and H are orthogonal to the vector of ones, so R is used in the (m−1)-dimensional contrast basis, where S stays
regular after the EMA has forgotten its start.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.models.likelihood import LIKELIHOODS, Gaussian, Likelihood

SMALLEST_PIVOT = 1e-13  # of a noise covariance, relative to its mean variance; smaller ones are rounding
PRIOR_COUNT = 1.0  # weight, in observations, of the first batch's guess of an estimated noise variance
LEAST_SHARE = 0.1  # of J P Jᵀ in that guess: one lucky prediction under a wide belief does not rule noise out
TRUSTS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001)  # factors on J P Jᵀ under which σ² is estimated, side by side


class NoiseState(NamedTuple):
    """What a noise model remembers.

    Attributes:
        step: updates seen.
        covariance: R of the EMA models, (m, m); the identity until the first update.
        variance: estimated σ² of a Gaussian likelihood per output, (m,).
        information: behind it per output, (m,), in observations whose mean is known.
        candidate_variance: σ² if errors of the mean have the variance t·J P Jᵀ, for t in ``TRUSTS``, (K, m).
        candidate_information: behind each, (K, m).
        candidate_loss: −log density of the residuals under each, later ones counting more, (K,).
        seen: examples in it, ().
    """

    step: int = 0
    covariance: Tensor | None = None
    variance: Tensor | None = None
    information: Tensor | None = None
    candidate_variance: Tensor | None = None
    candidate_information: Tensor | None = None
    candidate_loss: Tensor | None = None
    seen: Tensor | None = None


class Whitened(NamedTuple):
    """W (B, r, m), u (B, r), and the relative jitter that a Cholesky factor needed (0 as a rule)."""

    factor: Tensor
    residual: Tensor
    jitter: float


def likelihood(config: KalmanConfig, state: NoiseState) -> Likelihood:
    """The likelihood as the noise model now sees it: a Gaussian's σ² may be fixed or estimated."""
    if config.likelihood != "gaussian":
        return LIKELIHOODS[config.likelihood]()
    if state.variance is not None:
        return Gaussian(state.variance)
    if state.covariance is not None:
        return Gaussian(state.covariance.diagonal())
    value = 1.0 if config.noise_variance == "estimated" else float(config.noise_variance)
    return Gaussian(torch.tensor(value, dtype=torch.float64))


def begin(
    config: KalmanConfig,
    state: NoiseState,
    outputs: Tensor,
    targets: Tensor,
    output_variance: Callable[[], Tensor] | None = None,
) -> NoiseState:
    """The state with what this batch must know beforehand: R₀ = I, or a first guess of σ².

    Args:
        config: names the model.
        state: before the batch.
        outputs: η, (B, m).
        targets: y, (B, m).
        output_variance: gives the mean of J P⁻ Jᵀ over the batch, (m,). The guess is what the squared residuals are
            above it, at least a tenth of it. None where the mean has learned the targets already.
    """
    num_outputs = outputs.shape[1]
    if config.noise in ("ema_taylor", "ema_residual") and state.covariance is None:
        return state._replace(covariance=torch.eye(num_outputs, dtype=torch.float64, device=outputs.device))
    if config.noise_variance == "estimated" and state.variance is None:
        squares = (targets - outputs).double().square().mean(0)
        uncertain = torch.zeros_like(squares) if output_variance is None else output_variance().to(squares)
        return _guessed(state, squares, uncertain, torch.finfo(outputs.dtype).tiny ** 0.5)
    return state


def whiten(
    config: KalmanConfig, state: NoiseState, family: Likelihood, outputs: Tensor, targets: Tensor, output_cov: Tensor
) -> tuple[Whitened, NoiseState]:
    """W and u of a batch under the configured noise model, and the noise state after it.

    Args:
        config: names the model and β.
        state: as :func:`begin` left it.
        family: the likelihood of what is seen.
        outputs: η, (B, m).
        targets: as the likelihood's ``check`` returned them.
        output_cov: J P⁻ Jᵀ, (B, m, m), for the Taylor term of equation 12.
    """
    outputs = outputs.double()
    if config.noise == "exponential_family":
        factor, residual = family.whiten(outputs, _as_targets(targets))
        return Whitened(factor, residual, 0.0), state._replace(step=state.step + 1)
    residual = family.residual(outputs, _as_targets(targets))
    slope = family.variance(outputs)  # V = ∂π/∂η
    covariance = _covariance(config, state, residual, slope, output_cov.double())
    basis = _basis(config.likelihood, outputs)
    root, jitter = _cholesky(basis @ covariance @ basis.mT)
    whitener = torch.linalg.solve_triangular(root, basis, upper=False)  # L⁻¹Q (r, m)
    keep = covariance if config.noise.startswith("ema") else None
    return Whitened(whitener @ slope, residual @ whitener.mT, jitter), NoiseState(state.step + 1, keep)


def absorb(state: NoiseState, residual: Tensor, output_cov: Tensor) -> NoiseState:
    """Estimated σ² after a batch: scoring steps on log σ² for e ~ N(0, s), s = t·J P⁻ Jᵀ + σ², outputs apart (ours).

    An observation whose mean is still uncertain says little about σ² and weighs w = (σ²/s)². The estimate is a mean in
    which the k-th observation counts in proportion to k (Shamir and Zhang 2013), by steps of size 2w / (w + Σw): the
    first ones were weighed and learned under a poor guess of σ². That of all N is worth 3N/4 independent observations.

    t = 1 is right for a linear model and a belief that is exact. Where a network is linearized or P is a diagonal, P
    may overstate the errors, and σ² would vanish. So there is an estimate for each t of ``TRUSTS``, and the one that
    has predicted the residuals best holds: t and σ² are judged together, never one under a poor value of the other.

    Args:
        state: the noise state before, of a filter whose ``noise_variance`` is "estimated".
        residual: e = y − η at the mean before the update, (B, m).
        output_cov: J P⁻ Jᵀ of the belief itself, without the temperature of predictions, (B, m, m).
    """
    variance, information, loss, seen = _candidates(state)
    trusts = torch.tensor(TRUSTS, dtype=torch.float64, device=variance.device).view(-1, 1, 1)
    total = trusts * output_cov.double().diagonal(dim1=1, dim2=2) + variance.unsqueeze(1)  # s (K, B, m)
    ratio, share = residual.double().square() / total, variance.unsqueeze(1) / total
    seen = seen + len(residual)
    loss = loss + seen * 0.5 * (total.log() + ratio).sum((1, 2))
    weight = share.square().sum(1)
    information = information + weight
    step = 2.0 * ((ratio - 1.0) * share).sum(1) / (information + weight)
    variance = variance * step.clamp(-1.0, 1.0).exp()
    best = int(loss.argmin())
    return state._replace(
        variance=variance[best],
        information=information[best],
        candidate_variance=variance,
        candidate_information=information,
        candidate_loss=loss,
        seen=seen,
    )


def settled(state: NoiseState, variance: Tensor, information: Tensor) -> NoiseState:
    """The state with σ² known from elsewhere, (m,) each."""
    return NoiseState(state.step, state.covariance, variance, information)


def _guessed(state: NoiseState, squares: Tensor, uncertain: Tensor, least: float) -> NoiseState:
    """With the first guess under each candidate: squared residuals less t·J P Jᵀ, at least a tenth of J P Jᵀ."""
    trusts = torch.tensor(TRUSTS, dtype=torch.float64, device=squares.device).unsqueeze(1)
    guess = torch.maximum(squares - trusts * uncertain, LEAST_SHARE * uncertain)
    guess = guess.clamp_min(least)  # a batch fitted exactly still has noise
    information = torch.full_like(guess, PRIOR_COUNT)
    nothing = squares.new_zeros(len(TRUSTS))
    return NoiseState(state.step, state.covariance, guess[0], information[0], guess, information, nothing, nothing[0])


def _candidates(state: NoiseState) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """σ² and its information under each candidate, (K, m), their losses (K,) and the examples in them."""
    if state.candidate_variance is not None:
        assert state.candidate_information is not None
        assert state.candidate_loss is not None
        assert state.seen is not None
        return state.candidate_variance, state.candidate_information, state.candidate_loss, state.seen
    assert state.variance is not None
    assert state.information is not None
    nothing = state.variance.new_zeros(len(TRUSTS))
    many = (len(TRUSTS), 1)
    return state.variance.repeat(many), state.information.repeat(many), nothing, nothing[0]


def _as_targets(targets: Tensor) -> Tensor:
    return targets.double() if targets.is_floating_point() else targets


def _covariance(config: KalmanConfig, state: NoiseState, residual: Tensor, slope: Tensor, output_cov: Tensor) -> Tensor:
    """The noise covariance R of the present update, (m, m)."""
    if config.noise in ("identity", "decaying"):
        scale = math.exp(-state.step / 50) if config.noise == "decaying" else 1.0
        scale *= float(config.noise_variance) if config.likelihood == "gaussian" else 1.0
        return scale * torch.eye(residual.shape[1], dtype=residual.dtype, device=residual.device)
    estimate = residual.mT @ residual / len(residual)  # batch mean of eeᵀ
    if config.noise == "ema_taylor":
        estimate = estimate + (slope @ output_cov @ slope.mT).mean(0)  # + HP⁻Hᵀ
    assert state.covariance is not None
    return config.beta * state.covariance + (1 - config.beta) * estimate


def _basis(name: str, outputs: Tensor) -> Tensor:
    """Rows that span the space of residuals: Helmert contrasts (m−1, m) on the simplex, else the identity."""
    num_outputs = outputs.shape[1]
    if name != "categorical":
        return torch.eye(num_outputs, dtype=outputs.dtype, device=outputs.device)
    k = torch.arange(1, num_outputs, dtype=outputs.dtype, device=outputs.device).unsqueeze(-1)
    columns = torch.arange(num_outputs, dtype=outputs.dtype, device=outputs.device)
    return ((columns < k).to(outputs.dtype) - k * (columns == k).to(outputs.dtype)) / (k * (k + 1)).sqrt()


def _cholesky(covariance: Tensor) -> tuple[Tensor, float]:
    """Lower Cholesky factor, with the relative jitter that it took (0 where none was needed)."""
    scale = covariance.diagonal().mean()
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    for jitter in (0.0, 1e-12, 1e-10, 1e-8):
        root, failed = torch.linalg.cholesky_ex(covariance + jitter * scale * eye)
        if not bool(failed) and bool(root.diagonal().min().square() > SMALLEST_PIVOT * scale):
            return root, jitter
    raise FloatingPointError("the noise covariance is not positive definite even with a relative jitter of 1e-8")
