"""Intervals, quantiles and draws of targets against closed forms, SciPy's quadrature and draws."""

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats
import torch
from scipy.special import ndtri
from torch import nn

import bayes_kf as bkf
from bayes_kf.inference.predictive.targets.target_distribution import TargetDistribution
from bayes_kf.inference.predictive.targets.target_mixture import TargetMixture, concatenate
from bayes_kf.models.likelihood import Gaussian, HeteroscedasticGaussian, Poisson, StudentT

G = torch.Generator().manual_seed(0)
LEVELS = [0.05, 0.3, 0.5, 0.9, 0.99]
FAMILIES = {
    "gaussian": Gaussian(torch.tensor(0.3).double()),
    "student_t": StudentT(torch.tensor(0.3).double(), 3.0),
    "heteroscedastic_gaussian": HeteroscedasticGaussian(),
    "poisson": Poisson(),
}
WIDTH = {"heteroscedastic_gaussian": 2}


def gaussian_outputs(name, batch=3, targets=1):
    """Means (B, p) and covariances (B, p, p) of the outputs."""
    size = targets * WIDTH.get(name, 1)
    root = 0.4 * torch.randn(batch, size, size, generator=G).double()
    return torch.randn(batch, size, generator=G).double(), root @ root.mT


@pytest.mark.parametrize("name", FAMILIES)
def test_quantiles_invert_the_distribution_function_by_nested_quadrature(name):
    family = FAMILIES[name]
    outputs, covariance = gaussian_outputs(name)
    distribution = TargetDistribution.of_gaussian(family, outputs, covariance)
    actual = distribution.quantile(LEVELS)
    for b in range(3):
        for level, value in zip(LEVELS, actual[:, b, 0].tolist(), strict=True):
            below = plain_cdf(name, outputs[b].numpy(), covariance[b].numpy(), value)
            if name == "poisson":
                assert value == round(value)
                assert below >= level
                assert value == 0 or plain_cdf(name, outputs[b].numpy(), covariance[b].numpy(), value - 1) < level
            else:
                assert below == pytest.approx(level, abs=1e-6)


def plain_cdf(name, f, C, y):
    """P(y ≤ value): the outputs integrated on a grid, plainly."""
    sd = np.sqrt(np.diag(C))
    grid = np.linspace(-8, 8, 801)
    weight = np.exp(-0.5 * grid**2)
    weight /= weight.sum()
    if name != "heteroscedastic_gaussian":
        eta = f[0] + sd[0] * grid
        cdf = {
            "gaussian": lambda: scipy.stats.norm(eta, 0.3**0.5).cdf(y),
            "student_t": lambda: scipy.stats.t(3.0, eta, 0.3**0.5).cdf(y),
            "poisson": lambda: scipy.stats.poisson(np.exp(eta)).cdf(y),
        }[name]()
        return float((weight * cdf).sum())
    chol = np.linalg.cholesky(C)
    one, two = np.meshgrid(grid, grid, indexing="ij")
    mean, log_var = f[0] + chol[0, 0] * one, f[1] + chol[1, 0] * one + chol[1, 1] * two
    cdf = scipy.stats.norm(mean, np.exp(0.5 * log_var)).cdf(y)
    return float((weight[:, None] * weight * cdf).sum())


