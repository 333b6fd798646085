"""Observation noise models: from outputs and targets to the whitening factor W and the residual u.

The exponential-family model whitens the likelihood itself. The other models give a covariance R to the residual e of
the mean parameter, linearized as H = V J, and whiten by R = LLᵀ: W = L⁻¹V, u = L⁻¹e. On the probability simplex both e
and H are orthogonal to the vector of ones. R is therefore used in the (m−1)-dimensional contrast basis, where S stays
regular after the moving average has forgotten its initial value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.inference.config_groups import NoiseSettings
from bayes_kf.models.likelihood import LIKELIHOODS, Gaussian, Likelihood, StudentT
from bayes_kf.models.likelihoods.canonical import CanonicalLikelihood

MIN_PIVOT = 1e-13  # of a noise covariance, relative to its mean variance; smaller ones are rounding
PRIOR_COUNT = 1.0  # weight, in observations, of the initial guess of an estimated noise variance
MIN_VARIANCE_SHARE = 0.1  # of J P Jᵀ in that guess, since one lucky prediction of a wide belief does not exclude noise
MAX_SCALE_ROUNDS, SCALE_RTOL = 200, 1e-6  # of the search for the scale of Student-t noise
COVARIANCE_FACTORS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001)  # t of t·J P Jᵀ, one estimate of σ² under each


class NoiseState(NamedTuple):
    """The state of a noise model. The names are keys of the state's file.

    Attributes:
        step: number of updates.
        covariance: R of the moving-average models, (m, m); the identity until the first update.
        variance: estimated σ² of a Gaussian or Student-t likelihood per output, (m,).
        information: weight of that estimate per output, (m,), in observations whose mean is known.
        candidate_variance: σ² if errors of the mean have variance t·J P Jᵀ, for t in ``COVARIANCE_FACTORS``, (K, m).
        candidate_information: weight of each, (K, m).
        candidate_loss: −log density of the residuals under each, later residuals weighing more, (K,).
        seen: number of examples in ``candidate_loss``, ().
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
    """W (B, r, m), u (B, r), and the relative jitter of a Cholesky factor (usually 0)."""

    factor: Tensor
    residual: Tensor
    jitter: float


def likelihood(settings: NoiseSettings, state: NoiseState) -> Likelihood:
    """The likelihood under the present noise: σ² of a Gaussian or Student-t one may be fixed or estimated."""
    if settings.likelihood not in ("gaussian", "student_t"):
        return LIKELIHOODS[settings.likelihood]()
    value = 1.0 if settings.noise_variance == "estimated" else float(settings.noise_variance)
    variance = torch.tensor(value, dtype=torch.float64)
    if state.variance is not None:
        variance = state.variance
    elif state.covariance is not None:
        variance = state.covariance.diagonal()
    return Gaussian(variance) if settings.likelihood == "gaussian" else StudentT(variance, settings.student_dof)


def initialize(
    settings: NoiseSettings,
    state: NoiseState,
    outputs: Tensor,
    targets: Tensor,
    output_variance: Callable[[], Tensor] | None = None,
) -> NoiseState:
    """The state with R₀ = I, or an initial guess of σ², if the noise model needs one and has none.

    Args:
        settings: of the noise.
        state: before the batch.
        outputs: η, (B, m).
        targets: y, (B, m).
        output_variance: returns the mean of J P⁻ Jᵀ over the batch, (m,). The guess is the excess of the squared
            residuals over it, at least a tenth of it. None if the mean has been fitted to the targets.
    """
    num_outputs = outputs.shape[1]
    if settings.noise in ("ema_taylor", "ema_residual") and state.covariance is None:
        return state._replace(covariance=torch.eye(num_outputs, dtype=torch.float64, device=outputs.device))
    if settings.noise_variance == "estimated" and state.variance is None:
        squares = (targets - outputs).double().square()
        squares = squares.mean(0) if settings.likelihood == "gaussian" else student_scale(squares, settings.student_dof)
        explained = torch.zeros_like(squares) if output_variance is None else output_variance().to(squares)
        return _initial_guess(state, squares, explained, torch.finfo(outputs.dtype).tiny ** 0.5)
    return state


