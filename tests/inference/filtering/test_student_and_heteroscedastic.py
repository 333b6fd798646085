"""The recursion with Student-t and heteroscedastic noise against posteriors on a dense grid, which know no filter."""

import math

import pyro
import pytest
import scipy.stats
import torch
from pyro.infer import MCMC, NUTS
from torch import nn

import bayes_kf as bkf
from bayes_kf.inference.measurement_model import noise
from bayes_kf.inference.measurement_model.mode_expansion import expand_at_mode
from bayes_kf.inference.measurement_model.moment_matching import match_moments
from bayes_kf.models.likelihood import HeteroscedasticGaussian, StudentT

PRIOR_SD = 1.0
COMMON = {"covariance": "full", "initial_variance": PRIOR_SD**2, "temperature": 1.0}
STUDENT = {"likelihood": "student_t", "student_dof": 4.0, "noise_variance": 0.25} | COMMON


def through_zero():
    """y = θ x with θ = 0 at the start."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    return model


def data(number, outlier=None):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(number, 1, generator=g).double()
    y = 0.8 * x + StudentT(torch.tensor(0.25).double(), 4.0).sample(torch.zeros(number, 1).double(), g)
    if outlier is not None:
        x, y = torch.cat([x, torch.ones(1, 1).double()]), torch.cat([y, torch.full((1, 1), outlier).double()])
    return x, y


def grid_posterior(x, y):
    """Mean, sd and mode of θ under the prior N(0, PRIOR_SD²) and Student-t noise, on a grid."""
    theta = torch.linspace(-8.0, 8.0, 160_001, dtype=torch.float64)
    density = torch.as_tensor(scipy.stats.t(4.0, 0.0, 0.5).logpdf((y - x * theta).numpy())).sum(0)
    density = density - 0.5 * (theta / PRIOR_SD).square()
    weights = density.softmax(0)
    mean = (weights * theta).sum()
    return float(mean), float((weights * (theta - mean).square()).sum().sqrt()), float(theta[density.argmax()])


def fit(model, x, y, size, **settings):
    return bkf.fit(model, list(zip(x.split(size), y.split(size), strict=True)), bkf.KalmanConfig(**settings))


def moments_one_by_one(x, y):
    """Mean and variance of θ after each example, on a grid: the exact moments under the Gaussian before it."""
    mean, variance, unit = 0.0, PRIOR_SD**2, torch.linspace(-10.0, 10.0, 20_001, dtype=torch.float64)
    for a, b in zip(x[:, 0].tolist(), y[:, 0].tolist(), strict=True):
        theta = mean + variance**0.5 * unit
        density = torch.as_tensor(scipy.stats.t(4.0, 0.0, 0.5).logpdf((b - a * theta).numpy())) - 0.5 * unit.square()
        weights = density.softmax(0)
        before, mean = variance, float(weights @ theta)
        variance = min(float(weights @ (theta - mean).square()), before)  # an outlier may widen it; the filter does not
    return mean, variance


@pytest.mark.parametrize("outlier", [None, 40.0])
@pytest.mark.parametrize("size", [1, 4, 41])
@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_updates_have_the_exact_moments_however_the_examples_are_divided(outlier, size, covariance):
    x, y = data(40, outlier)
    posterior = fit(through_zero(), x, y, size, **(STUDENT | {"covariance": covariance}))
    mean, variance = moments_one_by_one(x, y)
    assert float(posterior.mean_vector) == pytest.approx(mean, abs=1e-5)
    assert float(posterior.variance_vector) == pytest.approx(variance, rel=1e-5)


def test_several_outputs_with_scales_of_their_own():
    """Two outputs of one example that the belief correlates, against moments on a grid of both."""
    family = StudentT(torch.tensor([0.3, 1.5]).double(), 3.0)
    f, cov = torch.tensor([[0.5, -1.0]]).double(), torch.tensor([[1.0, 0.6], [0.6, 0.9]]).double()
    y = torch.tensor([[1.5, 0.0]]).double()
    axis = torch.linspace(-9.0, 9.0, 1201, dtype=torch.float64)
    first, second = torch.meshgrid(axis, axis, indexing="ij")
    points = torch.stack([first.flatten(), second.flatten()], 1)
    prior = torch.distributions.MultivariateNormal(f[0], cov).log_prob(points)
    likely = [
        torch.as_tensor(scipy.stats.t(3.0, 0.0, v**0.5).logpdf((y[0, k] - points[:, k]).numpy()))
        for k, v in enumerate((0.3, 1.5))
    ]
    for order in ([0], [0, 1]):  # the first is exact; the second is given the Gaussian after the first
        density = prior + likely[order[-1]]
        weights = density.softmax(0)
        mean = weights @ points
        covariance = (points - mean).T @ (weights[:, None] * (points - mean))
        prior = torch.distributions.MultivariateNormal(mean, covariance).log_prob(points)
    W, u, actual = match_moments(family, f, y, cov)
    torch.testing.assert_close(actual[0], mean, rtol=0, atol=1e-4)
    inside = torch.linalg.inv(W[0] @ cov @ W[0].T + torch.eye(2).double())
    torch.testing.assert_close(f[0] + cov @ W[0].T @ inside @ u[0], mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(cov - cov @ W[0].T @ inside @ W[0] @ cov, covariance, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [1, 4])
def test_a_stream_is_close_to_the_posterior_on_a_grid(size):
    """One pass, an example or four at a time; the first example is an outlier."""
    x, y = data(100)
    posterior = fit(through_zero(), x, y, size, **STUDENT)
    mean, sd, _ = grid_posterior(x, y)
    assert float(posterior.mean_vector) == pytest.approx(mean, abs=0.1 * sd)
    assert float(posterior.variance_vector) ** 0.5 == pytest.approx(sd, rel=0.1)


def test_an_outlier_moves_the_mean_as_little_as_the_exact_posterior():
    """Twenty examples and one 80 scales off: the Gaussian mean leaves the exact posterior, Student-t's does not."""
    (x, y), (outlying_x, outlying_y) = data(20), data(20, 40.0)
    before, sd, _ = grid_posterior(x, y)
    exact, exact_sd, _ = grid_posterior(outlying_x, outlying_y)
    gaussian = {"likelihood": "gaussian", "noise_variance": 0.5} | COMMON  # the variance of the noise
    moved = {
        name: float(fit(through_zero(), outlying_x, outlying_y, 1, **settings).mean_vector)
        for name, settings in {"student_t": STUDENT, "gaussian": gaussian}.items()
    }
    assert abs(exact - before) < 0.2 * sd
    assert moved["student_t"] == pytest.approx(exact, abs=0.25 * exact_sd)
    assert abs(moved["gaussian"] - exact) > 5.0 * exact_sd