@pytest.mark.parametrize("name", FAMILIES)
def test_quantiles_of_draws_are_those_of_the_mixture(name):
    family = FAMILIES[name]
    outputs = torch.randn(20, 3, WIDTH.get(name, 1), generator=G).double()
    distribution = TargetDistribution(family, outputs)
    actual = distribution.quantile(LEVELS)
    below = torch.stack([family.cdf(outputs, value).mean(0) for value in actual])
    expected = torch.tensor(LEVELS, dtype=torch.float64).view(-1, 1, 1).expand_as(below)
    if name == "poisson":
        smaller = torch.stack([family.cdf(outputs, value - 1).mean(0) for value in actual])
        assert ((below >= expected) & (smaller < expected)).all()
    else:
        torch.testing.assert_close(below, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("targets", [1, 2])
def test_draws_of_targets_follow_the_distribution(name, targets):
    """Each target's draws, joint or not, against its distribution function; two targets keep their correlation."""
    family = FAMILIES[name]
    outputs, covariance = gaussian_outputs(name, targets=targets)
    distribution = TargetDistribution.of_gaussian(family, outputs, covariance)
    for drawn in (
        distribution.sample(5000, torch.Generator().manual_seed(1)),
        distribution.marginal_sample(5000, torch.Generator().manual_seed(2)),
    ):
        assert drawn.shape == (5000, 3, targets)
        at = drawn.median(0).values
        share = (drawn <= at).double().mean(0)
        expected = distribution.cdf(at)
        assert ((share - expected).abs() < 5 * (0.25 / 5000) ** 0.5).all()
    if targets == 2 and name == "gaussian":
        drawn = distribution.sample(20_000, torch.Generator().manual_seed(1))
        for b in range(3):
            actual = torch.cov(drawn[:, b].T)
            torch.testing.assert_close(actual, covariance[b] + 0.3 * torch.eye(2).double(), rtol=0, atol=0.05)


def linear_fit(name, targets=1, **settings):
    """A posterior of a linear model with the targets of a likelihood, and its inputs."""
    torch.manual_seed(0)
    x = torch.randn(80, 3).double()
    family = FAMILIES[name]
    model = nn.Linear(3, targets * WIDTH.get(name, 1)).double()
    y = family.sample(0.7 * x @ torch.randn(3, targets * WIDTH.get(name, 1)).double(), torch.Generator().manual_seed(0))
    if name in ("gaussian", "student_t"):
        settings["noise_variance"] = 0.3
    config = bkf.KalmanConfig(
        likelihood=name, covariance="full", initial_variance=1.0, temperature=1.0, student_dof=3.0, **settings
    )
    return bkf.fit(model, list(zip(x.split(8), y.split(8), strict=True)), config, progress=False), x, y


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["linearized", "sampled", "mean"])
def test_intervals_of_a_posterior_cover_as_much_as_they_say(name, method):
    """90 % of the targets that the posterior itself predicts lie inside; counts: at least 90 %."""
    posterior, x, _ = linear_fit(name)
    prediction = posterior.predict(x, method, num_samples=64)
    lower, upper = prediction.interval(0.9)
    assert lower.shape == upper.shape == (80, 1)
    drawn = prediction.target_samples(2000, torch.Generator().manual_seed(5))
    inside = ((lower <= drawn) & (drawn <= upper)).double().mean()
    assert float(inside) > 0.9 - 5 * (0.09 / 160_000) ** 0.5
    if name != "poisson":
        assert float(inside) == pytest.approx(0.9, abs=5 * (0.09 / 160_000) ** 0.5)
    median = prediction.quantile(0.5)
    assert torch.equal(prediction.quantile([0.5, 0.9])[0], median)
    torch.testing.assert_close(
        prediction.quantile(torch.tensor([0.5, 0.95], dtype=torch.float64))[1], upper, rtol=1e-9, atol=1e-9
    )
    assert (lower <= median).all()
    assert (median <= upper).all()


