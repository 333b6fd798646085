"""Everything that a posterior can do, with Student-t and with heteroscedastic targets."""

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.optim import Adam
from torch import nn

import bayes_kf as bkf
from bayes_kf.evaluation.regression.crps import crps_samples
from bayes_kf.models.likelihood import HeteroscedasticGaussian, StudentT

SETTINGS = {
    "student_t": {"noise_variance": 0.2, "student_dof": 3.0},
    "heteroscedastic_gaussian": {},
}
WIDTH = {"student_t": 1, "heteroscedastic_gaussian": 2}
SIZE = 64


def problem(name, targets=1):
    """A linear model and its data, in float64."""
    torch.manual_seed(0)
    x = torch.randn(SIZE, 3).double()
    width = targets * WIDTH[name]
    family = StudentT(torch.tensor(0.2).double(), 3.0) if name == "student_t" else HeteroscedasticGaussian()
    y = family.sample(x @ (0.6 * torch.randn(3, width)).double(), torch.Generator().manual_seed(0))
    return nn.Linear(3, width).double(), x, y


def loader(x, y, size=8):
    return list(zip(x.split(size), y.split(size), strict=True))


def config(name, **settings):
    common = {"likelihood": name, "covariance": "full", "initial_variance": 0.5, "temperature": 1.0}
    return bkf.KalmanConfig(**(common | SETTINGS[name] | settings))


@pytest.fixture(params=SETTINGS)
def name(request):
    return request.param


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_penalty": 0.1},
        {"gate_quantile": 0.99},
        {"forgetting": 0.99, "drift_variance": 1e-4},
        {"passes": 2},
        {"mean_passes": 2},
        {"temperature": "prequential"},
        {"covariance": "low_rank"},
        {"covariance": "diagonal"},
        {"covariance": "block_diagonal"},
    ],
    ids=str,
)
def test_every_setting_learns(name, settings):
    model, x, y = problem(name)
    posterior = bkf.fit(model, loader(x, y), config(name, **settings), progress=False)
    before = bkf.Posterior(posterior.kf, posterior.kf.init(x)).predict(x, targets=y).log_prob.mean()
    after = posterior.predict(x, targets=y).log_prob.mean()
    assert after > before + 0.1
    assert "correct" not in posterior.history
    assert len(posterior.history["log_loss"]) == SIZE


@pytest.mark.parametrize("method", ["linearized", "probit", "sampled", "mean"])
@pytest.mark.parametrize("targets", [1, 2])
def test_every_method_predicts_and_variances_add_up(name, method, targets):
    model, x, y = problem(name, targets)
    posterior = bkf.fit(model, loader(x, y), config(name), progress=False)
    actual = posterior.predict(x, method, num_samples=200, targets=y)
    assert (
        actual.mean.shape
        == actual.variance.shape
        == actual.aleatoric.shape
        == actual.epistemic.shape
        == (SIZE, targets)
    )
    assert actual.log_prob.shape == (SIZE,)
    assert actual.entropy is None
    assert actual.probs is None
    torch.testing.assert_close(actual.variance, actual.aleatoric + actual.epistemic)
    if actual.samples is not None:
        assert actual.samples.shape == (200, SIZE, targets)


@pytest.mark.parametrize("targets", [1, 2])
def test_predictive_moments_and_densities_are_those_of_many_draws(name, targets):
    """The law of total variance, and the log density by 200,000 draws of the outputs."""
    model, x, y = problem(name, targets)
    posterior = bkf.fit(model, loader(x, y), config(name), progress=False)
    actual = posterior.predict(x[:6], targets=y[:6])
    family = posterior.likelihood
    linearized = posterior.kf.linearize(posterior.mean_vector, x[:6])
    cov = posterior.state.belief.output_covariance(linearized.jacobian())
    number = 200_000
    eta = torch.distributions.MultivariateNormal(linearized.outputs, cov).sample((number,))
    means, noise = family.mean(eta), family.target_variance(eta)
    error = 6 * (means.var(0) / number).sqrt()
    assert ((means.mean(0) - actual.mean).abs() < error).all()
    torch.testing.assert_close(noise.mean(0), actual.aleatoric, rtol=0.02, atol=0)
    torch.testing.assert_close(means.var(0), actual.epistemic, rtol=0.02, atol=0)
    densities = family.log_prob(eta, y[:6]).exp()
    expected, spread = densities.mean(0), densities.std(0) / number**0.5
    assert ((actual.log_prob.exp() - expected).abs() < 6 * spread + (0.003 if targets == 2 else 0) * expected).all()


