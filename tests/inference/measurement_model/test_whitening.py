"""Half one of the update: WᵀW = V and Wᵀu = e for every likelihood, and what the noise models make of residuals."""

import math

import pytest
import torch
from torch.autograd.functional import hessian, jacobian

from bayes_kf.inference import KalmanConfig
from bayes_kf.inference.measurement_model import noise
from bayes_kf.inference.measurement_model.noise import NoiseState
from bayes_kf.models.likelihood import Bernoulli, Categorical, Gaussian, Poisson

G = torch.Generator().manual_seed(0)
ETA = torch.randn(4, 3, generator=G).double()
TARGETS = {
    "categorical": torch.tensor([0, 2, 1, 1]),
    "bernoulli": torch.tensor([[0, 1, 1]] * 4).double(),
    "gaussian": torch.randn(4, 3, generator=G).double(),
    "poisson": torch.tensor([[0, 3, 1]] * 4).double(),
}
FAMILIES = {
    "categorical": Categorical(),
    "bernoulli": Bernoulli(),
    "gaussian": Gaussian(torch.tensor([0.5, 1.0, 2.0]).double()),
    "poisson": Poisson(),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_whitening_gives_the_fisher_matrix_and_gradient_of_the_log_density(name):
    family, targets = FAMILIES[name], TARGETS[name]
    factor, residual = family.whiten(ETA, targets)
    for b in range(len(ETA)):
        one = targets[b : b + 1]
        gradient = jacobian(lambda eta: family.log_prob(eta[None], one)[0], ETA[b])  # noqa: B023
        negative_hessian = -hessian(lambda eta: family.log_prob(eta[None], one)[0], ETA[b])  # noqa: B023
        torch.testing.assert_close(factor[b].T @ factor[b], negative_hessian, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(factor[b].T @ residual[b], gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("smallest", [1e-12, 1e-6, 0.1])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_categorical_whitening_is_exact_at_tiny_probabilities(smallest, label):
    probs = torch.tensor([smallest, 0.4, 0.6 - smallest], dtype=torch.float64)
    j = torch.randn(3, 7, generator=torch.Generator().manual_seed(1)).double()
    factor, residual = Categorical().whiten(probs.log()[None], torch.tensor([label]))
    rows = factor[0] @ j
    v = torch.diag(probs) - torch.outer(probs, probs)
    e = torch.eye(3).double()[label] - probs
    torch.testing.assert_close(rows.T @ rows, j.T @ v @ j, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rows.T @ residual[0], j.T @ e, rtol=1e-12, atol=1e-12)


def test_whitening_stays_finite_when_float32_underflows():
    eta = torch.tensor([[200.0, 0.0, -200.0]])
    factor, residual = Categorical().whiten(eta, torch.tensor([2]))
    assert torch.isfinite(factor).all()
    torch.testing.assert_close(factor[0].T @ residual[0], torch.tensor([-1.0, 0.0, 1.0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["identity", "decaying"])
def test_fixed_noise_is_whitened_in_the_contrast_basis(name):
    config = KalmanConfig(noise=name)
    state = NoiseState(step=25)
    cov = torch.eye(3).double().expand(4, 3, 3)
    white, after = noise.whiten(config.noise_settings, state, Categorical(), ETA, TARGETS["categorical"], cov)
    scale = math.exp(-0.5) if name == "decaying" else 1.0
    e, v = Categorical().residual(ETA, TARGETS["categorical"]), Categorical().variance(ETA)
    assert white.factor.shape == (4, 2, 3)
    torch.testing.assert_close(white.factor.mT @ white.factor, v @ v / scale, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        (white.factor.mT @ white.residual[..., None])[..., 0], (v @ e[..., None])[..., 0] / scale
    )
    assert (after.step, white.jitter) == (26, 0.0)


@pytest.mark.parametrize("name", ["ema_residual", "ema_taylor"])
def test_moving_averages_take_the_batch_mean(name):
    config = KalmanConfig(noise=name, beta=0.9)
    cov = torch.rand(4, 3, 1, generator=G).double() * torch.eye(3).double()
    state = noise.initialize(config.noise_settings, NoiseState(), ETA, TARGETS["categorical"])
    assert torch.equal(state.covariance, torch.eye(3).double())
    _, after = noise.whiten(config.noise_settings, state, Categorical(), ETA, TARGETS["categorical"], cov)
    e, v = Categorical().residual(ETA, TARGETS["categorical"]), Categorical().variance(ETA)
    estimate = (
        sum(torch.outer(e[b], e[b]) + (v[b] @ cov[b] @ v[b] if name == "ema_taylor" else 0) for b in range(4)) / 4
    )
    torch.testing.assert_close(after.covariance, 0.9 * torch.eye(3).double() + 0.1 * estimate, rtol=1e-12, atol=1e-12)


def test_contrast_basis_survives_a_forgotten_start():
    config = KalmanConfig(noise="ema_residual", beta=0.5)
    e = Categorical().residual(ETA, TARGETS["categorical"])
    state = NoiseState(step=2000, covariance=(e.T @ e) / 4)  # singular along the ones: plain Cholesky fails
    assert torch.linalg.eigvalsh(state.covariance)[0].abs() < 1e-15
    white, _ = noise.whiten(
        config.noise_settings, state, Categorical(), ETA, TARGETS["categorical"], torch.zeros(4, 3, 3).double()
    )
    assert torch.isfinite(white.factor).all()
    assert white.jitter == 0.0


def test_jitter_is_reported():
    config = KalmanConfig(noise="ema_residual", beta=0.5)
    eta, y = ETA[:1], TARGETS["categorical"][:1]
    e = Categorical().residual(eta, y)
    white, _ = noise.whiten(
        config.noise_settings, NoiseState(5, e.T @ e), Categorical(), eta, y, torch.zeros(1, 3, 3).double()
    )  # rank one in two
    assert 0 < white.jitter <= 1e-8


BAD = [
    (Categorical(), ETA, torch.tensor([0, 1, 2, 3]), r"`targets` must lie in 0\.\.2 for 3 outputs, got 0\.\.3\."),
    (Categorical(), ETA, torch.tensor([-1, 1, 2, 0]), r"must lie in 0\.\.2 .* got -1\.\.2"),
    (
        Categorical(),
        ETA,
        torch.tensor([0.0, 1, 2, 1]),
        r"`targets` must be integer class labels, got dtype torch\.float32",
    ),
    (Categorical(), ETA, torch.zeros(4, 1).long(), r"`targets` must have shape \(4,\), got \(4, 1\)"),
    (Categorical(), ETA[:, :1], torch.zeros(4).long(), r"`likelihood` categorical needs at least 2 outputs, got 1"),
    (Bernoulli(), ETA, torch.full((4, 3), 1.5), r"`targets` must be 0 or 1 .*, or between, got 1\.5"),
    (Gaussian(), ETA, torch.zeros(4), r"`targets` must have shape \(4, 3\), got \(4,\)"),
    (Gaussian(), ETA, torch.full((4, 3), math.nan), r"`targets` must be finite, got 12 NaN or infinite"),
    (Poisson(), ETA, torch.full((4, 3), -1.0), r"`targets` must be whole numbers >= 0"),
    (Poisson(), ETA, torch.full((4, 3), 1.5), r"`targets` must be whole numbers >= 0"),
]


@pytest.mark.parametrize(("family", "eta", "targets", "message"), BAD)
def test_targets_that_do_not_fit(family, eta, targets, message):
    with pytest.raises(ValueError, match=message):
        family.check(eta, targets)
