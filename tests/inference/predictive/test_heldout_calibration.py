"""The temperature that held-out data choose."""

import dataclasses
import math

import torch
from small_problems import EXACT, X, Y, linear, loader, many
from torch import nn

import bayes_kf as bkf
from bayes_kf.inference.filtering import prequential_temperature
from bayes_kf.inference.measurement_model.noise import likelihood
from bayes_kf.inference.predictive import heldout_calibration
from bayes_kf.models.batch import Batch


def test_the_temperature_is_the_one_nearest_to_1_that_is_not_clearly_worse():
    """Differences of ±1 about their mean have standard error 1/√(N − 1)."""
    size = len(prequential_temperature.GRID)
    for excess, expected in ((0.45, 6), (0.55, 4)):
        losses = torch.rand(1, 401, generator=torch.Generator().manual_seed(0)).double().repeat(size, 1)
        sign = torch.ones(401).double()
        sign[::2] = -1.0
        losses += 5.0  # clearly worse
        losses[2:5] -= 5.0
        losses[5] -= 4.999999  # a little worse everywhere, so surely
        losses[6] += sign - sign.mean() + excess * (1 - sign.mean() ** 2) ** 0.5 / 20.0 - 5.0
        assert heldout_calibration.choose_temperature(losses) == prequential_temperature.GRID[expected]
    losses[5:, 7] = torch.inf
    losses[:2] = 0.0
    assert heldout_calibration.choose_temperature(losses) == prequential_temperature.GRID[1]
    assert heldout_calibration.choose_temperature(losses[:, 1:100]) == prequential_temperature.GRID[1]
    assert heldout_calibration.choose_temperature(torch.full((size, 3), torch.inf)) == prequential_temperature.GRID[0]


def test_temperature_scores_are_the_log_losses_of_linearized_predictions():
    config = bkf.KalmanConfig(likelihood="gaussian", covariance="full", initial_variance=1.0)
    kf = bkf.KalmanFilter(linear(), config)
    state, _ = kf.update(kf.init(), X[:5], Y[:5])
    after, _ = kf.update(state, X[5:10], Y[5:10])
    for k, value in enumerate(prequential_temperature.GRID):
        fixed = bkf.KalmanFilter(kf.adapter, dataclasses.replace(config, temperature=value))
        expected = -bkf.Posterior(fixed, state).predict(X[5:10], targets=Y[5:10]).log_prob.sum()
        torch.testing.assert_close(
            after.temperature_scores.total[k] - state.temperature_scores.total[k], expected, rtol=1e-10, atol=1e-10
        )
    fixed = bkf.fit(linear(), loader(), bkf.KalmanConfig(**EXACT), progress=False)
    assert (fixed.temperature, fixed.state.temperature_scores.updates) == (1.0, 0)


def test_calibration_from_parameter_draws_agrees_with_the_covariance(monkeypatch):
    """More outputs than draws: log losses within 2.5 % of those by the covariance, and no backward pass."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=g).double()
    y = torch.randint(90, (200,), generator=g)
    posterior = bkf.fit(many(), loader(x[:40], y[:40]), bkf.KalmanConfig(temperature=1.0), progress=False)
    family = likelihood(posterior.config.noise_settings, posterior.state.noise)

    some, held_out = Batch.of(x[:20], y[:20]), loader(x[40:], y[40:])

    def losses():
        return torch.stack(
            [heldout_calibration.log_losses(posterior, family, some, seed).mean(1) for seed in range(15)]
        ).mean(0)

    with monkeypatch.context() as patched:
        patched.setattr(heldout_calibration, "parameter_draws_are_cheaper", lambda *_: False)
        exact, chosen = losses(), heldout_calibration.calibrate_temperature(posterior, held_out).temperature
    with monkeypatch.context() as patched:
        patched.setattr(type(posterior.kf.linearize(posterior.mean_vector, x[:2])), "jacobian", None)
        actual = losses()
        assert heldout_calibration.calibrate_temperature(posterior, held_out).temperature == chosen
    assert float(((actual - exact).abs() / exact).max()) < 0.025


def test_calibration_finds_temperature_1_with_forty_classes():
    """Labels are drawn from the predictions. With few draws of many outputs, a biased loss would favor a low one."""
    torch.manual_seed(0)
    model = nn.Linear(16, 40)
    kf = bkf.KalmanFilter(model, bkf.KalmanConfig(covariance="full", initial_variance=0.3, bound_prior=False))
    x = torch.randn(600, 16)
    posterior = bkf.Posterior(kf, kf.init(x[:32]))
    draws = posterior.predict(x, num_samples=2000).samples
    which = torch.arange(600) % len(draws)
    y = torch.multinomial(draws[which, torch.arange(600)], 1)[:, 0]
    assert heldout_calibration.calibrate_temperature(posterior, [(x, y)]).temperature == 1.0


def test_the_posterior_of_a_stream_can_be_calibrated():
    kf = bkf.KalmanFilter(nn.Linear(3, 2), bkf.KalmanConfig.stream())
    assert kf.config.tune is not None
    x, y = torch.randn(20, 3), torch.arange(20) % 2
    actual = bkf.Posterior(kf, kf.init(x)).calibrate([(x, y)])
    assert actual.temperature == 1.0
    assert actual.config.tune is None


def test_one_held_out_example_does_not_choose_a_temperature():
    losses = torch.linspace(0.1, 0.8, len(prequential_temperature.GRID)).double()[:, None]
    assert heldout_calibration.choose_temperature(losses) == 1.0
    losses[-3:] = math.inf  # but it rules out what gave it no probability
    assert heldout_calibration.choose_temperature(losses) == 0.1
