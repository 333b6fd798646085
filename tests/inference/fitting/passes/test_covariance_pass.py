"""The covariance at the final mean, against closed forms and the dense Laplace approximation."""

import pytest
import torch
from torch import nn

import bayes_kf as bkf
from bayes_kf.inference.fitting.passes.covariance_pass import add_at_mean, covariance_pass
from bayes_kf.models.batch import Batch


def data(number=40):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(number, 2, generator=generator, dtype=torch.float64)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


def batches(x, y, size=8):
    return [(x[k : k + size], y[k : k + size]) for k in range(0, len(x), size)]


def fitted(covariance, rank=60):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    config = bkf.KalmanConfig(covariance=covariance, rank=rank, temperature=1.0, mean_passes=2)
    return bkf.fit(model, batches(*data()), config, progress=False)


def laplace(posterior, x):
    """Λ₀ + Σ JᵀVJ at the mean, dense."""
    jacobian = posterior.kf.linearize(posterior.mean_vector, Batch.of(x)).jacobian().dense()
    variance = posterior.likelihood.variance(posterior.adapter.outputs(posterior.mean_vector, x))
    return torch.diag(1.0 / posterior.state.prior.variance) + torch.einsum(
        "bci,bcd,bdj->ij", jacobian, variance, jacobian
    )


@pytest.mark.parametrize("covariance", ["full", "low_rank"])
def test_it_is_the_laplace_approximation_at_the_mean(covariance):
    posterior, (x, y) = fitted(covariance), data()
    state = covariance_pass(posterior.kf, posterior.state, batches(x, y))
    actual = torch.linalg.inv(state.belief.covariance_matrix())
    torch.testing.assert_close(actual, laplace(posterior, x), rtol=1e-7, atol=1e-7)
    assert torch.equal(state.belief.mean, posterior.mean_vector)
    assert torch.equal(state.prior.variance, posterior.state.prior.variance)
    assert state.examples == 40
    assert not torch.allclose(actual, torch.linalg.inv(posterior.covariance_matrix()), rtol=0.1)  # that of the path


def test_further_examples_are_added_at_the_mean():
    posterior, (x, y) = fitted("full"), data()
    part = covariance_pass(posterior.kf, posterior.state, batches(x[:24], y[:24]))
    state = add_at_mean(posterior.kf, part, batches(x[24:], y[24:]))
    torch.testing.assert_close(
        torch.linalg.inv(state.belief.covariance_matrix()), laplace(posterior, x), rtol=1e-7, atol=1e-7
    )


def test_of_a_linear_model_it_changes_nothing():
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = x.sum(1, keepdim=True)
    config = bkf.KalmanConfig(likelihood="gaussian", covariance="full", noise_variance=0.3, initial_variance=2.0)
    posterior = bkf.fit(nn.Linear(3, 1).double(), batches(x, y), config, progress=False)
    state = covariance_pass(posterior.kf, posterior.state, batches(x, y))
    torch.testing.assert_close(state.belief.covariance_matrix(), posterior.covariance_matrix())
