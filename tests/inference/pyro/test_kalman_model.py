"""The posterior as a Pyro guide: exact on linear-Gaussian models, and usable on real PEFT models."""

import dataclasses
import math

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
        **{"temperature": 1.0, **config},
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
    return bkf.fit(lora_digits_vit(rank=2), batches, bkf.KalmanConfig(), progress=False)


def tempered_log_evidence(prior_mean, temperature):
    """log ∫ N(θ; μ₀, T·P₀) Π N(yᵢ; xᵢθ, σ²)^(1/T) dθ; a Gaussian to the power 1/T is one of variance Tσ², rescaled."""
    spread = temperature * 1.5 * torch.eye(3).double()
    rescaled = 0.5 * 20 * math.log(2 * math.pi * temperature * 0.5) - 0.5 * 20 / temperature * math.log(math.pi)
    return log_evidence(X, Y[:, 0], prior_mean, spread, temperature * 0.5) + rescaled


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("covariance", ["full", "low_rank"])
def test_elbo_of_the_exact_posterior_is_the_log_evidence(covariance, temperature):
    posterior = linear_fit(covariance, rank=3, temperature=temperature)
    evidence = tempered_log_evidence(posterior.state.prior.mean, temperature)
    losses = torch.tensor([Trace_ELBO().loss(posterior.pyro_model, posterior.guide(), X, Y) for _ in range(20)])
    torch.testing.assert_close(
        -losses.double(), evidence.expand(20), rtol=1e-6, atol=1e-6
    )  # exact: no Monte Carlo error


def test_elbo_of_a_diagonal_posterior_is_exact_to_monte_carlo_error():
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


@pytest.mark.parametrize("temperature", [0.1, 3.0])
def test_nuts_on_a_tempered_model_has_the_guide_s_mean_and_covariance(temperature):
    posterior = linear_fit(temperature=temperature)
    mcmc = MCMC(NUTS(posterior.pyro_model), num_samples=300, warmup_steps=150, disable_progbar=True)
    mcmc.run(X, Y)
    draws = mcmc.get_samples()["weight"].reshape(300, 3)
    effective = mcmc.diagnostics()["weight"]["n_eff"].reshape(3).clamp_max(300)
    variance = temperature * posterior.variance_vector
    assert ((draws.mean(0) - posterior.mean_vector).abs() < 5 * (variance / effective).sqrt()).all()
    assert ((draws.var(0) - variance).abs() < 5 * variance * (2 / effective).sqrt()).all()
    guided = Predictive(posterior.guide(), num_samples=4000, parallel=True)(X)["weight"].reshape(4000, 3)
    assert ((guided.var(0) - variance).abs() < 5 * variance * (2 / 4000) ** 0.5).all()