def whiten(
    settings: NoiseSettings,
    state: NoiseState,
    family: Likelihood,
    outputs: Tensor,
    targets: Tensor,
    output_cov: Tensor,
) -> tuple[Whitened, NoiseState]:
    """W and u of a batch under the configured noise model, and the noise state after it.

    Args:
        settings: the model and β.
        state: as :func:`initialize` returned it.
        family: the likelihood of the projected outputs.
        outputs: η, (B, m).
        targets: as the likelihood's ``check`` returned them.
        output_cov: J P⁻ Jᵀ, (B, m, m), for the Taylor term of LoKO's equation 12.
    """
    outputs, targets = outputs.double(), targets.double() if targets.is_floating_point() else targets
    if settings.noise == "exponential_family":
        factor, residual = family.whiten(outputs, targets)
        return Whitened(factor, residual, 0.0), state._replace(step=state.step + 1)
    assert isinstance(family, CanonicalLikelihood)  # the others have no other noise
    residual = family.residual(outputs, targets)
    V = family.variance(outputs)  # ∂π/∂η
    R = _covariance(settings, state, residual, V, output_cov.double())
    basis = _residual_basis(settings.likelihood, outputs)
    chol, jitter = _cholesky(basis @ R @ basis.mT)
    whitener = torch.linalg.solve_triangular(chol, basis, upper=False)  # L⁻¹Q (r, m)
    moving_average = R if settings.noise.startswith("ema") else None
    return Whitened(whitener @ V, residual @ whitener.mT, jitter), NoiseState(state.step + 1, moving_average)


def update_variance(state: NoiseState, residual: Tensor, output_cov: Tensor, dof: float | None = None) -> NoiseState:
    """Estimated σ² after a batch: scoring steps on log σ² for e ~ N(0, s), s = t·J P⁻ Jᵀ + σ², outputs apart (ours).

    An observation whose mean is uncertain carries little information about σ² and has weight w = (σ²/s)². The estimate
    is a mean in which the k-th observation counts in proportion to k (Shamir and Zhang 2013), by steps of size
    2w / (w + Σw), because the first observations were weighted under a poor guess of σ². Its variance is that of 3N/4
    independent observations.

    t = 1 is right for a linear model and an exact belief. If a network is linearized or P is diagonal, P may overstate
    the errors, and σ² would vanish. So there is one estimate for each t of ``COVARIANCE_FACTORS``, and the one under
    which the residuals were most probable is used: t and σ² are judged together.

    For a Student-t likelihood, e is taken to be √s times a Student-t variable. With r = e²/s, the score (r − 1)/2 of
    log s becomes ((ν+1) r/(ν + r) − 1)/2, and the information 1/2 becomes ν/(2(ν+3)).

    Args:
        state: the noise state before the batch; ``noise_variance`` is "estimated".
        residual: e = y − η at the mean before the update, (B, m).
        output_cov: J P⁻ Jᵀ of the belief, without the temperature of predictions, (B, m, m).
        dof: ν of a Student-t likelihood; None for a Gaussian one.
    """
    variance, information, loss, seen = _candidates(state)
    t = torch.tensor(COVARIANCE_FACTORS, dtype=torch.float64, device=variance.device).view(-1, 1, 1)
    s = t * output_cov.double().diagonal(dim1=1, dim2=2) + variance.unsqueeze(1)  # (K, B, m)
    ratio, share = residual.double().square() / s, variance.unsqueeze(1) / s
    seen = seen + len(residual)
    log_tail, score, efficiency = ratio, ratio - 1.0, 1.0
    if dof is not None:
        log_tail, score = (dof + 1.0) * (ratio / dof).log1p(), (dof + 1.0) * ratio / (dof + ratio) - 1.0
        efficiency = dof / (dof + 3.0)  # information about log σ², relative to that of Gaussian noise
    loss = loss + seen * 0.5 * (s.log() + log_tail).sum((1, 2))
    weight = efficiency * share.square().sum(1)
    information = information + weight
    step = 2.0 * (score * share).sum(1) / (information + weight)
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