def test_a_posterior_is_saved_and_opened(name, tmp_path):
    model, x, y = problem(name)
    posterior = bkf.fit(model, loader(x, y), config(name), progress=False)
    posterior.save_pretrained(tmp_path)
    opened = bkf.Posterior.from_pretrained(tmp_path, problem(name)[0])
    assert opened.config == posterior.config
    torch.testing.assert_close(opened.predict(x).quantile(0.9), posterior.predict(x).quantile(0.9))


def test_calibration_chooses_a_size_and_no_sharpness(name):
    model, x, y = problem(name)
    half = SIZE // 2
    fitted = loader(x[:half], y[:half], 4)
    posterior = bkf.fit(model, fitted, config(name, temperature="prequential"), progress=False)
    calibrated = posterior.calibrate([(x[half:], y[half:])])
    assert (calibrated.temperature, calibrated.softmax_temperature) == (1.0, 1.0)
    low, value, high = calibrated.history["size"][[1, 0, 2]].tolist()
    assert 1.0 <= low <= value <= high
    assert "sharpness" not in calibrated.history
    assert torch.equal(calibrated.mean_vector, posterior.mean_vector)


def test_an_estimated_scale_is_kept_by_calibration():
    model, x, y = problem("student_t")
    half = SIZE // 2
    fitted = loader(x[:half], y[:half], 4)
    posterior = bkf.fit(model, fitted, config("student_t", noise_variance="estimated"), progress=False)
    assert torch.equal(
        posterior.calibrate([(x[half:], y[half:])]).likelihood.noise_variance, posterior.likelihood.noise_variance
    )


def test_a_bank_averages_predictions(name):
    model, x, y = problem(name)
    bank = bkf.Bank(model, [config(name, initial_variance=v, temperature="prequential") for v in (0.01, 0.5)])
    state = bank.init(x)
    for some, targets in loader(x, y):
        state, info = bank.update(state, some, targets)
    assert info.outputs.shape == (8, WIDTH[name])
    actual = bank.predict(state, x, y)
    assert actual.mean.shape == actual.variance.shape == (SIZE, 1)
    assert torch.isfinite(actual.log_prob).all()


def test_arviz_data_have_the_targets_shape(name):
    model, x, y = problem(name, 2)
    posterior = bkf.fit(model, loader(x, y), config(name), progress=False)
    data = posterior.to_arviz(40, loader=loader(x, y))
    assert data.posterior_predictive["target"].shape == (2, 20, SIZE, 2)
    assert data.log_likelihood["target"].shape == (2, 20, SIZE)
    np.testing.assert_allclose(data.observed_data["target"].values, y.numpy())


