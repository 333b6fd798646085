"""KalmanSVI in the place of SVI: exact posteriors and evidences, the user's priors, several passes, refusals."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import linear_posterior, log_evidence
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.nn import PyroModule, PyroSample
from scipy import integrate
from torch import nn

import bayes_kf as bkf
from bayes_kf.inference import Horseshoe
from bayes_kf.models.zoo import lora_digits_vit

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(20, 3, generator=G).double(), torch.randn(20, 1, generator=G).double()
MEAN, SD = torch.tensor([0.5, 0.0, -1.0]).double(), torch.tensor([1.0, 2.0, 0.3]).double()


@pytest.fixture(autouse=True)
def _clean():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def guide_of(covariance="full", **settings):
    torch.manual_seed(0)
    settings = {"noise_variance": 0.5, "temperature": 1.0, "rank": 3} | settings
    config = bkf.KalmanConfig(likelihood="gaussian", covariance=covariance, **settings)
    return bkf.KalmanGuide(nn.Linear(3, 1, bias=False).double(), config)


def linear_model(prior=None, sd=0.5**0.5, name="weight"):
    """A Pyro model of the user's own: linear regression under a prior of the weights, (1, 3)."""
    prior = dist.Normal(MEAN.view(1, 3), SD.view(1, 3)) if prior is None else prior

    def model(x, y=None, num_data=None):
        weight = pyro.sample(name, prior.to_event(2))
        with pyro.plate("data", num_data or len(x), subsample=x[:, 0]):
            return pyro.sample("obs", dist.Normal(x @ weight.mT, sd).to_event(1), obs=y)

    return model


@pytest.mark.parametrize("covariance", ["full", "low_rank", "block_diagonal"])
@pytest.mark.parametrize("size", [1, 7])
def test_all_batches_give_the_exact_posterior_under_the_user_s_prior(covariance, size):
    guide = guide_of(covariance)
    svi = bkf.KalmanSVI(linear_model(), guide)
    losses = [svi.step(x, y) for x, y in zip(X.split(size), Y.split(size), strict=True)]
    prior_cov = torch.diag(SD.square())
    mean, cov = linear_posterior(X, Y[:, 0], MEAN, prior_cov, 0.5)
    torch.testing.assert_close(guide.loc.detach(), mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(guide.get_posterior().covariance_matrix.detach(), cov, rtol=1e-9, atol=1e-9)
    evidence = float(log_evidence(X, Y[:, 0], MEAN, prior_cov, 0.5))
    if size == 1:
        assert sum(losses) == pytest.approx(-evidence, rel=1e-9)
    else:  # the examples of a batch on their own
        mean, cov, expected = MEAN, prior_cov, 0.0
        for x, y in zip(X.split(size), Y.split(size), strict=True):
            variance = (x @ cov @ x.T).diagonal() + 0.5
            expected -= float(torch.distributions.Normal(x @ mean, variance.sqrt()).log_prob(y[:, 0]).sum())
            mean, cov = linear_posterior(x, y[:, 0], mean, cov, 0.5)
        assert sum(losses) == pytest.approx(expected, rel=1e-9)
    assert torch.equal(guide.state.prior.mean, MEAN)


def test_losses_with_num_data_are_on_the_scale_of_the_elbo_which_bounds_them():
    guide = guide_of()
    svi = bkf.KalmanSVI(linear_model(), guide)
    losses = [svi.step(x, y, num_data=20) for x, y in zip(X.split(1), Y.split(1), strict=True)]
    evidence = float(log_evidence(X, Y[:, 0], MEAN, torch.diag(SD.square()), 0.5))
    assert sum(losses) / 20 == pytest.approx(-evidence, rel=1e-9)
    elbo = Trace_ELBO().loss(linear_model(), guide, X, Y)
    assert elbo == pytest.approx(-evidence, rel=1e-9)  # the exact posterior: without Monte Carlo error
    worse = guide_of("diagonal", initial_variance=1.5)
    assert Trace_ELBO(num_particles=200).loss(linear_model(), worse, X, Y) > -evidence


def test_evaluate_loss_is_that_of_the_next_step_and_changes_nothing():
    guide = guide_of()
    svi = bkf.KalmanSVI(linear_model(), guide)
    first = svi.evaluate_loss(X[:4], Y[:4], num_data=8)
    assert guide.state.step == 0
    assert svi.step(X[:4], Y[:4]) == pytest.approx(first / 2, rel=1e-12)
    loc = guide.loc.detach().clone()
    second = svi.evaluate_loss(X[4:8], Y[4:8])
    assert torch.equal(guide.loc, loc)
    assert svi.step(X[4:8], Y[4:8]) == second


def test_the_loss_of_a_class_is_integrated_over_the_belief():
    """Quadrature of ∫ σ(η) N(η; f, s²) dη for one example after some others."""
    torch.manual_seed(0)
    config = bkf.KalmanConfig(likelihood="bernoulli", covariance="full", initial_variance=4.0, bound_prior=False)
    guide = bkf.KalmanGuide(nn.Linear(3, 1).double(), config)
    svi, answers = bkf.KalmanSVI(guide.model, guide), (Y > 0).double()
    svi.step(X[:6], answers[:6])
    row = torch.cat([X[6], torch.ones(1).double()])
    belief = guide.state.belief
    centre, sd = float(row @ belief.mean), float(row @ belief.covariance_matrix() @ row) ** 0.5
    sign = 2 * float(answers[6]) - 1

    def integrand(z):
        return math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi) / (1 + math.exp(-sign * (centre + sd * z)))

    expected = -math.log(integrate.quad(integrand, -12, 12)[0])
    assert svi.step(X[6:7], answers[6:7]) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("curvature", ["truncated", "sampled"])
