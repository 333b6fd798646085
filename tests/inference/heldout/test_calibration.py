"""Size and sharpness, set together by held-out data."""

import dataclasses
import math

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn

import bayes_kf as bkf
from bayes_kf.inference.heldout import calibration, heldout_examples
from bayes_kf.inference.heldout.choice import Choice
from bayes_kf.inference.heldout.covariance_size import choose_size, with_size
from bayes_kf.inference.heldout.heldout_examples import heldout_outputs
from bayes_kf.inference.heldout.sharpness import choose_sharpness


def linear(features, classes, variance, **settings):
    """A belief that is its prior: N(0, variance) for each weight of a linear classifier."""
    model = nn.Linear(features, classes, bias=False).double()
    nn.init.zeros_(model.weight)
    settings = {"covariance": "full", "initial_variance": variance, "bound_prior": False} | settings
    kf = bkf.KalmanFilter(model, bkf.KalmanConfig(**settings))
    return bkf.Posterior(kf, kf.init())


def surely(logits, **settings):
    """A posterior without a covariance to speak of, whose mean gives these logits for its inputs."""
    posterior = linear(logits.shape[1], logits.shape[1], 1e-8, **settings)
    mean = torch.eye(logits.shape[1]).double().flatten()
    return dataclasses.replace(posterior, state=posterior.state._replace(belief=posterior.state.belief.with_mean(mean)))


def labels(logits, seed=0):
    return torch.multinomial(logits.softmax(1), 1, generator=torch.Generator().manual_seed(seed))[:, 0]