def test_pyro_finds_the_posterior_s_neighbourhood(name):
    """SVI from the filter's guide stays near it; Predictive draws targets."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, x, y = problem(name)
    posterior = bkf.fit(model, loader(x, y), config(name, mean_passes=2), progress=False)
    guide = posterior.guide()
    svi = SVI(posterior.pyro_model, guide, Adam({"lr": 0.003}), Trace_ELBO(num_particles=4, vectorize_particles=True))
    losses = [svi.step(x, y) for _ in range(200)]
    assert np.mean(losses[-50:]) < np.mean(losses[:50]) + 1.0
    distance = (guide.loc.detach() - posterior.mean_vector).abs() / posterior.variance_vector.sqrt()
    assert float(distance.max()) < 1.5  # the optimum of SVI differs from the filter's Gaussian
    drawn = Predictive(posterior.pyro_model, guide=posterior.guide(), num_samples=30)(x)["y"]
    assert drawn.shape[0] == 30
    assert drawn.shape[-2:] == (SIZE, 1)


def test_reports_score_draws_of_the_targets(name):
    """N(mean, variance) is not the distribution of the targets: CRPS and coverage are those of draws."""
    model, x, y = problem(name)
    posterior = bkf.fit(model, loader(x, y), config(name), progress=False)
    report = bkf.evaluate(posterior, loader(x, y), num_simulations=39)
    assert report.scores["nll"] == pytest.approx(-float(posterior.predict(x, targets=y).log_prob.mean()), rel=1e-6)
    drawn = posterior.predict_loader(loader(x, y)).target_samples(4000, joint=False)
    assert report.scores["crps"] == pytest.approx(crps_samples(drawn, y), rel=0.05)
    lower, upper = posterior.predict(x).interval(0.95)
    inside = float(((lower <= y) & (y <= upper)).double().mean())
    assert report.scores["coverage_95"] == pytest.approx(inside, abs=0.04)


def test_what_does_not_apply_is_refused(name):
    with pytest.raises(ValueError, match=rf"^`noise` must be 'exponential_family' for `likelihood` '{name}'"):
        bkf.KalmanConfig(likelihood=name, noise="identity")
    with pytest.raises(ValueError, match=rf"^`expansion` must be 'mode' for `likelihood` '{name}', .* got 'mean'\.$"):
        bkf.KalmanConfig(likelihood=name, expansion="mean")
    with pytest.raises(ValueError, match=r"^`curvature` 'sampled' needs `likelihood` 'categorical'"):
        bkf.KalmanConfig(likelihood=name, curvature="sampled")
    with pytest.raises(ValueError, match=r"^`softmax_temperature` must be 1"):
        bkf.KalmanConfig(likelihood=name, softmax_temperature=0.5)
    model, x, y = problem(name)
    posterior = bkf.fit(model, loader(x, y), config(name), progress=False)
    with pytest.raises(ValueError, match=rf"`calibrate_softmax` needs `likelihood` 'categorical', got '{name}'"):
        posterior.calibrate_softmax([(x, y)])


def test_reports_on_counts_score_counts():
    """The CRPS and the coverage of rare counts, which no normal distribution has."""
    torch.manual_seed(0)
    x = torch.randn(SIZE, 3).double()
    y = torch.poisson((0.5 * x[:, :1] - 1.0).exp())
    settings = bkf.KalmanConfig(likelihood="poisson", covariance="full", initial_variance=0.5, temperature=1.0)
    posterior = bkf.fit(nn.Linear(3, 1).double(), loader(x, y), settings, progress=False)
    report = bkf.evaluate(posterior, loader(x, y), num_simulations=39)
    drawn = posterior.predict_loader(loader(x, y)).target_samples(4000, joint=False)
    assert report.scores["crps"] == pytest.approx(crps_samples(drawn, y), rel=0.05)
    assert report.scores["coverage_95"] >= 0.95 - 5 * (0.05 * 0.95 / SIZE) ** 0.5


@pytest.mark.parametrize("method", ["linearized", "probit", "sampled", "mean"])
def test_predictions_keep_single_precision(name, method):
    model, x, y = problem(name)
    settings = config(name, **({"noise_variance": "estimated"} if name == "student_t" else {}))
    posterior = bkf.fit(model.float(), loader(x.float(), y.float()), settings, progress=False)
    actual = posterior.predict(x.float(), method, targets=y.float())
    tensors = [value for value in vars(actual).values() if isinstance(value, torch.Tensor)]
    assert {value.dtype for value in [*tensors, *actual.interval(0.9), actual.target_samples(3)]} == {torch.float32}
