"""The drift alarm's guarantee by simulation, and that it sees changes."""

import json
import math

import pytest
import torch

from bayes_kf.evaluation import DriftDetector, drift_alarm

RUNS, LENGTH = 1500, 100


def predictions(count, classes=5, scale=2.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    probs = (scale * torch.randn(count, classes, generator=g).double()).softmax(1)
    return probs, torch.multinomial(probs, 1, generator=g).squeeze(1)


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_false_alarms_come_no_more_often_than_stated(scale):
    """P(alarm within T) <= T/A: the bound is met within its Monte Carlo error, and not for lack of any alarm."""
    probs, labels = predictions(RUNS * LENGTH, scale=scale)
    result = [
        len(drift_alarm(p, y, run_length=400.0).alarms) > 0
        for p, y in zip(probs.split(LENGTH), labels.split(LENGTH), strict=True)
    ]
    rate, bound = sum(result) / RUNS, LENGTH / 400.0
    assert rate <= bound + 4 * math.sqrt(bound * (1 - bound) / RUNS)
    assert scale < 1.0 or rate > 0.0  # with nearly flat predictions there is next to nothing to be alarmed at


def test_the_statistic_has_its_mean_when_labels_follow_the_predictions():
    """E[R_t] = t, here by averages over runs, while no run has raised an alarm."""
    length, runs = 12, 20_000
    probs, labels = predictions(length * runs, scale=1.0, seed=1)
    parts = zip(probs.split(length), labels.split(length), strict=True)
    values = torch.stack([drift_alarm(p, y, run_length=1e30).statistic for p, y in parts])
    error = values.std(0) / runs**0.5
    assert ((values.mean(0) - torch.arange(1, length + 1)).abs() < 4 * error).all()


def test_permuted_labels_raise_it_soon():
    probs, labels = predictions(400, scale=4.0, seed=2)
    labels = torch.where(torch.arange(400) < 200, labels, (labels + 1) % 5)
    result = drift_alarm(probs, labels, run_length=10_000.0)
    assert 200 <= int(result.alarms[0]) < 215
    assert len(result.statistic) == 400
    assert result.threshold == 10_000.0


def test_an_overconfident_model_raises_it_without_a_change():
    probs, labels = predictions(2000, scale=1.0, seed=3)
    assert len(drift_alarm((3 * probs.log()).softmax(1), labels).alarms) > 0
    assert len(drift_alarm(probs, labels).alarms) == 0


def test_a_label_that_was_impossible_raises_it_at_once():
    result = drift_alarm(torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1, 0]))
    assert result.alarms.tolist() == [1]
    assert torch.isfinite(result.statistic[[0, 2]]).all()


@pytest.mark.parametrize("length", [1.0, 0.0, float("nan")])
def test_bad_run_length(length):
    with pytest.raises(ValueError, match=r"`run_length` must be above one, got"):
        drift_alarm(*predictions(3), run_length=length)


def test_bad_shapes():
    probs, labels = predictions(4)
    with pytest.raises(ValueError, match=r"`labels` must have shape \(4,\) as `probs` has, got \(3,\)\."):
        drift_alarm(probs, labels[:3])
    with pytest.raises(ValueError, match=r"`probs` must sum to one in every row"):
        drift_alarm(probs * 2, labels)


def test_one_at_a_time_is_the_whole():
    """And going on from where a detector was is never having stopped, to the bit."""
    g = torch.Generator().manual_seed(0)
    probs = torch.rand(400, 3, generator=g).double()
    probs = probs / probs.sum(1, keepdim=True)
    labels = torch.randint(3, (400,), generator=g)
    whole = drift_alarm(probs, labels, run_length=30.0)
    detector, alarms, statistic = DriftDetector(30.0), [], []
    for t, (p, y) in enumerate(zip(probs, labels, strict=True)):
        if t == 200:
            detector = DriftDetector(30.0, json.loads(json.dumps(detector.current)))
        alarms += [t] * detector.update(float(p[y] / p.sum()), 3)
        statistic.append(detector.statistic)
    assert alarms == whole.alarms.tolist()
    assert statistic == whole.statistic.tolist()
    assert len(alarms) > 1


@pytest.mark.parametrize("current", [(0.0, 1.0), (0.0, 1.0, -1.0), (0.0, 1.0, float("inf"))])
def test_a_detector_goes_on_from_numbers_alone(current):
    with pytest.raises(ValueError, match="`current` must be 3 finite numbers >= 0"):
        DriftDetector(10.0, current)


def test_a_detector_takes_probabilities_alone():
    with pytest.raises(ValueError, match=r"`prob` must be a probability, got 1\.5"):
        DriftDetector(10.0).update(1.5, 2)
    with pytest.raises(ValueError, match="`run_length` must be above one"):
        DriftDetector(1.0)


@pytest.mark.parametrize("run_length", [50.0, 1e308])
@pytest.mark.parametrize("prob", [1e-310, 5e-324, 0.0])
def test_the_state_after_any_label_is_one_to_go_on_from(run_length, prob):
    detector = DriftDetector(run_length=run_length)
    assert detector.update(prob, 10)
    assert all(math.isfinite(value) for value in detector.current)
    assert DriftDetector(run_length=run_length, current=detector.current).current == detector.current