def test_other_curvatures_have_a_loss_too(digits, curvature):
    stream, _ = digits
    guide = bkf.KalmanGuide(lora_digits_vit(rank=1), bkf.KalmanConfig(rank=5, curvature=curvature))
    svi, kf = bkf.KalmanSVI(guide.model, guide), bkf.KalmanFilter(guide.adapter, guide.config)
    loss = svi.step(stream.images[:8], stream.labels[:8])
    state, _ = kf.update(kf.init(), stream.images[:8], stream.labels[:8])
    assert loss == float(state.temperature_scores.total[6])  # at temperature 1
    assert torch.equal(guide.loc.detach(), state.belief.mean)


def test_an_update_that_diverges_changes_nothing():
    guide = guide_of(initial_variance=1.5)
    svi = bkf.KalmanSVI(guide.model, guide)
    svi.step(X[:5], Y[:5])
    before = guide.state
    for learn in (svi.step, guide.update):
        with pytest.raises(bkf.DivergenceError):
            learn(1e200 * X, Y)
    assert torch.equal(guide.state.belief.mean, before.belief.mean)
    assert torch.equal(guide.state.belief.covariance_matrix(), before.belief.covariance_matrix())
    assert guide.state.step == 1


def test_nuts_on_the_user_s_model_agrees():
    guide = guide_of()
    bkf.KalmanSVI(linear_model(), guide).step(X, Y)
    sampler = MCMC(NUTS(linear_model()), num_samples=300, warmup_steps=150, disable_progbar=True)
    sampler.run(X, Y)
    draws = sampler.get_samples()["weight"].reshape(300, 3)
    effective = sampler.diagnostics()["weight"]["n_eff"].reshape(3).clamp_max(300)
    variance = guide.get_posterior().covariance_matrix.diagonal().detach()
    assert ((draws.mean(0) - guide.loc.detach()).abs() < 5 * (variance / effective).sqrt()).all()
    assert ((draws.var(0) - variance).abs() < 5 * variance * (2 / effective).sqrt()).all()


def test_the_guide_s_own_model_keeps_the_settings_of_the_prior():
    one, two = guide_of(initial_variance=1.5), guide_of(initial_variance=1.5)
    losses = bkf.KalmanSVI(one.model, one).run(zip(X.split(5), Y.split(5), strict=True))
    for x, y in zip(X.split(5), Y.split(5), strict=True):
        two.update(x, y)
    assert torch.equal(one.loc, two.loc)
    assert len(losses) == 4
    posterior = one.posterior()
    again = posterior.guide()
    bkf.KalmanSVI(posterior.pyro_model, again).step(X[:5], Y[:5])
    assert again.state.examples == 25


