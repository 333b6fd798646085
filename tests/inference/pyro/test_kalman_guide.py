"""The guide is the filter: exact on linear-Gaussian models in every structure, with the interface of an AutoGuide."""

import dataclasses

import pyro
import pytest
import torch
from oracles import linear_posterior
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoGuideList
from torch import nn

import bayes_kf as bkf
from bayes_kf.inference.covariance.structure import STRUCTURES
from bayes_kf.models.zoo import lora_digits_vit

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(20, 3, generator=G).double(), torch.randn(20, 1, generator=G).double()
BATCHES = [(X[:8], Y[:8]), (X[8:], Y[8:])]
Q = [0.1, 0.5, 0.8]


@pytest.fixture(autouse=True)
def _clean():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 1, bias=False).double()


def config(covariance="full", **settings):
    settings = {"noise_variance": 0.5, "initial_variance": 1.5, "temperature": 1.0, "rank": 3} | settings
    return bkf.KalmanConfig(likelihood="gaussian", covariance=covariance, **settings)


def learned(covariance="full", **settings):
    guide = bkf.KalmanGuide(linear(), config(covariance, **settings))
    for batch in BATCHES:
        guide.update(*batch)
    return guide


def exact():
    prior = linear().weight.detach().flatten()
    return linear_posterior(X, Y[:, 0], prior, 1.5 * torch.eye(3).double(), 0.5)


@pytest.mark.parametrize("covariance", list(STRUCTURES))
def test_updates_are_those_of_the_filter_to_the_bit(covariance):
    guide, kf = bkf.KalmanGuide(linear(), config(covariance)), bkf.KalmanFilter(linear(), config(covariance))
    state = kf.init()
    for batch in BATCHES:
        state, expected = kf.update(state, *batch)
        info = guide.update(*batch)
        assert info._replace(seconds=0.0, outputs=0, log_loss=0) == expected._replace(
            seconds=0.0, outputs=0, log_loss=0
        )
    for name, tensor in state.belief._asdict().items():
        assert torch.equal(guide.state.belief._asdict()[name], tensor), name
    assert (guide.state.step, guide.state.examples) == (2, 20)