def held_out(number, seed=0, size=50):
    """Inputs, and labels of one draw of the weights from N(0, 0.09)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 8, generator=generator, dtype=torch.float64)
    weights = 0.3 * torch.randn(8, 3, generator=generator, dtype=torch.float64)
    y = labels(x @ weights, seed)
    return list(zip(x.split(size), y.split(size), strict=True))


@pytest.mark.parametrize("temperature", [0.1, "prequential"])
def test_a_prior_that_is_ten_times_too_wide_gets_its_size_back(temperature):
    """Labels of weights with sd 0.3 under a prior of sd 3: s = 100, and the sharpness has nothing to do."""
    sizes = []
    for seed in range(3):
        posterior = linear(8, 3, 9.0, temperature=temperature)
        calibrated = posterior.calibrate(held_out(400, seed))
        assert calibrated.temperature == 1.0  # the size took its place
        value, low, high = calibrated.history["size"].tolist()
        assert low <= value <= high
        precision = 1.0 / calibrated.variance_vector
        torch.testing.assert_close(precision, torch.full_like(precision, value / 9.0), rtol=1e-6, atol=0)
        assert 0.6 < calibrated.softmax_temperature < 1.6
        sizes.append(math.log10(value))
    assert sum(sizes) / 3 == pytest.approx(2.0, abs=0.4)


@pytest.mark.parametrize("true", [0.5, 2.0])
@pytest.mark.parametrize("count", [60, 4000])
def test_the_sharpness_is_the_most_probable_one_both_ways(true, count):
    """Against SciPy's minimum of the log loss of the mean and the prior's ½ (ln S / 0.5)²."""
    logits = torch.randn(count, 10, generator=torch.Generator().manual_seed(1)).double()
    y = labels(logits / true)

    def objective(log_divisor):
        chosen = (logits / math.exp(log_divisor)).log_softmax(1).gather(1, y[:, None]).sum()
        return -float(chosen) + 0.5 * (log_divisor / 0.5) ** 2

    best = math.exp(minimize_scalar(objective, bounds=(-2.3, 2.3), method="bounded").x)
    batches = list(zip(logits.split(20), y.split(20), strict=True))
    alone, both = surely(logits).calibrate_softmax(batches), surely(logits).calibrate(batches)
    for actual in (alone, both):
        assert actual.softmax_temperature == pytest.approx(best, rel=0.03)
        value, low, high = actual.history["sharpness"].tolist()
        assert value == actual.softmax_temperature
        assert low <= value <= high
    assert "size" not in alone.history
    assert alone.state is not both.state
    assert torch.equal(alone.variance_vector, surely(logits).variance_vector)


def test_the_size_comes_first_and_the_sharpness_at_that_size():
    batches = held_out(120)
    posterior = linear(8, 3, 9.0)
    calibrated = posterior.calibrate(batches)
    start = with_size(posterior, 1.0)
    size = choose_size(start, batches)
    sized = with_size(start, size.value)
    sharpness = choose_sharpness([heldout_outputs(sized, batches)])
    assert torch.equal(calibrated.history["size"], size.as_tensor())
    assert torch.equal(calibrated.history["sharpness"], sharpness.as_tensor())
    assert torch.equal(calibrated.covariance_matrix(), sized.covariance_matrix())
    sharpened = posterior.calibrate_softmax(batches).calibrate(batches)  # an earlier sharpness does not count
    assert sharpened.softmax_temperature == calibrated.softmax_temperature
    assert posterior.history == {}


def test_a_calibrated_posterior_is_saved_and_opened(tmp_path):
    calibrated = linear(8, 3, 9.0).calibrate(held_out(60))
    calibrated.save_pretrained(tmp_path)
    opened = bkf.Posterior.from_pretrained(tmp_path, nn.Linear(8, 3, bias=False).double())
    for name in ("size", "sharpness"):
        assert torch.equal(opened.history[name], calibrated.history[name])
    x = held_out(60)[0][0]
    assert torch.equal(opened.predict(x).probs, calibrated.predict(x).probs)


def test_with_dynamics_the_size_is_a_temperature():
    posterior = linear(8, 3, 9.0, forgetting=0.99)
    calibrated = posterior.calibrate(held_out(200))
    value, *_ = calibrated.history["size"].tolist()
    assert calibrated.temperature == pytest.approx(1.0 / value)
    assert torch.equal(calibrated.covariance_matrix(), posterior.covariance_matrix())
    assert calibrated.temperature < 1.0


def test_the_posterior_of_a_stream_that_chooses_its_settings_can_be_calibrated():
    kf = bkf.KalmanFilter(nn.Linear(3, 2), bkf.KalmanConfig.stream())
    assert kf.config.tune is not None
    x, y = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2
    calibrated = bkf.Posterior(kf, kf.init(x)).calibrate([(x, y)])
    assert calibrated.temperature == 1.0
    assert calibrated.config.tune is None
    assert {"size", "sharpness"} <= set(calibrated.history)


def test_at_most_512_examples_choose_the_size_and_fewer_of_a_large_adapter():
    posterior = linear(1, 3, 9.0)
    for sizes in ([300, 212], [7] * 200, [600], [1, 2000, 5, 30]):
        numbers = torch.arange(sum(sizes))
        batches = list(zip(numbers[:, None].double().split(sizes), numbers.split(sizes), strict=True))
        for most in (512, 64):
            thinned = heldout_examples.thinned(posterior, batches, most)
            actual = torch.cat([targets for _, targets in thinned])
            assert torch.equal(actual, torch.arange(0, sum(sizes), math.ceil(sum(sizes) / most)))
            assert torch.equal(torch.cat([inputs for inputs, _ in thinned])[:, 0], actual.double())
    assert calibration._most_examples(posterior) == 512
    large = linear(50_000, 3, 9.0, covariance="diagonal")
    assert calibration._most_examples(large) == 2**31 // (7 * 150_000 * 8) == 255


def test_a_loader_that_can_be_read_once_is_enough():
    posterior, batches = linear(8, 3, 9.0), held_out(80)
    once, often = posterior.calibrate(iter(batches)), posterior.calibrate(batches)
    assert torch.equal(once.covariance_matrix(), often.covariance_matrix())
    assert once.softmax_temperature == often.softmax_temperature
    assert posterior.calibrate_softmax(iter(batches)).softmax_temperature != 1.0


@pytest.mark.parametrize(
    ("value", "at_edge", "static", "expected"),
    [
        (1000.0, True, True, r"the size chosen is 1000, the largest that was tried: predictions are close to"),
        (1000.0, True, False, r"the temperature chosen is 0.001, the smallest that was tried: predictions are close"),
        (0.2, True, True, r"the size chosen is 0.2, the smallest that was tried: the covariance is too small for"),
        (30.0, False, True, None),
    ],
)
def test_a_size_at_the_end_is_said(value, at_edge, static, expected):
    note = calibration.edge_of_size(Choice(value, 10.0, 1000.0, at_edge, 0.0), static)
    assert note is None if expected is None else expected in note


def test_a_mean_that_held_out_data_confirm_everywhere_gets_the_largest_size():
    """A belief of many logits, and data that its mean alone predicts."""
    posterior = linear(2, 2, 4000.0)
    mean = torch.tensor([3.0, 0.0, -3.0, 0.0]).double()
    sure = dataclasses.replace(posterior, state=posterior.state._replace(belief=posterior.state.belief.with_mean(mean)))
    x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)).double()
    with pytest.warns(UserWarning, match="the size chosen is 1000, the largest that was tried") as caught:
        sure.calibrate([(x, (x[:, 0] < 0).long())])
    assert caught[0].filename == __file__


@pytest.mark.parametrize(("true", "message"), [(0.02, "0.1, the smallest"), (60.0, "10, the largest")])
def test_a_sharpness_at_an_end_is_said(true, message):
    generator = torch.Generator().manual_seed(1)
    logits = (0.2 if true < 1 else 20.0) * torch.randn(4000, 4, generator=generator).double()
    y = labels(logits / true)
    with pytest.warns(UserWarning, match=f"the softmax temperature chosen is {message} that was tried") as caught:
        surely(logits).calibrate_softmax([(logits, y)])
    assert caught[0].filename == __file__


def test_calibrate_softmax_needs_classes():
    kf = bkf.KalmanFilter(nn.Linear(3, 2), bkf.KalmanConfig(likelihood="gaussian"))
    posterior = bkf.Posterior(kf, kf.init(torch.zeros(1, 3)))
    with pytest.raises(ValueError, match=r"^`calibrate_softmax` needs `likelihood` 'categorical', got 'gaussian'\.$"):
        posterior.calibrate_softmax([(torch.zeros(2, 3), torch.zeros(2, 2))])