@pytest.mark.parametrize("temperature", ["prequential", 0.3])
def test_scores_choose_the_temperature_only_if_they_are_asked_to(temperature):
    guide, kf = guide_of(temperature=temperature, initial_variance=1.5), None
    kf = bkf.KalmanFilter(guide.adapter, guide.config)
    state = kf.init()
    svi = bkf.KalmanSVI(guide.model, guide)
    for x, y in zip(X.split(5), Y.split(5), strict=True):
        svi.step(x, y)
        state, _ = kf.update(state, x, y)
    assert torch.equal(guide.state.temperature_scores.total, state.temperature_scores.total)
    assert torch.equal(guide.loc.detach(), state.belief.mean)


def test_a_pyro_module_with_sampled_weights_is_a_model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    start = {name: p.detach().clone() for name, p in net.named_parameters()}

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = PyroModule[nn.Sequential](
                PyroModule[nn.Linear](3, 4), nn.Tanh(), PyroModule[nn.Linear](4, 1)
            ).double()
            for name, value in start.items():
                layer, attribute = name.split(".")
                prior = dist.Normal(value, 0.5 if attribute == "weight" else 1.0).to_event(value.dim())
                setattr(self.net[int(layer)], attribute, PyroSample(prior))

        def forward(self, x, y=None):
            outputs = self.net(x)
            with pyro.plate("data", len(x)):
                return pyro.sample("obs", dist.Normal(outputs, 0.5**0.5).to_event(1), obs=y)

    config = bkf.KalmanConfig(likelihood="gaussian", covariance="full", noise_variance=0.5, temperature=1.0)

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x)

    guide = bkf.KalmanGuide(Named(), config)
    svi = bkf.KalmanSVI(Model(), guide)
    assert math.isfinite(svi.step(X, Y))
    sds = guide.adapter.unflatten(guide.state.prior.variance.sqrt())
    assert {name: float(sd.mean()) for name, sd in sds.items()} == {
        f"net.{name}": pytest.approx(0.5 if name.endswith("weight") else 1.0) for name in start
    }


def test_observe_makes_the_likelihood_of_the_filter():
    guide = guide_of()

    def model(x, y=None, num_data=None):
        sites = {"weight": pyro.sample("weight", dist.Normal(MEAN.view(1, 3), SD.view(1, 3)).to_event(2))}
        return guide.model.observe(sites, x, y, num_data)

    bkf.KalmanSVI(model, guide).step(X, Y, num_data=40)
    mean, _ = linear_posterior(X, Y[:, 0], MEAN, torch.diag(SD.square()), 0.5)
    torch.testing.assert_close(guide.loc.detach(), mean, rtol=1e-9, atol=1e-9)


def test_a_prior_in_single_precision_serves_a_module_in_double_precision():
    guide = guide_of()

    def model(x, y=None):
        sites = {"weight": pyro.sample("weight", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))}
        return guide.model.observe(sites, x, y)

    bkf.KalmanSVI(model, guide).step(X, Y)
    mean, _ = linear_posterior(X, Y[:, 0], torch.zeros(3).double(), torch.eye(3).double(), 0.5)
    torch.testing.assert_close(guide.loc.detach(), mean, rtol=1e-9, atol=1e-9)


def test_priors_of_a_peft_model(digits):
    stream, held_out = digits
    guide = bkf.KalmanGuide(lora_digits_vit(rank=2), bkf.KalmanConfig(rank=5, temperature=1.0))
    start = guide.median()

    def model(images, labels=None, num_data=None):
        sites = {name: pyro.sample(name, dist.Normal(mean, 0.05).to_event(mean.dim())) for name, mean in start.items()}
        return guide.model.observe(sites, images, labels, num_data)

    svi = bkf.KalmanSVI(model, guide)
    losses = svi.run(zip(stream.images[:64].split(8), stream.labels[:64].split(8), strict=True), num_data=64)
    assert all(math.isfinite(loss) for loss in losses)
    torch.testing.assert_close(guide.state.prior.variance, torch.full_like(guide.loc, 0.05**2))
    draws = Predictive(model, guide=guide, num_samples=6, parallel=True)(held_out.images[:5])
    assert draws["y"].shape == (6, 5)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True)
    assert math.isfinite(elbo.loss(model, guide, stream.images[:8], stream.labels[:8], num_data=64))


