"""Single held-out examples: by the covariance of their outputs or by draws, and what follows for the sharpness."""

import dataclasses
import math

import pytest
import torch
from small_problems import loader, many
from torch import nn

import bayes_kf as bkf
from bayes_kf.inference.heldout import heldout_examples
from bayes_kf.inference.heldout.heldout_examples import heldout_outputs
from bayes_kf.inference.heldout.sharpness import choose_sharpness
from bayes_kf.models.likelihood import Categorical


def by_covariance(monkeypatch):
    monkeypatch.setattr(heldout_examples, "parameter_draws_are_cheaper", lambda *_: False)


def test_parameter_draws_agree_with_the_covariance(monkeypatch):
    """More outputs than draws: log losses within 2.5 % of those by the covariance, and no backward pass."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(120, 3, generator=g).double()
    y = torch.randint(90, (120,), generator=g)
    posterior = bkf.fit(many(), loader(x[:40], y[:40]), bkf.KalmanConfig(temperature=1.0), progress=False)
    with monkeypatch.context() as patched:
        by_covariance(patched)
        exact = heldout_outputs(posterior, loader(x[40:], y[40:]))
    with monkeypatch.context() as patched:
        patched.setattr(type(posterior.kf.linearize(posterior.mean_vector, x[:2])), "jacobian", None)
        drawn = heldout_outputs(posterior, loader(x[40:], y[40:]))
        sharpened = posterior.calibrate_softmax(loader(x[40:], y[40:]))
    assert (exact.root, drawn.covariance) == (None, None)
    for divisor in (0.5, 1.0, 2.0):
        expected = float(exact.log_loss(divisor).mean())
        assert float(drawn.log_loss(divisor).mean()) == pytest.approx(expected, rel=0.025)
    assert sharpened.softmax_temperature == pytest.approx(choose_sharpness([exact]).value, rel=0.05)


def test_labels_drawn_from_the_predictions_of_forty_classes_ask_for_no_sharpness():
    torch.manual_seed(0)
    model = nn.Linear(16, 40)
    config = bkf.KalmanConfig(covariance="full", initial_variance=0.3, bound_prior=False, temperature=1.0)
    kf = bkf.KalmanFilter(model, config)
    x = torch.randn(600, 16)
    posterior = bkf.Posterior(kf, kf.init(x[:32]))
    samples = posterior.predict(x, num_samples=2000).samples
    which = torch.arange(600) % len(samples)
    y = torch.multinomial(samples[which, torch.arange(600)], 1)[:, 0]
    value, low, high = posterior.calibrate_softmax([(x, y)]).history["sharpness"].tolist()
    assert low < 1.0 < high
    assert value == pytest.approx(1.0, abs=0.1)


class Divided(nn.Module):
    """A model whose own outputs are divided: the independent answer."""

    def __init__(self, model, divisor):
        super().__init__()
        self.model, self.divisor = model, divisor

    def forward(self, x):
        return self.model(x) / self.divisor


@pytest.mark.parametrize("draws", [False, True])
def test_losses_at_a_divisor_are_those_of_a_model_whose_outputs_are_divided(draws, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    config = bkf.KalmanConfig(initial_variance=0.3, temperature=0.7, bound_prior=False)
    kf = bkf.KalmanFilter(model, config)
    x, y = torch.randn(12, 3).double(), torch.randint(4, (12,))
    state, _ = kf.update(kf.init(), x, y)
    posterior = bkf.Posterior(bkf.KalmanFilter(model, dataclasses.replace(config, softmax_temperature=3.0)), state)
    monkeypatch.setattr(heldout_examples, "parameter_draws_are_cheaper", lambda *_: draws)
    held = heldout_outputs(posterior, loader(x, y))  # does not see the posterior's own softmax temperature
    for divisor in (0.4, 1.0, 2.5):
        divided = bkf.Posterior(bkf.KalmanFilter(Divided(model, divisor), config), state)
        expected = heldout_outputs(divided, loader(x, y)).log_loss()
        torch.testing.assert_close(held.log_loss(divisor), expected, rtol=1e-6, atol=1e-9)


def test_a_target_that_the_mean_rules_out_leaves_losses_finite():
    held = heldout_examples.HeldoutOutputs(
        Categorical(),
        torch.tensor([[0.0, 1e4, 0.0]]).double(),
        torch.zeros(1, 3, 3).double(),
        None,
        torch.tensor([0]),
    )
    losses = [float(held.log_loss(divisor)) for divisor in (0.1, 1.0, 10.0)]
    assert losses == pytest.approx([1e5, 1e4, 1e3])
    assert math.isfinite(choose_sharpness([held]).log_density)