@pytest.mark.parametrize("passes", [{"passes": 4}, {"mean_passes": 4}])
def test_further_passes_go_to_the_mode(passes):
    x, y = data(100)
    posterior = fit(through_zero(), x, y, 4, **(STUDENT | passes))
    _, sd, mode = grid_posterior(x, y)
    assert float(posterior.mean_vector) == pytest.approx(mode, abs=(0.01 if "passes" in passes else 0.25) * sd)


class LogVariance(nn.Module):
    """A known mean of zero, and the log variance a + b x."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1).double()
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        return torch.cat([torch.zeros_like(x), self.linear(x)], 1)


def log_variance_problem(number):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(number, 1, generator=g).double()
    return x, (0.5 * (-0.6 + 0.9 * x)).exp() * torch.randn(number, 1, generator=g).double()


def grid_of_log_variances(x, y):
    """Mean and covariance of (b, a) on a grid."""
    axis = torch.linspace(-3.0, 3.0, 601, dtype=torch.float64)
    b, a = torch.meshgrid(axis, axis, indexing="ij")
    density = -0.5 * (a.square() + b.square()) / PRIOR_SD**2
    for value, target in zip(x[:, 0].tolist(), y[:, 0].tolist(), strict=True):
        s = a + b * value
        density = density - 0.5 * (s + target**2 * (-s).exp())
    weights = density.flatten().softmax(0)
    points = torch.stack([b.flatten(), a.flatten()], 1)
    mean = weights @ points
    return mean, (points - mean).T @ (weights[:, None] * (points - mean))


@pytest.mark.parametrize("settings", [{}, {"passes": 4}, {"mean_passes": 4}])
def test_log_variances_are_recovered_as_on_a_grid(settings):
    x, y = log_variance_problem(200)
    config = {"likelihood": "heteroscedastic_gaussian"} | COMMON | settings
    posterior = fit(LogVariance(), x, y, 1 if not settings else 8, **config)
    mean, cov = grid_of_log_variances(x, y)
    sd = cov.diagonal().sqrt()
    assert ((posterior.mean_vector - mean).abs() < 0.5 * sd).all()
    torch.testing.assert_close(posterior.variance_vector.sqrt(), sd, rtol=0.15, atol=0)


def test_mean_and_log_variance_are_learned_together():
    """A linear mean and a log variance that depends on the input; the truth lies within five posterior sds."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(600, 1, generator=g).double()
    truth = torch.tensor([1.5, 0.8, -0.3, -1.0]).double()  # slopes of μ and s, then intercepts
    y = truth[0] * x + truth[2] + (0.5 * (truth[1] * x + truth[3])).exp() * torch.randn(600, 1, generator=g).double()
    torch.manual_seed(0)
    model = nn.Linear(1, 2).double()
    config = {"likelihood": "heteroscedastic_gaussian"} | COMMON | {"initial_variance": 4.0}
    posterior = fit(model, x, y, 8, **config)
    distance = (posterior.mean_vector - truth).abs() / posterior.variance_vector.sqrt()
    assert (distance < 5.0).all()
    later = slice(10, None)  # at first the squared residual holds the variance of the mean
    innovation, dof = posterior.history["innovation"][later].sum(), posterior.history["dof"][later].sum()
    assert float(innovation / dof) == pytest.approx(1.0, abs=0.25)
    prediction = posterior.predict(x, targets=y)
    lower, upper = prediction.interval(0.9)
    assert float(((lower <= y) & (y <= upper)).double().mean()) == pytest.approx(0.9, abs=5 * (0.09 / 600) ** 0.5)