def student_scale(squares: Tensor, dof: float) -> Tensor:
    """The most probable σ² of Student-t noise given squared errors (N, m), (m,): σ² = mean of w e².

    w = (ν+1)/(ν + e²/σ²) are the weights of iteratively reweighted least squares (Lange, Little and Taylor 1989).
    """
    variance = squares.mean(0).clamp_min(torch.finfo(squares.dtype).tiny)
    for _ in range(MAX_SCALE_ROUNDS):
        last, variance = variance, ((dof + 1.0) * squares / (dof + squares / variance)).mean(0)
        variance = variance.clamp_min(torch.finfo(squares.dtype).tiny)
        if float((variance / last).log().abs().max()) < SCALE_RTOL:
            break
    return variance


def with_variance(state: NoiseState, variance: Tensor, information: Tensor) -> NoiseState:
    """The state with a given σ² and its weight, (m,) each, without other candidates."""
    return NoiseState(state.step, state.covariance, variance, information)


def _initial_guess(state: NoiseState, squares: Tensor, explained: Tensor, minimum: float) -> NoiseState:
    """The state with e² − t·J P Jᵀ, at least a tenth of J P Jᵀ, as the guess of σ² under each t."""
    t = torch.tensor(COVARIANCE_FACTORS, dtype=torch.float64, device=squares.device).unsqueeze(1)
    guess = torch.maximum(squares - t * explained, MIN_VARIANCE_SHARE * explained)
    guess = guess.clamp_min(minimum)  # a batch with zero residuals still has noise
    information = torch.full_like(guess, PRIOR_COUNT)
    zeros = squares.new_zeros(len(COVARIANCE_FACTORS))
    return NoiseState(state.step, state.covariance, guess[0], information[0], guess, information, zeros, zeros[0])


def _candidates(state: NoiseState) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """σ² and its weight under each t, (K, m), their losses (K,) and the number of examples in the losses."""
    if state.candidate_variance is not None:
        assert state.candidate_information is not None
        assert state.candidate_loss is not None
        assert state.seen is not None
        return state.candidate_variance, state.candidate_information, state.candidate_loss, state.seen
    assert state.variance is not None
    assert state.information is not None
    count = len(COVARIANCE_FACTORS)
    zeros = state.variance.new_zeros(count)
    return state.variance.repeat(count, 1), state.information.repeat(count, 1), zeros, zeros[0]


def _covariance(settings: NoiseSettings, state: NoiseState, residual: Tensor, V: Tensor, output_cov: Tensor) -> Tensor:
    """The noise covariance R of this update, (m, m)."""
    if settings.noise in ("identity", "decaying"):
        scale = math.exp(-state.step / 50) if settings.noise == "decaying" else 1.0
        scale *= float(settings.noise_variance) if settings.likelihood == "gaussian" else 1.0
        return scale * torch.eye(residual.shape[1], dtype=residual.dtype, device=residual.device)
    estimate = residual.mT @ residual / len(residual)  # batch mean of eeᵀ
    if settings.noise == "ema_taylor":
        estimate = estimate + (V @ output_cov @ V.mT).mean(0)  # + HP⁻Hᵀ
    assert state.covariance is not None
    return settings.beta * state.covariance + (1 - settings.beta) * estimate


def _residual_basis(name: str, outputs: Tensor) -> Tensor:
    """A basis Q of the space of residuals: Helmert contrasts (m−1, m) on the simplex, otherwise the identity."""
    num_outputs = outputs.shape[1]
    if name != "categorical":
        return torch.eye(num_outputs, dtype=outputs.dtype, device=outputs.device)
    k = torch.arange(1, num_outputs, dtype=outputs.dtype, device=outputs.device).unsqueeze(-1)
    columns = torch.arange(num_outputs, dtype=outputs.dtype, device=outputs.device)
    return ((columns < k).to(outputs.dtype) - k * (columns == k).to(outputs.dtype)) / (k * (k + 1)).sqrt()


def _cholesky(covariance: Tensor) -> tuple[Tensor, float]:
    """Lower Cholesky factor, and the relative jitter that it needed (0 if none)."""
    scale = covariance.diagonal().mean()
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    for jitter in (0.0, 1e-12, 1e-10, 1e-8):
        chol, failed = torch.linalg.cholesky_ex(covariance + jitter * scale * eye)
        if not bool(failed) and bool(chol.diagonal().min().square() > MIN_PIVOT * scale):
            return chol, jitter
    raise FloatingPointError("the noise covariance is not positive definite even with a relative jitter of 1e-8")