def test_an_estimated_noise_variance_needs_observe():
    config = {"noise_variance": "estimated", "initial_variance": 1.5}
    guide = guide_of(**config)

    def model(x, y=None, num_data=None):
        sites = {"weight": pyro.sample("weight", dist.Normal(MEAN.view(1, 3), SD.view(1, 3)).to_event(2))}
        return guide.model.observe(sites, x, y, num_data)

    bkf.KalmanSVI(model, guide).step(X, Y)
    assert guide.state.noise.variance is not None
    with pytest.raises(ValueError, match=r"must have the `likelihood` of the config, .*`guide.model.observe` makes"):
        bkf.KalmanSVI(linear_model(), guide_of(**config)).step(X, Y)


def test_a_model_may_require_num_data():
    def model(x, y, num_data):
        return linear_model()(x, y, num_data)

    guide = guide_of()
    svi = bkf.KalmanSVI(model, guide)
    assert svi.evaluate_loss(X, Y, 20) == svi.step(X, Y, 20)


def test_reading_the_model_leaves_the_random_state():
    guide = guide_of()
    before = torch.get_rng_state()
    bkf.KalmanSVI(linear_model(), guide).step(X, Y)
    assert torch.equal(torch.get_rng_state(), before)


GRID = torch.sinh(torch.linspace(-33, 33, 100_000, dtype=torch.float64)) * 1e-12  # dense around 0, without 0
SPARSE = {
    "laplace": dist.Laplace(torch.zeros(()).double(), 0.3),
    "student": dist.StudentT(3.0, torch.zeros(()).double(), 0.4),
    "cauchy": dist.Cauchy(torch.zeros(()).double(), 0.4),
    "horseshoe": Horseshoe(torch.zeros(()).double(), 0.5),
}


