"""The belief as a Pyro guide: exact on linear-Gaussian models, working on real PEFT ones."""

import pyro
import pytest
import torch
from oracles import linear_posterior, log_evidence
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from torch import nn

import bayes_kf as bkf
from bayes_kf.data import uci_digits_split
from bayes_kf.models.zoo import lora_digits_vit

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(20, 3, generator=G).double(), torch.randn(20, 1, generator=G).double()


@pytest.fixture(autouse=True)
def _clean():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def linear_fit(covariance="full", **config):
    torch.manual_seed(0)
    setting = bkf.KalmanConfig(
        likelihood="gaussian",
        covariance=covariance,
        noise_variance=0.5,
        initial_variance=1.5,
        temperature=1.0,
        **config,
    )
    model = nn.Linear(3, 1, bias=False).double()
    return bkf.fit(model, [(X[:8], Y[:8]), (X[8:], Y[8:])], setting, progress=False)


@pytest.fixture(scope="module")
def digits():
    stream, _ = uci_digits_split()
    return stream.images[:40], stream.labels[:40]


@pytest.fixture(scope="module")
def fitted(digits):
    images, labels = digits
    batches = [(images[i : i + 4], labels[i : i + 4]) for i in range(0, 40, 4)]
    return bkf.fit(lora_digits_vit(rank=2), batches, progress=False)


@pytest.mark.parametrize("covariance", ["full", "low_rank"])
def test_elbo_of_the_exact_posterior_is_the_log_evidence(covariance):
    posterior = linear_fit(covariance, rank=3)
    prior_mean = posterior.state.prior.mean
    evidence = log_evidence(X, Y[:, 0], prior_mean, 1.5 * torch.eye(3).double(), 0.5)
    losses = torch.tensor([Trace_ELBO().loss(posterior.pyro_model, posterior.guide(), X, Y) for _ in range(20)])
    torch.testing.assert_close(
        -losses.double(), evidence.expand(20), rtol=1e-6, atol=1e-6
    )  # exact: no Monte Carlo error


def test_elbo_of_a_diagonal_belief_is_its_own_to_monte_carlo_error():
    posterior = linear_fit("diagonal_information")
    mean, variance, prior = posterior.mean_vector, posterior.variance_vector, posterior.state.prior
    residual = Y[:, 0] - X @ mean
    expected = (
        -0.5 * 20 * torch.log(torch.tensor(2 * torch.pi * 0.5))
        - 0.5 * (residual @ residual + (X.square() @ variance).sum()) / 0.5
        - 0.5 * ((variance + (mean - prior.mean) ** 2) / prior.variance - 1 - (variance / prior.variance).log()).sum()
    )
    guide = posterior.guide()
    losses = torch.tensor([Trace_ELBO().loss(posterior.pyro_model, guide, X, Y) for _ in range(500)]).double()
    assert abs(-losses.mean() - expected) < 5 * losses.std() / 500**0.5


def test_nuts_on_the_same_model_agrees_with_the_belief():
    posterior = linear_fit()
    kernel = NUTS(posterior.pyro_model)
    mcmc = MCMC(kernel, num_samples=300, warmup_steps=200, disable_progbar=True)
    mcmc.run(X, Y)
    draws = mcmc.get_samples()["weight"].reshape(300, 3)
    effective = torch.tensor([float(d["n_eff"].min()) for k, d in mcmc.diagnostics().items() if k == "weight"])
    error = (posterior.variance_vector / effective.clamp_max(300)).sqrt()
    assert ((draws.mean(0) - posterior.mean_vector).abs() < 5 * error).all()
    covariance = posterior.covariance_matrix()
    spread = (
        (covariance**2 + torch.outer(covariance.diagonal(), covariance.diagonal())).div(effective.clamp_max(300)).sqrt()
    )
    assert ((torch.cov(draws.T) - covariance).abs() < 5 * spread).all()
    exact, _ = linear_posterior(X, Y[:, 0], posterior.state.prior.mean, 1.5 * torch.eye(3).double(), 0.5)
    torch.testing.assert_close(posterior.mean_vector, exact, rtol=1e-9, atol=1e-9)


