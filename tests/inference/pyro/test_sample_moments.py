"""Posteriors from draws of NUTS."""

import pyro
import pytest
import torch
from oracles import linear_posterior
from pyro.infer import MCMC, NUTS
from torch import nn

import bayes_kf as bkf

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(20, 3, generator=G).double(), torch.randn(20, 1, generator=G).double()
CONFIG = bkf.KalmanConfig(
    likelihood="gaussian", covariance="full", noise_variance=0.5, initial_variance=1.5, temperature=1.0
)


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 1, bias=False).double()


def test_draws_of_nuts_are_a_posterior_that_predicts_and_learns(tmp_path):
    pyro.set_rng_seed(0)
    model = linear()
    prior = bkf.Posterior(bkf.KalmanFilter(model, CONFIG), bkf.KalmanFilter(model, CONFIG).init())
    sampler = MCMC(NUTS(prior.pyro_model), num_samples=400, warmup_steps=150, disable_progbar=True)
    sampler.run(X[:10], Y[:10])
    draws = sampler.get_samples()
    posterior = bkf.Posterior.from_samples(model, draws, CONFIG)
    flat = draws["weight"].reshape(400, 3)
    torch.testing.assert_close(posterior.covariance_matrix(), torch.cov(flat.T), rtol=1e-12, atol=1e-12)
    expected, cov = linear_posterior(X[:10], Y[:10, 0], prior.state.prior.mean, 1.5 * torch.eye(3).double(), 0.5)
    effective = sampler.diagnostics()["weight"]["n_eff"].reshape(3).clamp_max(400)
    assert ((posterior.mean_vector - expected).abs() < 5 * (cov.diagonal() / effective).sqrt()).all()
    state, _ = posterior.kf.update(posterior.state, X[10:], Y[10:])  # goes on as a filter
    mean, cov = linear_posterior(X[10:], Y[10:, 0], posterior.mean_vector, posterior.covariance_matrix(), 0.5)
    torch.testing.assert_close(state.belief.mean, mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state.belief.covariance_matrix(), cov, rtol=1e-9, atol=1e-9)
    posterior.save_pretrained(tmp_path / "posterior")
    again = bkf.Posterior.from_pretrained(tmp_path / "posterior", linear())
    assert torch.equal(again.predict(X[:4]).mean, posterior.predict(X[:4]).mean)


def test_the_prior_takes_its_scale_from_inputs():
    model, inputs = nn.Linear(3, 2), torch.randn(8, 3)
    draws = {"weight": torch.randn(50, 2, 3), "bias": torch.randn(50, 2), "tau": torch.ones(50)}
    with pytest.raises(ValueError, match=r"`inputs` must be given, since the prior takes .*got None"):
        bkf.Posterior.from_samples(model, draws)
    posterior = bkf.Posterior.from_samples(model, draws, inputs=inputs)
    expected = bkf.KalmanFilter(model).init(inputs).prior
    assert torch.equal(posterior.state.prior.variance, expected.variance)
    assert posterior.state.prior_is_scaled


def test_bad_samples_are_named():
    draws = {"weight": torch.randn(50, 1, 3).double()}
    with pytest.raises(ValueError, match="`samples` must hold every trainable tensor, got none for 'weight'"):
        bkf.Posterior.from_samples(linear(), {}, CONFIG)
    with pytest.raises(ValueError, match=r"`samples` must have shape \(50, 1, 3\) for 'weight', got \(50, 4\)"):
        bkf.Posterior.from_samples(linear(), {"weight": torch.randn(50, 4)}, CONFIG)
    draws["weight"][3, 0, 1] = float("nan")
    with pytest.raises(ValueError, match="`samples` must be finite, got NaN or infinity in 'weight'"):
        bkf.Posterior.from_samples(linear(), draws, CONFIG)
    estimated = bkf.KalmanConfig(likelihood="gaussian", noise_variance="estimated")
    with pytest.raises(ValueError, match="`noise_variance` must be a number, since the samples do not hold it"):
        bkf.Posterior.from_samples(linear(), draws, estimated)