def test_gaussian_intervals_are_the_closed_form():
    posterior, x, _ = linear_fit("gaussian")
    prediction = posterior.predict(x)
    sd = prediction.variance.sqrt()
    lower, upper = prediction.interval(0.8)
    torch.testing.assert_close(lower, prediction.mean - float(ndtri(0.9)) * sd, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(upper, prediction.mean + float(ndtri(0.9)) * sd, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["linearized", "sampled"])
def test_predictions_of_a_loader_have_the_same_intervals(name, method):
    posterior, x, y = linear_fit(name)
    loader = list(zip(x.split(32), y.split(32), strict=True))
    whole = posterior.predict(x, method)
    kept = posterior.predict_loader(loader, method, keep_samples=True)
    torch.testing.assert_close(kept.quantile(0.9), whole.quantile(0.9), rtol=1e-9, atol=1e-9)
    plain = posterior.predict_loader(loader, method)
    assert plain.samples is None
    if name == "gaussian" and method == "sampled":
        with pytest.raises(ValueError, match=r"^`interval` needs the draws of a loader's prediction by .*keep_samples"):
            plain.interval(0.9)
        return
    torch.testing.assert_close(plain.quantile(0.9), whole.quantile(0.9), rtol=1e-9, atol=1e-9)
    assert plain.target_samples(7).shape == (7, 80, 1)


def test_draws_of_several_targets_of_a_loader_need_their_covariance():
    posterior, x, y = linear_fit("gaussian", 2)
    loader = [(x, y)]
    with pytest.raises(ValueError, match=r"^`target_samples` of several outputs needs their covariance, .* without it"):
        posterior.predict_loader(loader).target_samples(3)
    assert posterior.predict_loader(loader, keep_samples=True).target_samples(3).shape == (3, 80, 2)
    assert posterior.predict_loader(loader).interval(0.5).lower.shape == (80, 2)


def test_arguments_are_checked():
    posterior, x, _ = linear_fit("gaussian")
    prediction = posterior.predict(x)
    with pytest.raises(ValueError, match=r"^`level` must lie strictly between 0 and 1, got 90\.$"):
        prediction.interval(90)
    with pytest.raises(ValueError, match=r"^`q` must lie strictly between 0 and 1, got 0\.0\.$"):
        prediction.quantile([0.5, 0.0])
    with pytest.raises(ValueError, match=r"^`q` must be a number or several, got shape \(0,\)\.$"):
        prediction.quantile([])
    with pytest.raises(ValueError, match=r"^`num_samples` must be a whole number >= 1, got 0\.$"):
        prediction.target_samples(0)
    data = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]
    classes = bkf.fit(nn.Linear(3, 2), data, bkf.KalmanConfig(), progress=False).predict(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"^`quantile` needs targets that are numbers, got a prediction of classes\.$"):
        classes.quantile(0.5)


def test_large_counts_and_rates():
    """Rates of a million, where a count is a continuous number, and rates near zero."""
    outputs = torch.tensor([[np.log(1e6)], [-20.0]]).double()
    distribution = TargetDistribution.of_gaussian(Poisson(), outputs, torch.tensor([0.0, 0.0]).double().view(2, 1, 1))
    rate = outputs.exp()
    actual = distribution.quantile([0.05, 0.5, 0.95])
    expected = torch.as_tensor(scipy.stats.poisson(rate.numpy()).ppf(np.array([0.05, 0.5, 0.95])[:, None, None]))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_mixture_over_posteriors(name):
    """Its distribution function is the weighted sum, its quantiles invert it, and draws follow it."""
    family, weights = FAMILIES[name], (0.3, 0.7)
    parts = tuple(TargetDistribution.of_gaussian(family, *gaussian_outputs(name, targets=2)) for _ in weights)
    mixture = TargetMixture(parts, weights)
    quantiles = mixture.quantile(LEVELS)
    for level, values in zip(LEVELS, quantiles, strict=True):
        below = 0.3 * parts[0].cdf(values) + 0.7 * parts[1].cdf(values)
        torch.testing.assert_close(mixture.cdf(values), below)
        if name == "poisson":
            assert (below >= level).all()
            assert (mixture.cdf(values - 1) < level).all()
        else:
            torch.testing.assert_close(below, torch.full_like(below, level), rtol=0, atol=1e-9)
    for drawn in (
        mixture.sample(5000, torch.Generator().manual_seed(1)),
        mixture.without_joint().to("cpu").marginal_sample(5000, torch.Generator().manual_seed(2)),
    ):
        at = quantiles[2]
        share = (drawn <= at).double().mean(0)
        assert ((share - mixture.cdf(at)).abs() < 5 * (0.25 / 5000) ** 0.5).all()
    both = concatenate([mixture, mixture])
    torch.testing.assert_close(both.quantile(LEVELS), torch.cat([quantiles, quantiles], 1))
    assert mixture.is_joint
    assert not mixture.without_joint().is_joint


def test_a_bank_s_average_has_intervals_between_those_of_its_candidates():
    _, x, y = linear_fit("gaussian")
    configs = [bkf.KalmanConfig(likelihood="gaussian", initial_variance=v) for v in (0.1, 1.0)]
    bank = bkf.Bank(nn.Linear(3, 1).double(), configs)
    state, _ = bank.update(bank.init(x), x[:20], y[:20])
    average = bank.predict(state, x).quantile(0.9)
    each = torch.stack([bank.posterior(state, k).predict(x).quantile(0.9) for k in (0, 1)])
    assert (each.amin(0) - 1e-9 <= average).all()
    assert (average <= each.amax(0) + 1e-9).all()
    assert bank.predict(state, x).target_samples(5).shape == (5, 80, 1)