class Constant(nn.Module):
    """A mean and a log variance that do not depend on the input."""

    def __init__(self):
        super().__init__()
        self.outputs = nn.Parameter(torch.zeros(2).double())

    def forward(self, x):
        return self.outputs.expand(len(x), 2)


def grid_of_constants(y, sd):
    """Means and sds of μ and s on a grid."""
    axes = torch.linspace(-6, 6, 801, dtype=torch.float64), torch.linspace(-8, 8, 801, dtype=torch.float64)
    mean, log_var = torch.meshgrid(*axes, indexing="ij")
    density = -0.5 * (mean.square() + log_var.square()) / sd**2
    for value in y.flatten():
        density = density - 0.5 * log_var - 0.5 * (value - mean).square() * (-log_var).exp()
    weights, points = density.flatten().softmax(0), torch.stack([mean.flatten(), log_var.flatten()], 1)
    centre = weights @ points
    return centre, (weights @ (points - centre).square()).sqrt()


@pytest.mark.parametrize(("number", "most"), [(1, 0.1), (10, 0.4), (40, 0.4)])
@pytest.mark.parametrize("seed", range(3))
def test_an_unknown_mean_does_not_make_the_variance_vanish(number, most, seed):
    """In one batch, beside the posterior on a grid; a joint mode would be at s = −4.5 after a single target."""
    y = 1.0 + 0.6 * torch.randn(number, 1, generator=torch.Generator().manual_seed(seed)).double()
    config = {"likelihood": "heteroscedastic_gaussian"} | COMMON
    posterior = fit(Constant(), torch.zeros(number, 1).double(), y, number, **config)
    mean, sd = grid_of_constants(y, PRIOR_SD)
    assert ((posterior.mean_vector - mean).abs() < most * sd).all()
    torch.testing.assert_close(posterior.variance_vector.sqrt(), sd, rtol=0.2, atol=0)


def test_one_target_with_an_unknown_mean_says_nothing_about_its_variance():
    """In closed form: the mean moves to the target, and the log variance stays where it was."""
    outputs, cov = torch.tensor([[0.0, -1.0]]).double(), torch.diag(torch.tensor([1e8, 4.0]).double())
    _, _, point = expand_at_mode(HeteroscedasticGaussian(), outputs, torch.tensor([[7.0]]).double(), cov)
    torch.testing.assert_close(point, torch.tensor([[7.0, -1.0]]).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0])
