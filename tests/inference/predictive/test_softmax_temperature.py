"""The divisor of logits in predictions: the same in all of them."""

import dataclasses

import pytest
import torch
from torch import nn

import bayes_kf as bkf
from bayes_kf.inference.predictive import predict

DIVISOR = 0.4


class Divided(nn.Module):
    """A model whose own outputs are divided: the independent answer."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) / DIVISOR


def pair(classes=4):
    """A posterior with a softmax temperature, and the same posterior over a model that divides its outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, classes)).double()
    config = bkf.KalmanConfig(initial_variance=0.3, temperature=0.7, bound_prior=False)
    kf = bkf.KalmanFilter(model, dataclasses.replace(config, softmax_temperature=DIVISOR))
    x, y = torch.randn(12, 3).double(), torch.randint(classes, (12,))
    state, _ = kf.update(kf.init(), x, y)
    return bkf.Posterior(kf, state), bkf.Posterior(bkf.KalmanFilter(Divided(model), config), state), x, y


def assert_same(actual, expected):
    for field in dataclasses.fields(actual):
        one, two = getattr(actual, field.name), getattr(expected, field.name)
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9, msg=field.name)


@pytest.mark.filterwarnings("ignore:`method` 'sampled'")
@pytest.mark.parametrize("method", ["linearized", "probit", "sampled", "mean"])
def test_every_prediction_is_that_of_a_model_whose_outputs_are_divided(method):
    posterior, expected, x, y = pair()
    assert_same(posterior.predict(x, method, targets=y), expected.predict(x, method, targets=y))
    undivided = bkf.Posterior(bkf.KalmanFilter(posterior.adapter, expected.config), posterior.state)
    assert float((undivided.predict(x, method).mean - expected.predict(x, method).mean).abs().max()) > 0.05


@pytest.mark.parametrize("draws", [False, True])
def test_so_are_predictions_from_parameter_draws(draws, monkeypatch):
    posterior, expected, x, y = pair(classes=9)
    monkeypatch.setattr(predict, "parameter_draws_are_cheaper", lambda *_: draws)
    assert_same(posterior.predict(x, targets=y), expected.predict(x, targets=y))


def test_exported_log_likelihoods_are_those_of_the_divided_outputs():
    posterior, expected, x, y = pair()
    actual, other = (
        p.to_arviz(20, torch.Generator().manual_seed(1), [(x, y)]).log_likelihood["target"].values
        for p in (posterior, expected)
    )
    assert actual == pytest.approx(other, rel=1e-6)


def test_fit_chooses_a_softmax_temperature_only_if_it_holds_data_out(tmp_path):
    """With a narrow prior the mean is far too uncertain on an easy task."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(400, 5, generator=g).double()
    y = (8.0 * x @ torch.randn(5, 3, generator=g).double()).argmax(1)
    batches = list(zip(x.split(10), y.split(10), strict=True))
    model = nn.Linear(5, 3).double()
    narrow = bkf.KalmanConfig(initial_logit_sd=0.5)
    chosen = bkf.fit(model, batches, [narrow], progress=False)
    assert chosen.softmax_temperature < 0.9
    assert bkf.fit(model, batches, narrow, progress=False).softmax_temperature == 1.0
    given = dataclasses.replace(narrow, temperature=1.0, softmax_temperature=0.7)  # a number: nothing is chosen
    divided = bkf.fit(model, batches, [given], progress=False)
    without = bkf.fit(model, batches, [dataclasses.replace(given, softmax_temperature=1.0)], progress=False)
    assert (divided.softmax_temperature, without.softmax_temperature) == (0.7, 1.0)
    assert torch.equal(divided.mean_vector, without.mean_vector)  # learning does not see it
    assert chosen.history["held_out_log_loss"] < without.history["held_out_log_loss"]
    chosen.save_pretrained(tmp_path / "kept")
    assert f"divided by {chosen.softmax_temperature:g}" in (tmp_path / "kept" / "README.md").read_text()
    again = bkf.Posterior.from_pretrained(tmp_path / "kept", model)
    assert again.softmax_temperature == chosen.softmax_temperature
    assert torch.equal(again.predict(x[:5]).mean, chosen.predict(x[:5]).mean)


def test_other_likelihoods_have_no_softmax_temperature():
    kf = bkf.KalmanFilter(nn.Linear(3, 2), bkf.KalmanConfig(likelihood="gaussian"))
    with pytest.raises(ValueError, match=r"needs `likelihood` 'categorical', got 'gaussian'"):
        bkf.Posterior(kf, kf.init(torch.zeros(1, 3))).calibrate_softmax([(torch.zeros(2, 3), torch.zeros(2, 2))])
    kf = bkf.KalmanFilter(nn.Linear(3, 2), bkf.KalmanConfig())
    posterior = bkf.Posterior(kf, kf.init(torch.zeros(1, 3)))
    with pytest.raises(ValueError, match="at least one batch"):
        posterior.calibrate_softmax([])
    with pytest.raises(ValueError, match="got none in batch 0"):
        posterior.calibrate_softmax([torch.zeros(2, 3)])
