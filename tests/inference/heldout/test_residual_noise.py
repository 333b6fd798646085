"""σ² by held-out residuals, where dynamics do not let it be chosen with the size."""

import math

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn

import bayes_kf as bkf
from bayes_kf.inference.fitting.passes import noise_refit
from bayes_kf.inference.heldout.residual_noise import heldout_noise_variance, with_heldout_noise
from bayes_kf.models.batch import Batch


def data(number, seed, outputs=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 5, generator=generator).double()
    weights = torch.randn(5, outputs, generator=torch.Generator().manual_seed(9)).double()
    return x, x @ weights + 0.3 * torch.randn(number, outputs, generator=generator).double()


def batches(x, y, size=10):
    return list(zip(x.split(size), y.split(size), strict=True))


def most_probable(present, residual, output_var):
    """σ² of one output by SciPy, under a scaled inverse χ² prior that weighs 20 observations."""

    def loss(log_variance):
        variance = math.exp(log_variance)
        total = output_var + variance
        prior = 10.0 * (log_variance + present / variance)
        return float(0.5 * (total.log() + residual.square() / total).sum()) + prior

    centre = math.log(present)
    return math.exp(minimize_scalar(loss, bounds=(centre - 6.9, centre + 6.9), method="bounded").x)


@pytest.mark.parametrize("number", [1, 20, 1000])
@pytest.mark.parametrize("noise_var", [0.01, 1.0, 50.0])
def test_the_variance_is_the_most_probable_one(number, noise_var):
    """Against SciPy's minimum; each output has its own, to half a step of the grid (3.5 %)."""
    generator = torch.Generator().manual_seed(number)
    output_var = 0.5 * torch.rand(number, 2, generator=generator).double()
    residual = (output_var + noise_var).sqrt() * torch.randn(number, 2, generator=generator).double()
    present = torch.tensor([1.0, 3.0]).double()
    actual = heldout_noise_variance(present, residual, output_var)
    expected = [most_probable(float(present[k]), residual[:, k], output_var[:, k]) for k in range(2)]
    assert actual.tolist() == pytest.approx(expected, rel=0.036)


def test_residuals_below_the_spread_of_the_outputs_do_not_change_it():
    present = torch.tensor([0.2]).double()
    residual = torch.randn(200, 1, generator=torch.Generator().manual_seed(0)).double()
    actual = heldout_noise_variance(present, 1e3 * residual, torch.full((200, 1), 1e6).double())
    assert float(actual) == pytest.approx(0.2, rel=0.04)


def fitted(outputs=1, **settings):
    settings = {"covariance": "full", "initial_variance": 1.0, "temperature": 1.0} | settings
    model = nn.Linear(5, outputs, bias=False).double()
    nn.init.zeros_(model.weight)
    config = bkf.KalmanConfig(likelihood="gaussian", noise_variance="estimated", **settings)
    return bkf.fit(model, batches(*data(100, 0, outputs)), config, progress=False)


def test_it_takes_the_residuals_and_the_covariance_of_the_outputs():
    posterior, (x, y) = fitted(2, temperature=4.0), data(30, 1, 2)
    present = posterior.state.noise.variance
    actual = with_heldout_noise(posterior, batches(x, y, 7), present)
    jacobian = posterior.kf.linearize(posterior.mean_vector, Batch.of(x)).jacobian().dense()  # (N, m, n)
    output_var = 4.0 * (jacobian @ posterior.covariance_matrix() * jacobian).sum(-1)
    residual = y - x @ posterior.mean["weight"].T
    expected = heldout_noise_variance(present, residual, output_var)
    torch.testing.assert_close(actual.state.noise.variance, expected, rtol=1e-9, atol=0)
    assert actual.state.noise.information.tolist() == [50.0, 50.0]  # 20 of the prior, 30 held out
    assert torch.equal(actual.covariance_matrix(), posterior.covariance_matrix())
    without = with_heldout_noise(posterior, batches(x, y), None)
    expected = heldout_noise_variance(torch.ones(2).double(), residual, output_var)
    torch.testing.assert_close(without.state.noise.variance, expected, rtol=1e-9, atol=0)


def test_calibrate_takes_the_noise_of_a_posterior_with_dynamics_from_held_out_data():
    """A belief whose σ² is a tenth of the true one, and held-out data that say so; two examples say little."""
    posterior, (x, y) = fitted(forgetting=0.999), data(300, 1)
    wrong = noise_refit.with_noise_variance(posterior.state, 0.1 * posterior.state.noise.variance)
    actual = bkf.Posterior(posterior.kf, wrong).calibrate(batches(x, y, 50))
    assert float(actual.state.noise.variance) ** 0.5 == pytest.approx(0.3, rel=0.15)
    with_few = bkf.Posterior(posterior.kf, wrong).calibrate(batches(x[:2], y[:2]))
    assert float(with_few.state.noise.variance) < 0.5 * float(actual.state.noise.variance)
    assert torch.equal(actual.mean_vector, posterior.mean_vector)