def expectation_propagation(density):
    """Mean and covariance by undamped coordinate updates of the terms, one weight at a time, moments on a grid."""
    log_prior, lam, h = density.log_prob(GRID), torch.ones(3).double(), torch.zeros(3).double()
    for sweep in range(60):
        k = sweep % 3
        cov = torch.linalg.inv(torch.diag(lam) + X.T @ X / 0.5)
        mean = cov @ (X.T @ Y[:, 0] / 0.5 + h)
        tau, cavity_h = 1 / cov[k, k] - lam[k], mean[k] / cov[k, k] - h[k]
        log = log_prior - 0.5 * tau * (GRID - cavity_h / tau) ** 2
        weight = (log - log.max()).exp()
        total = torch.trapezoid(weight, GRID)
        first = torch.trapezoid(weight * GRID, GRID) / total
        second = torch.trapezoid(weight * (GRID - first) ** 2, GRID) / total
        lam[k] = (1 / second - tau).clamp_min(4e-4)  # no term of negative precision
        h[k] = first * (tau + lam[k]) - cavity_h
    cov = torch.linalg.inv(torch.diag(lam) + X.T @ X / 0.5)
    return cov @ (X.T @ Y[:, 0] / 0.5 + h), cov


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("covariance", ["full", "low_rank"])
def test_scale_mixtures_reach_the_fixed_point_of_expectation_propagation(name, covariance):
    guide = guide_of(covariance)
    svi = bkf.KalmanSVI(linear_model(SPARSE[name].expand([1, 3])), guide)
    svi.run(zip(X.split(5), Y.split(5), strict=True))
    mean, cov = expectation_propagation(SPARSE[name])
    torch.testing.assert_close(guide.loc.detach(), mean, rtol=1e-3, atol=1e-4)  # of sweeps that end at 1e-4
    torch.testing.assert_close(guide.get_posterior().covariance_matrix.detach(), cov, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("size", [3, 6, 20])
def test_one_weight_has_the_exact_mean_and_sd(name, size):
    x, y, prior = X[:size, :1], Y[:size], SPARSE[name]
    config = bkf.KalmanConfig(likelihood="gaussian", covariance="full", noise_variance=0.5, temperature=1.0)
    guide = bkf.KalmanGuide(nn.Linear(1, 1, bias=False).double(), config)
    bkf.KalmanSVI(linear_model(prior.expand([1, 1])), guide).run(zip(x.split(1), y.split(1), strict=True))
    log_joint = prior.log_prob(GRID) - 0.5 * (y - x @ GRID.view(1, -1)).square().sum(0) / 0.5
    weight = (log_joint - log_joint.max()).exp()
    total = torch.trapezoid(weight, GRID)
    mean = torch.trapezoid(weight * GRID, GRID) / total
    sd = (torch.trapezoid(weight * (GRID - mean) ** 2, GRID) / total).sqrt()
    torch.testing.assert_close(guide.loc.detach()[0], mean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(guide.get_posterior().stddev[0].detach(), sd, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize(("name", "tolerance"), [("laplace", 0.02), ("student", 0.02), ("horseshoe", 0.15)])
def test_three_weights_are_near_the_exact_posterior(name, tolerance):
    """Importance sampling from N(μ, 4P): mean within a share of the sd, sd within a share; least well the horseshoe."""
    guide = guide_of()
    bkf.KalmanSVI(linear_model(SPARSE[name].expand([1, 3])), guide).step(X[:6], Y[:6])
    posterior = guide.get_posterior()
    loc, cov = posterior.mean.detach(), posterior.covariance_matrix.detach()
    proposal = dist.MultivariateStudentT(torch.tensor(4.0).double(), loc, torch.linalg.cholesky(cov))
    draws = proposal.sample(torch.Size([400_000]))
    log = SPARSE[name].log_prob(draws).sum(1) - 0.5 * (Y[:6, 0] - draws @ X[:6].T).square().sum(1) / 0.5
    weight = (log - proposal.log_prob(draws)).softmax(0)
    mean = weight @ draws
    sd = (weight @ (draws - mean).square()).sqrt()
    assert ((loc - mean).abs() < tolerance * sd).all()
    assert ((cov.diagonal().sqrt() / sd - 1).abs() < tolerance).all()


def test_mixed_priors_keep_the_normal_ones_to_the_bit():
    torch.manual_seed(0)
    net = nn.Linear(3, 1).double()
    config = bkf.KalmanConfig(likelihood="gaussian", covariance="full", noise_variance=0.5, temperature=1.0)
    guide = bkf.KalmanGuide(net, config)

    def model(x, y):
        weight = pyro.sample("weight", dist.Laplace(torch.zeros(1, 3).double(), 0.3).to_event(2))
        bias = pyro.sample("bias", dist.Normal(torch.zeros(1).double(), 0.7).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ weight.mT + bias, 0.5**0.5).to_event(1), obs=y)

    bkf.KalmanSVI(model, guide).step(X, Y)
    variance = guide.adapter.unflatten(guide.state.prior.variance)
    torch.testing.assert_close(variance["bias"], torch.tensor([0.49], dtype=torch.float64), rtol=1e-15, atol=0.0)
    assert (variance["weight"] != 2 * 0.09).all()


def test_further_passes_count_no_example_twice():
    guide = guide_of()
    svi = bkf.KalmanSVI(linear_model(), guide)
    svi.step(X, Y, num_data=20)
    mean, cov = linear_posterior(X, Y[:, 0], MEAN, torch.diag(SD.square()), 0.5)
    for _ in range(5):  # the whole data again and again, as in loops of SVI: nothing moves
        loss = svi.step(X, Y, num_data=20)
    torch.testing.assert_close(guide.loc.detach(), mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(guide.get_posterior().covariance_matrix.detach(), cov, rtol=1e-9, atol=1e-9)
    family = torch.distributions.Normal(X @ mean, 0.5**0.5)
    assert loss == pytest.approx(-float(family.log_prob(Y[:, 0]).sum()), rel=1e-9)
    assert guide.state.examples == 20


def test_further_passes_move_a_network_toward_the_mode(digits):
    stream, _ = digits
    x, y = stream.images[:80].flatten(1)[:, ::8], stream.labels[:80]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(x.shape[1], 8), nn.Tanh(), nn.Linear(8, 10))
    guide = bkf.KalmanGuide(net, bkf.KalmanConfig(temperature=1.0))
    svi, losses = bkf.KalmanSVI(guide.model, guide), []
    for _ in range(6):
        batches = zip(x.split(16), y.split(16), strict=True)
        losses.append(sum(svi.step(a, b, num_data=80) * len(a) / 80 for a, b in batches))
    assert losses[5] < losses[1] < losses[0]
    assert guide.state.examples == 80


def test_one_batch_again_without_num_data_is_a_warning_once():
    svi = bkf.KalmanSVI(linear_model(), guide_of())
    svi.step(X[:5], Y[:5])
    svi.step(X[5:], Y[5:])
    with pytest.warns(UserWarning, match=r"the first batch was given again without `num_data`: it counts as new data"):
        svi.step(X[:5], Y[:5])
    svi.step(X[:5], Y[:5])


def test_a_site_that_cannot_move_from_zero_is_a_warning():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 1, bias=False)).double()
    config = bkf.KalmanConfig(likelihood="gaussian", covariance="full", noise_variance=0.5)
    guide = bkf.KalmanGuide(net, config)

    def model(x, y):
        sites = {
            name: pyro.sample(name, dist.Normal(torch.zeros(shape).double(), 1.0).to_event(2))
            for name, shape in zip(guide.adapter.names, guide.adapter.shapes, strict=True)
        }
        return guide.model.observe(sites, x, y)

    with pytest.warns(UserWarning, match=r"the outputs do not depend on '0.weight' where all sites have their prior"):
        bkf.KalmanSVI(model, guide).step(X, Y)


