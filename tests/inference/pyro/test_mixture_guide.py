"""A mixture in Pyro: the member is summed out, drawn, and inferred; all against closed forms."""

import math

import pyro
import pytest
import torch
from pyro.infer import SVI, Predictive, TraceEnum_ELBO, infer_discrete
from pyro.infer.autoguide import AutoGuide
from pyro.infer.mcmc.util import initialize_model
from small_problems import EXACT, X, Y, linear

import bayes_kf as bkf
from bayes_kf.inference.pyro.mixture.mixture_guide import MixtureGuide
from bayes_kf.models.zoo import lora_digits_vit

WEIGHTS = (0.7, 0.3)
VARIANCES = (1.5, 0.1)  # of the members' priors
TEMPERATURES = (1.0, 2.0)


@pytest.fixture(autouse=True)
def _clean():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


@pytest.fixture
def _float64_sums():
    """Pyro's TraceEnum_ELBO adds up in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def members(covariance="full", temperatures=TEMPERATURES, batches=((X[:8], Y[:8]),)):
    adapter = bkf.AdapterModel(linear())
    fitted = []
    for variance, temperature in zip(VARIANCES, temperatures, strict=True):
        settings = EXACT | {"covariance": covariance, "initial_variance": variance, "temperature": temperature}
        config = bkf.KalmanConfig(**settings, noise_variance=0.5, rank=6)
        fitted.append(bkf.fit(adapter, batches, config, progress=False))
    return tuple(fitted)


def mixture(covariance="full", **settings):
    return bkf.MixturePosterior(members(covariance, **settings), WEIGHTS)


def dense_log_density(posterior, draws):
    """log Σ w N(θ; μ, T·P) by dense matrices."""
    parts = [
        math.log(w)
        + torch.distributions.MultivariateNormal(m.mean_vector, m.temperature * m.covariance_matrix()).log_prob(draws)
        for w, m in zip(posterior.weights, posterior.members, strict=True)
    ]
    return torch.stack(parts).logsumexp(0), torch.stack(parts, 1).softmax(1)


def enumerated(model, *args):
    """The log density of a model whose only latent site is the member, summed over it."""
    return -TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda *_: None, *args)


@pytest.mark.parametrize("covariance", ["full", "diagonal", "low_rank", "block_diagonal"])
def test_the_log_density_is_that_of_dense_matrices(covariance):
    posterior = mixture(covariance)
    draws = posterior.sample(20)
    expected, probs = dense_log_density(posterior, draws)
    torch.testing.assert_close(posterior.log_density(draws), expected, rtol=1e-9, atol=1e-9)
    guide = posterior.guide()
    torch.testing.assert_close(guide.get_posterior().log_prob(draws).detach(), expected, rtol=1e-9, atol=1e-9)
    sites = {"weight": draws.view(20, 2, 3)}
    torch.testing.assert_close(guide.member_probs(sites), probs, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"`draws` must have shape \(S, 6\), got \(20, 2, 3\)"):
        posterior.log_density(sites["weight"])


@pytest.mark.usefixtures("_float64_sums")
def test_summing_out_the_member_of_the_guide_gives_the_density_of_the_mixture():
    posterior = mixture("diagonal")
    guide, draws = posterior.guide(), posterior.sample(5)
    expected, _ = dense_log_density(posterior, draws)
    for draw, density in zip(draws, expected, strict=True):
        fixed = pyro.condition(guide, {"weight": draw.view(2, 3)})
        assert enumerated(fixed) == pytest.approx(float(density), rel=1e-9)


@pytest.mark.usefixtures("_float64_sums")
def test_summing_out_the_member_of_the_model_gives_its_joint_density():
    posterior = mixture(temperatures=(1.0, 1.0))
    theta = posterior.sample(1)[0]
    fixed = pyro.condition(posterior.pyro_model, {"weight": theta.view(2, 3)})
    prior = linear().weight.detach().flatten()
    of_members = [torch.distributions.Normal(prior, v**0.5).log_prob(theta).sum() + math.log(0.5) for v in VARIANCES]
    likelihood = torch.distributions.Normal(X @ theta.view(2, 3).T, 0.5**0.5).log_prob(Y).sum()
    assert enumerated(fixed, X, Y) == pytest.approx(float(torch.stack(of_members).logsumexp(0) + likelihood), rel=1e-9)


def test_the_member_is_inferred_as_in_closed_form():
    posterior = mixture("diagonal")
    guide, draw = posterior.guide(), posterior.sample(1)
    probs = guide.member_probs({"weight": draw.view(1, 2, 3)})[0]
    fixed = pyro.condition(guide, {"weight": draw.view(2, 3)})
    inferred = infer_discrete(fixed, first_available_dim=-2)
    numbers = torch.tensor([float(inferred()["member"]) for _ in range(500)])
    share, expected = float(numbers.mean()), float(probs[1])
    assert 0.05 < expected < 0.95  # or the test shows nothing
    assert abs(share - expected) < 4 * (expected * (1 - expected) / 500) ** 0.5


@pytest.mark.parametrize("covariance", ["full", "diagonal", "low_rank"])
@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_has_the_distribution_of_the_mixture(covariance, parallel):
    posterior, count = mixture(covariance), 3000 if parallel else 400
    guide = posterior.guide()
    draws = Predictive(guide.model, guide=guide, num_samples=count, parallel=parallel)(X[:4])
    frequency = float((draws["member"].reshape(-1) == 0).double().mean())
    assert abs(frequency - 0.7) < 4 * (0.7 * 0.3 / count) ** 0.5
    weights = draws["weight"].reshape(count, 6)
    for number, member in enumerate(posterior.members):
        of_member = weights[draws["member"].reshape(-1) == number]
        variance = member.temperature * member.variance_vector
        assert bool(((of_member.mean(0) - member.mean_vector).abs() < 5 * (variance / len(of_member)).sqrt()).all())
        assert bool(((of_member.var(0) / variance - 1).abs() < 5 * (2 / len(of_member)) ** 0.5).all())
    expected = torch.einsum("smd,bd->sbm", weights.view(count, 2, 3), X[:4])
    torch.testing.assert_close(draws["outputs"].reshape(count, 4, 2), expected, rtol=1e-9, atol=1e-9)
    predicted = posterior.predict(X[:4], "linearized", num_samples=8)  # exact moments
    targets = draws["y"].reshape(count, 4, 2)
    assert bool(((targets.mean(0) - predicted.mean).abs() < 5 * (predicted.variance / count).sqrt()).all())
    torch.testing.assert_close(targets.var(0), predicted.variance, rtol=0.2, atol=0)


def test_it_is_an_autoguide():
    assert isinstance(mixture().guide(), AutoGuide)


def log_evidences(x=X, y=Y):
    """log p(y | member k) of the linear-Gaussian model, in closed form."""
    prior = linear().weight.detach()
    found = []
    for variance in VARIANCES:
        cov = variance * x @ x.T + 0.5 * torch.eye(len(x)).double()
        normal = torch.distributions.MultivariateNormal(torch.zeros(len(x)).double(), cov)
        found.append(normal.log_prob((y - x @ prior.T).T).sum())
    return torch.stack(found)


@pytest.mark.usefixtures("_float64_sums")
@pytest.mark.parametrize("covariance", ["full", "low_rank"])
@pytest.mark.parametrize("particles", [1, 3])
def test_the_elbo_is_exact_and_largest_at_the_posterior_weights(covariance, particles):
    """log p(θ, y | k) − log q(θ | k) does not depend on θ, so that no draw enters the sum over the members."""
    evidences = log_evidences()
    for weights in (WEIGHTS, evidences.softmax(0).clamp_min(1e-12).tolist()):
        guide = MixtureGuide(members(covariance, (1.0, 1.0), [(X, Y)]), weights)
        elbo = TraceEnum_ELBO(max_plate_nesting=1, num_particles=particles, vectorize_particles=particles > 1)
        shares = torch.tensor(weights).double()
        expected = float((shares * (evidences - math.log(2) - shares.log())).sum())
        assert -elbo.loss(guide.model, guide, X, Y) == pytest.approx(expected, rel=1e-8)
    assert expected == pytest.approx(float(evidences.logsumexp(0) - math.log(2)), rel=1e-8)


def test_svi_learns_the_weights_by_evidence():
    few = (X[:3], Y[:3])
    guide = MixtureGuide(members("full", (1.0, 1.0), [few]))
    adam = pyro.optim.Adam(lambda name: {"lr": 0.1 if name.endswith("weights") else 0.0})  # the Gaussians are exact
    svi = SVI(guide.model, guide, adam, TraceEnum_ELBO(max_plate_nesting=1))
    for _ in range(100):
        svi.step(*few)
    expected = log_evidences(*few).softmax(0)
    assert 0.1 < float(expected[0]) < 0.9
    torch.testing.assert_close(guide.weights.detach(), expected, rtol=0, atol=1e-3)


def test_minibatches_stand_for_all_data():
    guide = MixtureGuide(members("full", (1.0, 1.0), [(X, Y)]), WEIGHTS)
    elbo = TraceEnum_ELBO(max_plate_nesting=1, num_particles=400, vectorize_particles=True)
    parts = [elbo.loss(guide.model, guide, X[k : k + 10], Y[k : k + 10], num_data=40) for k in range(0, 40, 10)]
    assert sum(parts) / 4 == pytest.approx(elbo.loss(guide.model, guide, X, Y), rel=0.05)


@pytest.mark.usefixtures("_float64_sums")
def test_the_potential_of_nuts_sums_the_member_out():
    posterior = mixture(temperatures=(1.0, 1.0))
    _, potential, *_ = initialize_model(posterior.pyro_model, model_args=(X, Y), max_plate_nesting=1)
    theta, prior = posterior.sample(1)[0], linear().weight.detach().flatten()
    of_members = [torch.distributions.Normal(prior, v**0.5).log_prob(theta).sum() + math.log(0.5) for v in VARIANCES]
    likelihood = torch.distributions.Normal(X @ theta.view(2, 3).T, 0.5**0.5).log_prob(Y).sum()
    expected = -float(torch.stack(of_members).logsumexp(0) + likelihood)
    assert float(potential({"weight": theta.view(2, 3)})) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_updates_are_those_of_the_mixture(covariance):
    posterior = mixture(covariance)
    guide = posterior.guide()
    before = {k: v.clone() for k, v in pyro.get_param_store().get_state()["params"].items()}
    state = pyro.get_param_store().get_state()
    expected = posterior.update(X[8:12], Y[8:12])
    infos = guide.update(X[8:12], Y[8:12])
    assert len(infos) == 2
    actual = guide.posterior()
    assert actual.weights == pytest.approx(expected.weights, rel=1e-9)
    for one, other in zip(actual.members, expected.members, strict=True):
        assert torch.equal(one.mean_vector, other.mean_vector)
        assert torch.equal(one.variance_vector, other.variance_vector)
    pyro.get_param_store().set_state(state)  # the store's entries of before did not change
    assert guide.posterior().weights == pytest.approx(WEIGHTS, rel=1e-9)
    assert all(torch.equal(pyro.get_param_store().get_state()["params"][k], v) for k, v in before.items())
    assert guide.members[0].state.examples == 8


def test_quantiles_invert_the_distribution_function():
    posterior = mixture()
    guide = posterior.guide()
    levels = [0.01, 0.3, 0.5, 0.99]
    values = guide.quantiles(levels)["weight"].reshape(4, 6)
    below = sum(
        w * torch.distributions.Normal(m.mean_vector, (m.temperature * m.variance_vector).sqrt()).cdf(values)
        for w, m in zip(posterior.weights, posterior.members, strict=True)
    )
    torch.testing.assert_close(
        below, torch.tensor(levels, dtype=torch.float64)[:, None].expand(4, 6), rtol=1e-9, atol=1e-9
    )
    assert torch.equal(guide.median()["weight"].flatten(), values[2])
    with pytest.raises(ValueError, match=r"`quantiles` must lie in \(0, 1\), got \[1.0\]"):
        guide.quantiles([1.0])


def test_draws_become_a_mixture_again():
    posterior = mixture("full", temperatures=(1.0, 1.0))
    guide = posterior.guide()
    draws = Predictive(guide.model, guide=guide, num_samples=20_000, parallel=True)(X[:1])
    samples = {"weight": draws["weight"].reshape(-1, 2, 3), "member": draws["member"].reshape(-1)}
    again = bkf.MixturePosterior.from_samples(linear(), samples, [m.config for m in posterior.members])
    torch.testing.assert_close(torch.tensor(again.weights), torch.tensor(WEIGHTS), rtol=0, atol=0.02)
    for one, other in zip(again.members, posterior.members, strict=True):
        torch.testing.assert_close(one.covariance_matrix(), other.covariance_matrix(), rtol=0.1, atol=2e-3)
    configs = [m.config for m in posterior.members]
    for change, message in [
        ({"member": samples["member"] + 1}, r"numbers of 2 members in 'member', got 1 to 2"),
        ({"member": 0 * samples["member"]}, r"draws of every member, got none of number 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            bkf.MixturePosterior.from_samples(linear(), samples | change, configs)
    with pytest.raises(ValueError, match="`samples` must hold 'member'"):
        bkf.MixturePosterior.from_samples(linear(), {"weight": samples["weight"]}, configs)


def test_classes_of_a_lora_model_are_predicted_as_by_the_mixture(digits):
    adapter = bkf.AdapterModel(lora_digits_vit(rank=2))
    batch = [(digits[0].images[:20], digits[0].labels[:20])]
    fitted = [
        bkf.fit(adapter, batch, bkf.KalmanConfig(temperature=t, rank=4, initial_logit_sd=sd), progress=False)
        for t, sd in ((0.2, 1.0), (0.1, 3.0))
    ]
    posterior = bkf.MixturePosterior(tuple(fitted), (0.6, 0.4))
    guide, images = posterior.guide(), digits[1].images[:5]
    draws = Predictive(guide.model, guide=guide, num_samples=400, parallel=True)(images)
    probs = draws["outputs"].reshape(400, 5, 10).double().softmax(-1)
    expected = posterior.predict(images, "sampled", num_samples=400).probs
    error = (2 * probs.var(0) / 400).sqrt()
    assert bool(((probs.mean(0) - expected).abs() < 5 * error + 1e-3).all())
    assert sorted(set(draws["member"].flatten().tolist())) == [0, 1]


def test_bad_arguments_are_refused():
    one, two = members()
    for weights in ((0.5,), (0.5, 0.6), (1.0, 0.0)):
        with pytest.raises(ValueError, match="`weights` must be"):
            MixtureGuide((one, two), weights)
    with pytest.raises(ValueError, match="`weights` must be as many as `members`, got 0 for 0"):
        MixtureGuide(())
    other = bkf.fit(linear(outputs=3), [(X[:4], torch.zeros(4, 3).double())], one.config, progress=False)
    with pytest.raises(ValueError, match="`members` must be over the same tensors, got others in number 1"):
        MixtureGuide((one, other))

    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.member = torch.nn.Parameter(torch.zeros(3, 2).double())

        def forward(self, x):
            return x @ self.member

    named = bkf.fit(Named(), [(X[:4], Y[:4])], one.config, progress=False)
    with pytest.raises(ValueError, match="`members` must have no tensor named 'member'"):
        MixtureGuide((named,))
    with pytest.raises(ValueError, match="`guide` must be a KalmanGuide, got MixtureGuide"):
        bkf.KalmanSVI(mixture().pyro_model, mixture().guide())