@pytest.mark.parametrize("temperature", [0.1, 0.3, 3.0])
def test_svi_on_a_classifier_starts_near_its_optimum_at_every_temperature(digits, temperature):
    """T·(−ELBO) of the guide is near the value that SVI reaches, at every temperature."""
    images, labels = digits
    pixels = images.flatten(1)[:, ::50]
    torch.manual_seed(0)
    config = bkf.KalmanConfig(covariance="full", initial_variance=0.3, bound_prior=False, temperature=temperature)
    batches = list(zip(pixels.split(4), labels.split(4), strict=True))
    posterior = bkf.fit(nn.Linear(pixels.shape[1], 10), batches, config, progress=False)
    guide, elbo = posterior.guide(), Trace_ELBO(num_particles=100, vectorize_particles=True)
    svi = SVI(posterior.pyro_model, guide, pyro.optim.Adam({"lr": 3e-3}), elbo)
    before = svi.evaluate_loss(pixels, labels)
    for _ in range(150):
        svi.step(pixels, labels)
    after = svi.evaluate_loss(pixels, labels)
    assert temperature * (before - after) < 5.0  # nats, of 92 of a guess


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
@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_draws_from_the_belief_on_a_peft_model(fitted, digits, parallel):
    images, _ = digits
    draws = Predictive(fitted.pyro_model, guide=fitted.guide(), num_samples=200, parallel=parallel)(images[:6])
    assert draws["y"].shape == (200, 6)
    assert draws["outputs"].shape == (200, 6, 10)
    name = fitted.adapter.names[-1]
    mean, sd = fitted.mean[name], (fitted.temperature * fitted.variance[name]).sqrt()
    assert ((draws[name].reshape(200, *mean.shape).mean(0) - mean).abs() < 5 * sd / 200**0.5).all()
    probs = draws["outputs"].softmax(-1)
    expected = fitted.predict(images[:6], "sampled", num_samples=400)
    error = (probs.var(0) / 200 + expected.samples.var(0) / 400).sqrt()
    assert ((probs.mean(0) - expected.probs).abs() < 5 * error + 1e-6).all()


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_divides_logits_as_predictions_do(fitted, digits, parallel):
    images, _ = digits
    config = dataclasses.replace(fitted.config, softmax_temperature=0.5, temperature=2.0)
    posterior = bkf.Posterior(bkf.KalmanFilter(fitted.adapter, config), fitted.state)
    draws = posterior.sample(5)
    sites = {name: torch.stack([posterior.adapter.unflatten(d)[name] for d in draws]) for name in fitted.adapter.names}
    actual = Predictive(posterior.pyro_model, sites, return_sites=("outputs", "y"), parallel=parallel)(images[:6])
    expected = torch.stack([2.0 * posterior.adapter.outputs(draw, images[:6]) for draw in draws])
    torch.testing.assert_close(actual["outputs"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("covariance", ["diagonal", "low_rank"])
def test_adapters_in_one_pass_have_the_outputs_of_separate_passes(digits, covariance):
    """The same draws of the guide, replayed one by one: outputs and log densities."""
    images, labels = digits[0][:5], digits[1][:5]
    config = bkf.KalmanConfig(covariance=covariance, rank=5, temperature=0.5)
    posterior = bkf.fit(lora_digits_vit(rank=1), [(images, labels)], config, progress=False)
    guide, model = posterior.guide(), posterior.pyro_model
    with pyro.plate("particles", 3, dim=-2):
        guided = poutine.trace(guide).get_trace(images, labels)
        together = poutine.trace(poutine.replay(model, guided)).get_trace(images, labels, num_data=50)
    assert together.nodes["outputs"]["value"].shape == (3, 5, 10)
    total = together.log_prob_sum() - guided.log_prob_sum()
    apart = 0.0
    for k in range(3):
        one = {
            name: node["value"][k, 0]
            for name, node in guided.nodes.items()
            if node["type"] == "sample" and name != "particles"
        }
        joint = {name: value for name, value in one.items() if name.endswith("_joint")}  # the others follow from it
        of_guide = poutine.trace(poutine.condition(guide, joint or one)).get_trace(images, labels)
        of_model = poutine.trace(poutine.condition(model, one)).get_trace(images, labels, num_data=50)
        apart += (of_model.log_prob_sum() - of_guide.log_prob_sum()).item()
        actual = together.nodes["outputs"]["value"][k]
        torch.testing.assert_close(actual, of_model.nodes["outputs"]["value"], rtol=1e-4, atol=1e-4)
    assert abs(total.item() - apart) < 1e-4 * abs(apart)


def test_svi_with_vectorized_particles_has_the_gradient_of_particles_one_by_one(fitted, digits):
    images, labels = digits
    guide = fitted.guide()
    with pyro.plate("particles", 2, dim=-2):
        guided = poutine.trace(guide).get_trace(images, labels)
        model = poutine.trace(poutine.replay(fitted.pyro_model, guided)).get_trace(images, labels)
    (gradient,) = torch.autograd.grad(model.log_prob_sum(), guide.loc_unconstrained)
    expected = torch.zeros_like(gradient)
    for k in range(2):
        at = torch.cat([guided.nodes[name]["value"][k].reshape(-1) for name in fitted.adapter.names]).detach()
        at.requires_grad_()
        with fitted.adapter.eval_mode():
            outputs = fitted.adapter.call(fitted.adapter.tensors(at), images)
        prior = fitted.state.prior
        fits = -nn.functional.cross_entropy(outputs, labels, reduction="sum")
        joint = fits - 0.5 * ((at - prior.mean).square() / prior.variance).sum()
        expected += torch.autograd.grad(joint / fitted.temperature, at)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    pyro.clear_param_store()
    svi = SVI(
        fitted.pyro_model,
        fitted.guide(),
        pyro.optim.Adam({"lr": 1e-3}),
        Trace_ELBO(num_particles=4, vectorize_particles=True),
    )
    assert math.isfinite(svi.step(images[:8], labels[:8], num_data=40))


@pytest.mark.parametrize("covariance", ["diagonal", "low_rank"])
def test_svi_starts_at_the_posterior_and_lowers_its_loss(digits, covariance):
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