def test_the_state_in_the_store_goes_on_with_a_new_kalman_svi():
    guide = guide_of()
    svi = bkf.KalmanSVI(linear_model(), guide)
    svi.step(X[:5], Y[:5])
    state = pyro.get_param_store().get_state()
    expected = svi.step(X[5:], Y[5:])
    pyro.get_param_store().set_state(state)
    assert bkf.KalmanSVI(linear_model(), guide).step(X[5:], Y[5:]) == expected
    other = linear_model(dist.Normal(MEAN.view(1, 3), 1.0))
    with pytest.raises(ValueError, match=r"must have the priors under which the guide has learned, got .*'weight'"):
        bkf.KalmanSVI(other, guide).step(X, Y)


def test_svi_goes_on_from_the_filter_and_the_filter_from_svi():
    guide = guide_of("diagonal_mixed", initial_variance=1.5)
    svi = bkf.KalmanSVI(guide.model, guide)
    svi.step(X[:10], Y[:10])
    start = guide.loc.detach().clone()
    gradient = SVI(guide.model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(3):
        gradient.step(X[:10], Y[:10])
    moved = guide.loc.detach().clone()
    assert not torch.equal(moved, start)
    expected = guide.posterior()
    svi.step(X[10:], Y[10:])
    kf = bkf.KalmanFilter(guide.adapter, guide.config)
    state, _ = kf.update(expected.state, X[10:], Y[10:])
    assert torch.equal(guide.loc.detach(), state.belief.mean)


def sampled(**sites):
    """A model with these sites, and the right likelihood."""

    def model(x, y):
        drawn = {name: pyro.sample(name, fn) for name, fn in sites.items()}
        weight = drawn.get("weight", torch.zeros(1, 3).double()).reshape(1, 3)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ weight.mT, 0.5**0.5).to_event(1), obs=y)

    return model


ZEROS = torch.zeros(1, 3).double()


def hierarchical(x, y):
    width = pyro.sample("width", dist.HalfCauchy(torch.ones(()).double()))
    weight = pyro.sample("weight", dist.Normal(ZEROS, width).to_event(2))
    pyro.sample("obs", dist.Normal(x @ weight.mT, 0.5**0.5).to_event(2), obs=y)


def scaled(x, y):
    with poutine.scale(scale=2.0):
        weight = pyro.sample("weight", dist.Normal(ZEROS, 1.0).to_event(2))
    pyro.sample("obs", dist.Normal(x @ weight.mT, 0.5**0.5).to_event(2), obs=y)


def power_likelihood(x, y):
    weight = pyro.sample("weight", dist.Normal(ZEROS, 1.0).to_event(2))
    with poutine.scale(scale=2.0):
        pyro.sample("obs", dist.Normal(x @ weight.mT, 0.5**0.5).to_event(2), obs=y)


def masked(x, y):
    weight = pyro.sample("weight", dist.Normal(ZEROS, 1.0).to_event(2))
    with pyro.plate("data", len(x)), poutine.mask(mask=torch.arange(len(x)) < 3):
        pyro.sample("obs", dist.Normal(x @ weight.mT, 0.5**0.5).to_event(1), obs=y)


def penalized(x, y):
    weight = pyro.sample("weight", dist.Normal(ZEROS, 1.0).to_event(2))
    pyro.factor("penalty", -weight.abs().sum())
    pyro.sample("obs", dist.Normal(x @ weight.mT, 0.5**0.5).to_event(2), obs=y)