@pytest.mark.parametrize("covariance", ["full", "low_rank", "block_diagonal"])
def test_it_holds_the_exact_posterior(covariance):
    guide, (mean, cov) = learned(covariance), exact()
    torch.testing.assert_close(guide.loc.detach(), mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(guide.get_posterior().covariance_matrix, cov, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(guide.get_posterior().mean, mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(guide.median()["weight"], mean.view(1, 3), rtol=1e-9, atol=1e-9)
    expected = torch.distributions.Normal(mean, cov.diagonal().sqrt()).icdf(
        torch.tensor(Q, dtype=torch.float64).view(3, 1)
    )
    torch.testing.assert_close(guide.quantiles(Q)["weight"], expected.view(3, 1, 3), rtol=1e-9, atol=1e-9)


def test_a_diagonal_posterior_is_independent_normal():
    guide = learned("diagonal", temperature=4.0)
    posterior = guide.get_posterior()
    assert isinstance(posterior, torch.distributions.Independent)
    torch.testing.assert_close(posterior.variance, 4.0 * guide.posterior().variance_vector, rtol=1e-12, atol=0.0)
    low, high = guide.quantiles(torch.tensor([0.25, 0.75]))["weight"].detach()
    torch.testing.assert_close(high - low, 2 * 0.6744897501960817 * posterior.stddev.detach().view(1, 3))


@pytest.mark.parametrize("covariance", ["full", "diagonal", "low_rank"])
@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_draws_from_the_posterior(covariance, parallel):
    guide = learned(covariance)
    draws = Predictive(guide.model, guide=guide, num_samples=2000, parallel=parallel)(X[:4])
    weights = draws["weight"].reshape(2000, 3)
    posterior = guide.get_posterior()
    cov = torch.diag(posterior.variance) if covariance == "diagonal" else posterior.covariance_matrix
    variance = cov.diagonal()
    assert ((weights.mean(0) - posterior.mean).abs() < 5 * (variance / 2000).sqrt()).all()
    error = ((cov**2 + torch.outer(variance, variance)) / 2000).sqrt()
    assert ((torch.cov(weights.T) - cov).abs() < 5 * error).all()
    expected = (weights @ X[:4].T).unsqueeze(-1)
    torch.testing.assert_close(draws["outputs"].reshape(2000, 4, 1), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("covariance", ["full", "diagonal_mixed", "low_rank"])
def test_svi_does_not_move_the_guide_from_its_optimum(covariance):
    """The gradient of the ELBO at the filter's posterior is zero within Monte Carlo error, for loc and scale."""
    guide, elbo = bkf.KalmanGuide(linear(), config(covariance)), Trace_ELBO()
    guide.update(X, Y)  # at once: the mixed form is then the optimum of independent numbers
    gradients = []
    for _ in range(400):
        loss = elbo.differentiable_loss(guide.model, guide, X, Y)
        gradients.append(torch.cat(torch.autograd.grad(loss, [guide.loc_unconstrained, guide.scale_unconstrained])))
    gradients = torch.stack(gradients)
    assert (gradients.mean(0).abs() < 5 * gradients.std(0) / 400**0.5).all()


def test_svi_stays_at_the_posterior_within_the_noise_of_its_steps():
    guide, (mean, cov) = learned(), exact()
    svi = SVI(guide.model, guide, pyro.optim.SGD({"lr": 1e-4}), Trace_ELBO(num_particles=50, vectorize_particles=True))
    for _ in range(50):
        svi.step(X, Y)
    precision = torch.linalg.inv(cov).diagonal()
    spread = 1e-4 * (50 * precision / 50).sqrt()  # of a random walk with the gradient's variance
    assert ((guide.loc - mean).abs() < 5 * spread).all()
    torch.testing.assert_close(guide.get_posterior().covariance_matrix, cov, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("covariance", ["full", "low_rank", "block_diagonal", "diagonal"])
def test_the_posterior_has_the_loc_and_scale_that_svi_moved(covariance):
    guide = learned(covariance)
    before = guide.get_posterior()
    scale, shift = torch.tensor([0.5, 1.0, 3.0]).double(), torch.tensor([1.0, 0.0, -2.0]).double()
    with torch.no_grad():
        guide.loc_unconstrained += shift
        guide.scale_unconstrained += scale.log()
    posterior = guide.posterior()
    old = torch.diag(before.variance) if covariance == "diagonal" else before.covariance_matrix
    expected = (torch.outer(scale, scale) * old).detach()
    torch.testing.assert_close(posterior.covariance_matrix(), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(posterior.mean_vector, (before.mean + 0).detach(), rtol=1e-9, atol=1e-9)
    now = guide.get_posterior()
    cov = torch.diag(now.variance) if covariance == "diagonal" else now.covariance_matrix
    torch.testing.assert_close(cov.detach(), expected, rtol=1e-9, atol=1e-12)
    kf = bkf.KalmanFilter(linear(), config(covariance))
    state, _ = kf.update(posterior.state, *BATCHES[0])  # the next update begins there
    guide.update(*BATCHES[0])
    torch.testing.assert_close(guide.loc.detach(), state.belief.mean, rtol=1e-9, atol=1e-9)
    assert bool((guide.scale == 1.0).all())


def test_log_density_of_a_draw_is_that_of_the_posterior():
    for covariance in ("full", "low_rank", "block_diagonal", "diagonal"):
        guide = learned(covariance, temperature=2.0)
        with torch.no_grad():
            guide.scale_unconstrained += torch.tensor([0.3, -0.2, 0.1])
        trace = poutine.trace(guide).get_trace(X)
        theta = trace.nodes["weight"]["value"].flatten()
        expected = guide.get_posterior().log_prob(theta)
        torch.testing.assert_close(trace.log_prob_sum(), expected, rtol=1e-9, atol=1e-9)


def test_the_first_call_scales_the_prior_as_the_filter_does():
    inputs = torch.randn(16, 4)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    expected = bkf.KalmanFilter(model).init(inputs).prior
    for use in (lambda g: g.init(inputs), lambda g: g(inputs), lambda g: g.model(inputs)):
        guide = bkf.KalmanGuide(model)
        assert not guide.state.prior_is_scaled
        use(guide)
        assert torch.equal(guide.state.prior.variance, expected.variance)
    guide = bkf.KalmanGuide(model)
    guide.update(inputs, torch.randint(3, (16,)))
    assert torch.equal(guide.state.prior.variance, expected.variance)
    with pytest.raises(ValueError, match=r"`inputs` must be given before the first update.*got None"):
        bkf.KalmanGuide(model)()


def test_it_is_an_autoguide_and_part_of_a_list():
    guide = learned()
    assert isinstance(guide, AutoGuide)
    together = AutoGuideList(guide.model)
    loc = guide.loc.detach().clone()
    together.append(guide)
    assert set(together(X, Y)) == {"weight"}
    torch.testing.assert_close(together.median(X, Y)["weight"].flatten(), loc)
    torch.testing.assert_close(together.quantiles([0.5], X, Y)["weight"].flatten(), loc)


def test_vectorized_particles_have_the_loss_of_single_ones():
    guide = learned("low_rank")
    together = Trace_ELBO(num_particles=20, vectorize_particles=True).loss(guide.model, guide, X, Y)
    assert together == pytest.approx(Trace_ELBO().loss(guide.model, guide, X, Y), rel=1e-9)  # zero variance: exact


def test_a_refused_update_changes_nothing():
    guide = learned()
    state = guide.state
    with pytest.raises(ValueError, match=r"`targets` must have shape \(8, 1\), got \(7, 1\)"):
        guide.update(X[:8], Y[:7])
    assert all(torch.equal(a, b) for a, b in zip(guide.state.belief, state.belief, strict=True))


def test_posterior_and_guide_go_back_and_forth(digits):
    stream, held_out = digits
    guide = bkf.KalmanGuide(lora_digits_vit(rank=2), bkf.KalmanConfig(rank=5))
    for start in range(0, 24, 8):
        guide.update(stream.images[start : start + 8], stream.labels[start : start + 8])
    posterior = guide.posterior()
    again = posterior.guide()
    assert torch.equal(again.loc, guide.loc)
    probs = posterior.predict(held_out.images[:4]).probs
    guide.update(stream.images[24:32], stream.labels[24:32])
    assert torch.equal(posterior.predict(held_out.images[:4]).probs, probs)  # the guide went on without it
    again.update(stream.images[24:32], stream.labels[24:32])
    assert torch.equal(again.loc, guide.loc)


def test_bad_arguments_are_named():
    guide = learned()
    with pytest.raises(ValueError, match=r"`quantiles` must lie in \[0, 1\], got \[0.5, 1.5\]"):
        guide.quantiles([0.5, 1.5])
    with pytest.raises(ValueError, match="`config` must be a KalmanConfig, got dict"):
        bkf.KalmanGuide(linear(), {})
    with pytest.raises(ValueError, match=r"`model` must be a module or an adapter, got a posterior; use its method"):
        bkf.KalmanGuide(guide.posterior())
    with pytest.raises(ValueError, match=r"`sites` must hold every trainable tensor, got none for 'weight'"):
        guide.model.observe({}, X)
    with pytest.raises(ValueError, match=r"`sites` must end in the shape \(1, 3\) for 'weight', got \(3, 1\)"):
        guide.model.observe({"weight": torch.zeros(3, 1)}, X)
    big = bkf.KalmanGuide(nn.Linear(20_001, 1, bias=False), dataclasses.replace(config("low_rank"), rank=1))
    with pytest.raises(ValueError, match="`get_posterior` takes at most 20,000 parameters, got 20,001"):
        big.get_posterior()
