"""σ² and the size of a regression's covariance by held-out examples, against dense densities over both."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from torch import nn

import bayes_kf as bkf
from bayes_kf.inference.heldout.noise_and_size import (
    choose_noise_and_size,
    chooses_noise,
    with_noise_and_size,
)
from bayes_kf.models.batch import Batch

BASE = {"likelihood": "gaussian", "noise_variance": "estimated", "covariance": "full", "temperature": 1.0}


def data(number, seed, outputs=1, noise=0.5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 4, generator=generator, dtype=torch.float64)
    weights = torch.tensor([[0.9, -0.7], [0.4, 0.6], [-0.3, 0.2], [0.1, 0.8]], dtype=torch.float64)[:, :outputs]
    return x, torch.tanh(x @ weights) + noise * torch.randn(number, outputs, generator=generator, dtype=torch.float64)


def batches(x, y, size=10):
    return list(zip(x.split(size), y.split(size), strict=True))


def fitted(outputs=1, number=40, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()
    config = bkf.KalmanConfig(**(BASE | settings))
    return bkf.fit(model, batches(*data(number, 0, outputs)), config, progress=False)


def dense(posterior, x, y):
    """P₀⁻¹, Λ, J, e and σ² as arrays."""
    prior = np.diag(1.0 / posterior.state.prior.variance.numpy())
    data_precision = np.linalg.inv(posterior.covariance_matrix().numpy()) - prior
    linearized = posterior.kf.linearize(posterior.mean_vector, Batch.of(x))
    jacobian = linearized.jacobian().dense().flatten(0, 1).numpy()
    residual = (y - linearized.outputs.detach()).flatten().numpy()
    return prior, data_precision, jacobian, residual, np.tile(posterior.state.noise.variance.numpy(), len(x))


def log_density(parts, size, factor, outputs):
    """The docstring's formula with matrices."""
    prior, data_precision, jacobian, residual, noise_var = parts
    covariance = jacobian @ np.linalg.inv(size * prior + data_precision / factor) @ jacobian.T
    likelihood = multivariate_normal(cov=covariance + factor * np.diag(noise_var)).logpdf(residual)
    return likelihood - 0.5 * np.log10(size) ** 2 - 10.0 * outputs * (np.log(factor) + 1.0 / factor)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("noise", [0.5, 1.5])  # that of the fit, and more
def test_the_chosen_pair_maximizes_the_joint_density(outputs, noise):
    posterior = fitted(outputs)
    x, y = data(45, 1, outputs, noise)
    chosen = choose_noise_and_size(posterior, batches(x, y, 15))
    parts = dense(posterior, x, y)
    best = min(
        (
            minimize(lambda at: -log_density(parts, np.exp(at[0]), np.exp(at[1]), outputs), start, method="Nelder-Mead")
            for start in ((0.0, 0.0), (3.0, 0.5))
        ),
        key=lambda result: result.fun,
    )
    here = log_density(parts, chosen.size.value, chosen.noise_factor.value, outputs)
    assert here == pytest.approx(chosen.size.log_density, rel=1e-6)
    assert here == pytest.approx(-best.fun, abs=0.01)  # nats; the search stops within 2 % of the maximum
    assert chosen.noise_factor.value == pytest.approx(np.exp(best.x[1]), rel=0.03)
    assert chosen.size.low <= chosen.size.value <= chosen.size.high
    assert chosen.examples == 45
    assert (chosen.noise_factor.value > 2.0) == (noise == 1.5)


@pytest.mark.parametrize("covariance", ["full", "low_rank"])
def test_the_posterior_has_the_chosen_noise_and_precision(covariance):
    posterior = fitted(covariance=covariance, rank=31)  # as many columns as parameters
    x, y = data(45, 1, noise=1.5)
    chosen = choose_noise_and_size(posterior, batches(x, y))
    after, factor = with_noise_and_size(posterior, chosen), chosen.noise_factor.value
    prior, data_precision, *_ = dense(posterior, x, y)
    expected = chosen.size.value * prior + data_precision / factor
    torch.testing.assert_close(
        torch.linalg.inv(after.covariance_matrix()), torch.from_numpy(expected), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(after.likelihood.noise_variance, factor * posterior.likelihood.noise_variance)
    torch.testing.assert_close(after.state.prior.variance, posterior.state.prior.variance / chosen.size.value)
    assert torch.equal(after.mean_vector, posterior.mean_vector)
    assert float(after.state.noise.information) == 65.0


def test_a_stale_noise_variance_is_found_again():
    """σ² of the fit is 0.04; the targets have 0.25, and intervals cover what they promise only under that."""
    posterior = fitted(number=200)
    small = posterior.state.noise._replace(variance=torch.tensor([0.04], dtype=torch.float64))
    stale = bkf.Posterior(posterior.kf, posterior.state._replace(noise=small))
    held, new = data(100, 1), data(2000, 2)

    def coverage(one):
        lower, upper = one.predict(new[0]).interval(0.9)
        return float(((lower <= new[1]) & (new[1] <= upper)).double().mean())

    after = with_noise_and_size(stale, choose_noise_and_size(stale, batches(*held)))
    assert coverage(stale) < 0.7
    assert coverage(after) == pytest.approx(0.9, abs=0.04)


def test_other_noise_is_refused():
    posterior = bkf.fit(
        nn.Linear(4, 1), [(torch.randn(8, 4), torch.randn(8, 1))], bkf.KalmanConfig(likelihood="gaussian")
    )
    assert not chooses_noise(posterior)
    with pytest.raises(ValueError, match="`posterior` must have `likelihood` 'gaussian', `noise_variance` 'estimated'"):
        choose_noise_and_size(posterior, [(torch.randn(8, 4), torch.randn(8, 1))])
    with pytest.raises(ValueError, match="`loader` must yield at least one batch, got none"):
        choose_noise_and_size(fitted(), [])
