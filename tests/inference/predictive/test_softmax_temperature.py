"""The divisor of logits in predictions: the same in all of them, chosen on held-out data, at most 1."""

import dataclasses
import math

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn

import bayes_kf as bkf
from bayes_kf.evaluation import TemperatureScaling
from bayes_kf.inference.fitting.selection import heldout_config_selection
from bayes_kf.inference.predictive import heldout_calibration, predict
from bayes_kf.models.likelihood import Categorical

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


def test_so_are_predictions_from_parameter_draws_and_their_temperature(monkeypatch):
    posterior, expected, x, y = pair(classes=9)
    batches = list(zip(x.split(4), y.split(4), strict=True))
    for passes in ("moments", "differences"):
        if passes == "differences":
            for module in (predict, heldout_calibration):
                monkeypatch.setattr(module, "parameter_draws_are_cheaper", lambda *_: True)
        assert_same(posterior.predict(x, targets=y), expected.predict(x, targets=y))
        losses = []
        monkeypatch.setattr(heldout_calibration, "choose_temperature", lambda actual: losses.append(actual) or 1.0)  # noqa: B023
        heldout_calibration.calibrate_temperature(posterior, batches)
        heldout_calibration.calibrate_temperature(expected, batches)
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-9)
        monkeypatch.undo()


def test_exported_log_likelihoods_are_those_of_the_divided_outputs():
    posterior, expected, x, y = pair()
    actual, other = (
        p.to_arviz(20, torch.Generator().manual_seed(1), [(x, y)]).log_likelihood["target"].values
        for p in (posterior, expected)
    )
    assert actual == pytest.approx(other, rel=1e-6)


def labels(logits, seed=0):
    return torch.multinomial(logits.softmax(1), 1, generator=torch.Generator().manual_seed(seed))[:, 0]


def held(logits):
    """A posterior whose mean gives these logits for its inputs."""
    model = nn.Linear(logits.shape[1], logits.shape[1], bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.eye(logits.shape[1]))
    kf = bkf.KalmanFilter(model, bkf.KalmanConfig(initial_variance=1e-8, softmax_temperature="held_out"))
    return bkf.Posterior(kf, kf.init())


@pytest.mark.parametrize("true", [0.5, 0.8])
@pytest.mark.parametrize("count", [60, 4000])
def test_the_softmax_temperature_is_the_most_probable_one_given_held_out_data(true, count):
    """Against SciPy's minimum; with many examples also against temperature scaling, which has no prior."""
    logits = torch.randn(count, 30, generator=torch.Generator().manual_seed(1)).double()
    y = labels(logits / true)
    actual = heldout_calibration.calibrate_softmax(held(logits), zip(logits.split(50), y.split(50), strict=True))

    def objective(log_divisor):
        chosen = (logits / math.exp(log_divisor)).log_softmax(1).gather(1, y[:, None]).sum()
        return -float(chosen) + 0.5 * (log_divisor / 0.1) ** 2

    best = math.exp(minimize_scalar(objective, bounds=(-2.0, 0.0), method="bounded").x)
    assert abs(actual.softmax_temperature - best) <= 0.0251  # half a step of the grid
    assert actual.config.softmax_temperature == actual.softmax_temperature
    if count > 1000:
        scaled = TemperatureScaling.fit(logits.softmax(1), y)
        assert abs(actual.softmax_temperature - scaled.temperature) < 0.05
        assert abs(actual.softmax_temperature - true) < 0.06


def test_the_softmax_temperature_is_never_above_1():
    logits = 3.0 * torch.randn(2000, 10, generator=torch.Generator().manual_seed(1)).double()
    y = labels(logits / 2.0)
    assert TemperatureScaling.fit(logits.softmax(1), y).temperature > 1.5
    assert heldout_calibration.calibrate_softmax(held(logits), [(logits, y)]).softmax_temperature == 1.0


def test_a_few_right_answers_do_not_make_predictions_certain():
    """Temperature scaling alone would."""
    logits = math.log(9.0) * torch.nn.functional.one_hot(torch.arange(24) % 2).double()  # 0.9 for each of them
    y = torch.arange(24) % 2
    assert TemperatureScaling.fit(logits.softmax(1), y).temperature == 0.01
    assert heldout_calibration.calibrate_softmax(held(logits), [(logits, y)]).softmax_temperature >= 0.95


def test_an_impossible_target_leaves_the_softmax_temperature_at_1():
    losses = heldout_calibration.SOFTMAX_PRIOR + torch.tensor([torch.inf] * len(heldout_calibration.SOFTMAX_GRID))
    assert heldout_calibration.choose_softmax_temperature(losses) == 1.0
    logits = torch.tensor([[0.0, 1e4]]).double()
    assert math.isfinite(float(heldout_calibration.softmax_log_losses(Categorical(), logits, torch.tensor([0])).max()))


def test_fit_chooses_a_softmax_temperature_only_if_it_holds_data_out(tmp_path):
    """With a narrow prior the mean is far too uncertain on an easy task."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(400, 5, generator=g).double()
    y = (8.0 * x @ torch.randn(5, 3, generator=g).double()).argmax(1)
    batches = list(zip(x.split(10), y.split(10), strict=True))
    model = nn.Linear(5, 3).double()
    narrow = bkf.KalmanConfig(initial_logit_sd=0.5, softmax_temperature="held_out")
    chosen = bkf.fit(model, batches, [narrow], progress=False)
    assert chosen.softmax_temperature < 0.9
    assert bkf.fit(model, batches, narrow, progress=False).softmax_temperature == 1.0
    given = dataclasses.replace(narrow, softmax_temperature=0.7)
    assert bkf.fit(model, batches, [given], progress=False).softmax_temperature == 0.7
    without = bkf.fit(model, batches, [dataclasses.replace(narrow, softmax_temperature=1.0)], progress=False)
    assert torch.equal(chosen.mean_vector, without.mean_vector)  # learning does not see it
    assert chosen.history["held_out_log_loss"] < without.history["held_out_log_loss"]
    chosen.save_pretrained(tmp_path / "kept")
    assert f"divided by {chosen.softmax_temperature:g}" in (tmp_path / "kept" / "README.md").read_text()
    again = bkf.Posterior.from_pretrained(tmp_path / "kept", model)
    assert again.softmax_temperature == chosen.softmax_temperature
    assert torch.equal(again.predict(x[:5]).mean, chosen.predict(x[:5]).mean)


@pytest.mark.parametrize(("outputs", "expected"), [(32, 1.0), (33, "held_out")])
def test_without_settings_fit_chooses_it_above_32_outputs(outputs, expected):
    batches = [(torch.zeros(2, 3), torch.tensor([0, 1]))] * 8
    settings = heldout_config_selection.default_candidates(nn.Linear(3, outputs), batches)
    assert {config.softmax_temperature for config in settings} == {expected}


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