def test_sites_are_the_adapter_s_tensors_in_model_and_guide(fitted, digits):
    images, labels = digits
    model = poutine.trace(fitted.pyro_model).get_trace(images[:4], labels[:4])
    guide = poutine.trace(fitted.guide()).get_trace(images[:4], labels[:4])
    sites = [name for name in guide.stochastic_nodes if not name.endswith("_joint")]
    assert sorted(sites) == sorted(fitted.adapter.names)
    assert {name for name in model.stochastic_nodes if name != "data"} == set(fitted.adapter.names)
    assert model.nodes["y"]["is_observed"]
    assert all(
        model.nodes[n]["value"].shape == s for n, s in zip(fitted.adapter.names, fitted.adapter.shapes, strict=True)
    )
    assert torch.isfinite(model.log_prob_sum())


@pytest.mark.filterwarnings("ignore:`method` 'sampled' and 'linearized' disagree")
def test_predictive_draws_from_the_belief_on_a_peft_model(fitted, digits):
    images, _ = digits
    draws = Predictive(fitted.pyro_model, guide=fitted.guide(), num_samples=200)(images[:6])
    assert draws["y"].shape == (200, 6)
    name = fitted.adapter.names[-1]
    mean, sd = fitted.mean[name], (fitted.temperature * fitted.variance[name]).sqrt()
    assert ((draws[name].reshape(200, *mean.shape).mean(0) - mean).abs() < 5 * sd / 200**0.5).all()
    probs = draws["outputs"].reshape(200, 6, 10).softmax(-1)
    expected = fitted.predict(images[:6], "sampled", num_samples=400)
    error = (probs.var(0) / 200 + expected.samples.var(0) / 400).sqrt()
    assert ((probs.mean(0) - expected.probs).abs() < 5 * error + 1e-6).all()


@pytest.mark.parametrize("covariance", ["diagonal", "low_rank"])
def test_svi_goes_on_from_the_belief_and_lowers_its_loss(digits, covariance):
    images, labels = digits
    config = bkf.KalmanConfig(covariance=covariance, rank=5)
    model = (
        lora_digits_vit(rank=1, targets=["q_proj"], train_head=False)
        if covariance == "low_rank"
        else lora_digits_vit(rank=2)
    )
    posterior = bkf.fit(model, [(images[:8], labels[:8])], config, progress=False)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    guide = posterior.guide()
    start = guide.loc.detach().clone()
    assert torch.equal(start, posterior.mean_vector)
    svi = SVI(posterior.pyro_model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    pyro.set_rng_seed(0)
    before = sum(svi.evaluate_loss(images, labels) for _ in range(20))
    for _ in range(60):
        svi.step(images, labels)
    pyro.set_rng_seed(0)
    after = sum(svi.evaluate_loss(images, labels) for _ in range(20))
    assert after < before
    assert not torch.equal(guide.loc, start)
    assert torch.equal(posterior.mean_vector, start)
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())


def test_two_posteriors_guides_do_not_share_parameters():
    first, second = linear_fit(), linear_fit(forgetting=0.9)
    guides = [first.guide(), second.guide()]
    for guide, posterior in zip(guides, (first, second), strict=True):
        poutine.trace(guide).get_trace(X, Y)
        torch.testing.assert_close(guide.loc.detach(), posterior.mean_vector)


def test_minibatch_stands_for_the_whole_data():
    posterior = linear_fit()
    trace = poutine.trace(poutine.condition(posterior.pyro_model, data=posterior.mean)).get_trace(
        X[:5], Y[:5], num_data=20
    )
    trace.compute_log_prob()
    family = torch.distributions.Normal(X[:5] @ posterior.mean["weight"].T, 0.5**0.5)
    torch.testing.assert_close(trace.nodes["y"]["log_prob_sum"], 4 * family.log_prob(Y[:5]).sum(), rtol=1e-9, atol=1e-9)


def test_bad_targets_are_named():
    with pytest.raises(ValueError, match=r"`targets` must have shape \(20, 1\), got \(19, 1\)"):
        linear_fit().pyro_model(X, Y[:19])
