"""The latest examples of a stream choose size and sharpness, by the belief from before them."""

import dataclasses

import pytest
import torch
from torch import nn

import bayes_kf as bkf
from bayes_kf.inference.heldout import latest_examples
from bayes_kf.inference.heldout.covariance_size import with_size

CONFIG = bkf.KalmanConfig(covariance="full", initial_variance=1.0, bound_prior=False)


def model():
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


def stream(number, size=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 4, generator=generator, dtype=torch.float64)
    logits = x @ torch.randn(4, 3, generator=generator, dtype=torch.float64)
    y = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return list(zip(x.split(size), y.split(size), strict=True))


def states(kf, batches):
    """The states before each batch, and the last one."""
    found = [kf.init(batches[0][0])]
    for inputs, targets in batches:
        found.append(kf.update(found[-1], inputs, targets)[0])
    return found


@pytest.mark.parametrize("number", [1, 63, 64, 65, 127, 128, 129, 200, 320])
def test_64_to_128_examples_are_kept_with_the_state_before_them(number):
    batches = stream(number)
    numbered = list(range(number + 1))  # in the place of states
    latest = latest_examples.init(numbered[0])
    for index, (inputs, targets) in enumerate(batches):
        latest = latest_examples.add(latest, inputs, targets, numbered[index + 1])
    first = latest.before
    assert first == max(0, (number // 64 - 1) * 64)
    kept = torch.cat([inputs for inputs, _ in latest.batches])
    assert torch.equal(kept, torch.cat([inputs for inputs, _ in batches[first:]]))
    assert len(kept) == number if number < 128 else 64 <= len(kept) < 128


def test_fit_chooses_by_them():
    batches = stream(150)
    kf = bkf.KalmanFilter(model(), CONFIG)
    every = states(kf, batches)
    chosen = bkf.Posterior(kf, every[64]).calibrate(batches[64:])
    actual = bkf.fit(model(), iter(batches), CONFIG, held_out="latest", progress=False)
    expected = with_size(bkf.Posterior(kf, every[-1]), float(chosen.history["size"][0]))
    torch.testing.assert_close(actual.covariance_matrix(), expected.covariance_matrix(), rtol=1e-9, atol=1e-12)
    assert torch.equal(actual.mean_vector, every[-1].belief.mean)
    assert actual.softmax_temperature == chosen.softmax_temperature
    assert torch.equal(actual.history["sharpness"], chosen.history["sharpness"])
    assert len(actual.history["log_loss"]) == 150
    assert actual.temperature == 1.0
    again = actual.calibrate(stream(60, seed=3))  # from size 1 again
    other = bkf.Posterior(kf, every[-1]).calibrate(stream(60, seed=3))
    torch.testing.assert_close(again.covariance_matrix(), other.covariance_matrix(), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_a_short_stream_keeps_its_temperature(size):
    few = stream(49, size)
    posterior = bkf.fit(model(), iter(few), CONFIG, held_out="latest", progress=False)
    plain = bkf.fit(model(), iter(few), CONFIG, progress=False)
    assert "size" not in posterior.history
    assert posterior.config == plain.config
    assert torch.equal(posterior.covariance_matrix(), plain.covariance_matrix())
    assert "size" in bkf.fit(model(), iter(stream(50, size)), CONFIG, held_out="latest", progress=False).history


def test_a_regression_has_a_size_alone():
    batches = [(x, x @ torch.ones(4, 1, dtype=torch.float64)) for x, _ in stream(80)]
    config = dataclasses.replace(CONFIG, likelihood="gaussian", noise_variance=0.1)
    posterior = bkf.fit(nn.Linear(4, 1).double(), iter(batches), config, held_out="latest", progress=False)
    assert ("size" in posterior.history, "sharpness" in posterior.history) == (True, False)


def test_without_settings_the_stream_chooses_its_prior_first():
    posterior = bkf.fit(model(), stream(300, 4), held_out="latest", progress=False)
    assert {"evidence", "size", "sharpness"} <= set(posterior.history)
    assert posterior.state.examples == 300


def test_what_does_not_go_together_is_refused(tmp_path):
    data = stream(60)
    several = dataclasses.replace(CONFIG, mean_passes=2)
    with pytest.raises(ValueError, match=r"^`held_out` 'latest' needs one pass, since .*, got 3\.$"):
        bkf.fit(model(), data, several, held_out="latest", progress=False)
    with pytest.raises(ValueError, match=r"^`held_out` must be one of latest, got 'lastest'; did you mean 'latest'\?$"):
        bkf.fit(model(), data, CONFIG, held_out="lastest", progress=False)
    with pytest.raises(ValueError, match=r"^`held_out` must be batches with `start` 'trained'"):
        bkf.fit(model(), data, CONFIG, start="trained", held_out="latest", progress=False)
    with pytest.raises(ValueError, match=r"^`config` must be one KalmanConfig with `held_out` 'latest', got several"):
        bkf.fit(model(), data, [CONFIG, CONFIG], held_out="latest", progress=False)
    with pytest.raises(ValueError, match=r"^`held_out` must be None with a `checkpoint`, got 'latest'\.$"):
        bkf.fit(model(), data, CONFIG, held_out="latest", checkpoint=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"^`temperature` must be 'prequential' with `held_out`, got 1\.0\.$"):
        bkf.fit(model(), data, dataclasses.replace(CONFIG, temperature=1.0), held_out="latest", progress=False)