def test_the_heteroscedastic_expansion_point_is_stationary(scale):
    """The gradient vanishes there, with r² + V for the log variances, and conditioning on the expansion ends there."""
    family, targets = HeteroscedasticGaussian(), torch.tensor([[0.3, -20.0], [4.0, 0.0]]).double()
    g = torch.Generator().manual_seed(0)
    outputs, root = torch.randn(2, 4, generator=g).double(), torch.randn(8, 8, generator=g).double()
    cov = scale * root @ root.T / 4
    factor, residual, point = expand_at_mode(family, outputs, targets, cov)
    W = torch.block_diag(*factor)
    inside = torch.linalg.inv(W @ cov @ W.T + torch.eye(8).double())
    given_targets = cov - cov @ W.T @ inside @ W @ cov
    score, variance = family.residual(point, targets), given_targets.diagonal().view(2, 4)[:, :2]
    score[:, 2:] += 0.5 * variance * (-point[:, 2:]).exp()
    pull = torch.linalg.solve(cov, (point - outputs).flatten())
    torch.testing.assert_close(score.flatten(), pull, rtol=0, atol=2e-3 * float(1.0 + pull.abs().max()))
    conditioned = outputs.flatten() + cov @ W.T @ inside @ residual.flatten()
    torch.testing.assert_close(conditioned, point.flatten(), rtol=0, atol=1e-2)


@pytest.mark.parametrize("outliers", [0, 8])
def test_the_scale_is_estimated_in_one_pass(outliers):
    """σ of Student-t noise from 800 examples of a linear model, with and without gross errors."""
    actual = []
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(800, 5, generator=g).double()
        weight = torch.randn(5, 1, generator=g).double()
        y = x @ weight + StudentT(torch.tensor(0.09).double(), 4.0).sample(torch.zeros(800, 1).double(), g)
        y[16 : 16 + outliers] += 20.0
        model = nn.Linear(5, 1, bias=False).double()
        posterior = fit(model, x, y, 8, **(STUDENT | {"noise_variance": "estimated"}))
        actual.append(float(posterior.likelihood.noise_variance) ** 0.5)
        assert float((posterior.mean_vector - weight[:, 0]).norm()) < 0.15
    error = 5.0 * (7.0 / (4.0 * 2.0 * 0.75 * 800)) ** 0.5  # of log σ: five sds by the information ν/(2(ν+3)) of log σ²
    assert all(abs(math.log(sd / 0.3)) < error for sd in actual)


def test_the_scale_of_given_errors_is_the_most_probable_one():
    errors = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).double()
    errors[0] = 100.0
    actual = noise.student_scale(errors.square(), 4.0)
    for output in range(2):
        _, _, scale = scipy.stats.t.fit(errors[:, output].numpy(), fdf=4.0, floc=0.0)
        assert float(actual[output]) ** 0.5 == pytest.approx(scale, rel=1e-3)


@pytest.mark.slow
def test_mean_and_log_variance_are_those_of_nuts():
    """Slopes and intercepts of both heads from 200 examples: one pass within 0.75 sds, four passes within 0.3."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(200, 1, generator=g).double()
    noise_sd = (0.5 * (0.8 * x - 1.0)).exp()
    y = 1.5 * x - 0.3 + noise_sd * torch.randn(200, 1, generator=g).double()
    config = {"likelihood": "heteroscedastic_gaussian"} | COMMON | {"initial_variance": 4.0}
    torch.manual_seed(0)
    model = nn.Linear(1, 2).double()
    once, often = fit(model, x, y, 8, **config), fit(model, x, y, 8, **config, passes=4)
    pyro.set_rng_seed(0)
    sampler = MCMC(NUTS(once.pyro_model), num_samples=500, warmup_steps=200, disable_progbar=True)
    sampler.run(x, y)
    draws = torch.cat([sampler.get_samples()[name].reshape(500, -1) for name in once.adapter.names], 1)
    mean, sd = draws.mean(0), draws.std(0)
    for posterior, most in ((once, 0.75), (often, 0.3)):
        assert ((posterior.mean_vector - mean).abs() < most * sd).all()
        torch.testing.assert_close(posterior.variance_vector.sqrt(), sd, rtol=0.2, atol=0)