def changing(x, y):
    weight = pyro.sample("weight", dist.Normal(ZEROS, torch.rand(()).double() + 0.1).to_event(2))
    pyro.sample("obs", dist.Normal(x @ weight.mT, 0.5**0.5).to_event(2), obs=y)


def unobserved(x, y):
    pyro.sample("weight", dist.Normal(ZEROS, 1.0).to_event(2))


REFUSED = [
    (hierarchical, r"no sample sites but the trainable tensors, got 'width' ~ HalfCauchy"),
    (scaled, r"must neither scale nor mask 'weight'"),
    (power_likelihood, r"must not scale the observed site, got a factor of 2"),
    (masked, r"must not mask the observed site"),
    (penalized, r"must observe one site, the targets, got 2: penalty, obs"),
    (changing, r"priors that do not depend on other sites, got one that does: 'weight'"),
    (unobserved, r"must observe one site, the targets, got 0"),
    (sampled(), r"must sample every trainable tensor, got no site 'weight'"),
    (sampled(weight=dist.Uniform(ZEROS - 1, ZEROS + 1).to_event(2)), r"'weight' one of the priors .*, got Uniform"),
    (sampled(weight=dist.MultivariateNormal(ZEROS, torch.eye(3).double()).to_event(1)), r"got MultivariateNormal"),
    (sampled(weight=dist.Normal(ZEROS[0], 1.0).to_event(1)), r"'weight' with shape \(1, 3\), got \(3,\)"),
    (linear_model(sd=1.0), r"must have the `likelihood` of the config, 'gaussian' \(`noise_variance` 0.5\)"),
]


@pytest.mark.parametrize(("model", "message"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_models_that_the_filter_cannot_stand_for_are_refused(model, message):
    guide = guide_of()
    with pytest.raises(ValueError, match=message):
        bkf.KalmanSVI(model, guide).step(X, Y)
    assert guide.state.step == 0


def test_local_terms_that_would_break_the_belief_are_refused(monkeypatch):
    guide = guide_of()
    svi = bkf.KalmanSVI(linear_model(SPARSE["laplace"].expand([1, 3])), guide)
    svi.step(X[:5], Y[:5])
    before = guide.state
    broken = before._replace(belief=before.belief._replace(covariance=-before.belief.covariance))
    monkeypatch.setattr("bayes_kf.inference.pyro.kalman_svi.reevaluated", lambda *_: broken)
    with pytest.raises(bkf.DivergenceError, match="update 1 refused: local terms of the prior: 3 variances"):
        svi.step(X[5:], Y[5:])
    assert torch.equal(guide.state.belief.mean, before.belief.mean)
    assert guide.state.step == 1


def test_local_terms_refuse_dynamics():
    guide = guide_of(forgetting=0.9)
    with pytest.raises(ValueError, match=r"`forgetting` must be 1 with a prior by local Gaussian terms \(Laplace of"):
        bkf.KalmanSVI(linear_model(SPARSE["laplace"].expand([1, 3])), guide).step(X, Y)


def test_bad_arguments_are_named():
    guide = guide_of(forgetting=0.9)
    with pytest.raises(ValueError, match="`guide` must be a KalmanGuide, got function"):
        bkf.KalmanSVI(linear_model(), linear_model())
    with pytest.raises(ValueError, match="`model` must be a Pyro model, a callable, got int"):
        bkf.KalmanSVI(3, guide)
    svi = bkf.KalmanSVI(linear_model(), guide)
    with pytest.raises(ValueError, match=r"`num_data` must be a whole number >= 1, got 2.5"):
        svi.step(X, Y, num_data=2.5)
    with pytest.raises(ValueError, match=r"`num_data` must be at least the number of examples .*, 20, got 19"):
        svi.step(X, Y, num_data=19)
    svi.step(X, Y, num_data=20)
    with pytest.raises(ValueError, match=r"`config` must have `forgetting` 1.0 for a second pass .*, got 0.9"):
        svi.step(X, Y, num_data=20)
    with pytest.raises(ValueError, match="`loader` must yield at least one batch, got none"):
        svi.run([])
    with pytest.raises(ValueError, match=r"`targets` must have shape \(5, 1\), got \(4, 1\). \(batch 1 of `loader`\)"):
        svi.run([(X[:5], Y[:5]), (X[:5], Y[:4])])
