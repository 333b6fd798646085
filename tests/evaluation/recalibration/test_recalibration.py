"""Recalibration: scikit-learn's fits, grids, zero gradients, in-sample guarantees, and what the report says."""

import math
import re

import numpy as np
import pytest
import torch
from evaluation_cases import random_case
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression

from bayes_kf import evaluation as ev
from bayes_kf.evaluation.recalibration import vector_scaling
from bayes_kf.evaluation.recalibration.scaling import RECALIBRATIONS
from bayes_kf.evaluation.resampling.null_test import NullSettings
from bayes_kf.evaluation.sections.selective import recalibration_section

MAPS = list(RECALIBRATIONS.values())


def hard_case(size: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ties, probabilities of exactly 0 and 1, classes that never come, labels of probability zero."""
    generator = torch.Generator().manual_seed(seed)
    probs = (2 * torch.randn(size, classes, generator=generator, dtype=torch.float64)).round().softmax(dim=1)
    probs[: size // 4] = torch.eye(classes, dtype=torch.float64)[seed % classes]
    return probs, torch.randint(max(1, classes - seed % 2), (size,), generator=generator)


def log_loss(probs: torch.Tensor, targets: torch.Tensor) -> float:
    return ev.negative_log_likelihood(probs, targets)


def binary_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logit = 2 * rng.normal(size=300)
    p = 1 / (1 + np.exp(-logit))
    labels = (rng.random(300) < 1 / (1 + np.exp(0.4 - 0.6 * logit))).astype(int)
    return np.stack([1 - p, p], axis=1), labels


@pytest.mark.parametrize("seed", range(3))
def test_temperature_of_two_classes_is_a_logistic_regression_through_zero(seed):
    probs, targets = binary_case(seed)
    logit = np.log(probs[:, 1] / probs[:, 0])[:, None]
    theirs = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-12, max_iter=10_000).fit(logit, targets)
    result = ev.TemperatureScaling.fit(probs, targets)
    assert 1 / result.temperature == pytest.approx(theirs.coef_.item(), abs=1e-6)
    assert result(probs).numpy() == pytest.approx(theirs.predict_proba(logit), abs=1e-6)


@pytest.mark.parametrize(("size", "classes"), [(1, 2), (3, 3), (100, 4), (400, 12)])
@pytest.mark.parametrize("seed", range(4))
def test_temperature_is_the_best_of_a_fine_grid(size, classes, seed):
    probs, targets = hard_case(size, classes, seed)
    result = ev.TemperatureScaling.fit(probs, targets)
    assert 0.01 <= result.temperature <= 100
    logs = np.log(np.maximum(probs.numpy(), 1.4e-45))
    grid = 1 / np.geomspace(0.01, 100, 4001)
    outputs = grid[:, None, None] * logs  # (G, N, C)
    top = outputs.max(axis=2)
    losses = (top + np.log(np.exp(outputs - top[:, :, None]).sum(axis=2)) - outputs[:, np.arange(size), targets]).mean(
        axis=1
    )
    best = log_loss(result(probs), targets)
    assert best <= losses.min() + 1e-12
    if 0.011 < result.temperature < 90:
        assert result.temperature == pytest.approx(1 / grid[losses.argmin()], rel=0.0024)  # a step of the grid
        for nearby in (0.999, 1.001):
            other = ev.TemperatureScaling(nearby * result.temperature, "", 1)
            assert log_loss(other(probs), targets) > best


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.0])
def test_temperature_of_a_sharpened_model_is_found(sharpness):
    probs, targets = random_case(20_000, 5)
    result = ev.TemperatureScaling.fit((sharpness * probs.log()).softmax(dim=1), targets)
    assert result.temperature == pytest.approx(sharpness, rel=0.04)
    if sharpness != 1:
        assert (
            ev.calibration_test(
                result(probs.pow(sharpness) / probs.pow(sharpness).sum(1, keepdim=True)), targets
            ).p_value
            > 0.01
        )


def test_temperature_at_its_ends():
    sure = torch.tensor([[0.9, 0.1]] * 5, dtype=torch.float64)
    assert ev.TemperatureScaling.fit(sure, torch.zeros(5, dtype=torch.int64)).temperature == pytest.approx(0.01)
    assert ev.TemperatureScaling.fit(sure, torch.ones(5, dtype=torch.int64)).temperature == pytest.approx(100)


@pytest.mark.parametrize("fit", MAPS)
@pytest.mark.parametrize(("size", "classes"), [(1, 2), (2, 2), (7, 3), (60, 4), (200, 11)])
@pytest.mark.parametrize("seed", range(4))
def test_the_fit_is_never_worse_than_nothing_and_gives_probabilities(fit, size, classes, seed):
    probs, targets = hard_case(size, classes, seed)
    result = fit.fit(probs, targets)
    after = result(probs)
    assert after.dtype == torch.float64
    assert after.min() >= 0
    torch.testing.assert_close(after.sum(dim=1), torch.ones(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert log_loss(after, targets) <= log_loss(probs, targets) + 1e-12
    elsewhere = result(torch.eye(classes))  # zeros and ones that the fit need not have seen
    assert elsewhere.isfinite().all()
    torch.testing.assert_close(elsewhere.sum(dim=1), torch.ones(classes, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_vector_scaling_of_two_classes_is_a_logistic_regression(seed):
    probs, targets = binary_case(seed)
    features = np.stack([-np.log(probs[:, 0]), np.log(probs[:, 1])], axis=1)
    theirs = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000).fit(features, targets)
    result = ev.VectorScaling.fit(probs, targets, penalty=0.0)
    assert result.scale.numpy() == pytest.approx(theirs.coef_[0], abs=1e-5)
    assert (result.bias[1] - result.bias[0]).item() == pytest.approx(theirs.intercept_.item(), abs=1e-5)
    assert result(probs).numpy() == pytest.approx(theirs.predict_proba(features), abs=1e-6)


@pytest.mark.parametrize("penalty", [0.0, 0.01, 5.0])
@pytest.mark.parametrize(("size", "classes"), [(300, 3), (1000, 10)])
def test_vector_scaling_has_no_slope_at_its_fit(penalty, size, classes):
    """The objective is convex: where its gradient (here autograd's) is zero it is least."""
    probs, targets = random_case(size, classes, seed=4)
    result = ev.VectorScaling.fit(probs, targets, penalty=penalty)
    scale, bias = result.scale.clone().requires_grad_(), result.bias.clone().requires_grad_()
    losses = torch.nn.functional.cross_entropy(scale * probs.log() + bias, targets, reduction="sum")
    objective = losses + penalty / 2 * ((scale - 1).square().sum() + bias.square().sum())
    objective.backward()
    slopes = torch.cat([scale.grad, bias.grad])
    assert slopes.abs().max() < 1e-6 * size
    assert result.bias.sum().item() == pytest.approx(0, abs=1e-9)


def test_vector_scaling_finds_what_was_put_in():
    """Standard errors at 40,000 examples are about 0.02."""
    probs, _ = random_case(40_000, 4, seed=2)
    scale, bias = torch.tensor([0.5, 1.0, 1.5, 2.0]), torch.tensor([0.6, -0.2, 0.0, -0.4])
    generator = torch.Generator().manual_seed(3)
    true = (scale * probs.log() + bias).softmax(dim=1)
    targets = torch.multinomial(true, 1, generator=generator)[:, 0]
    result = ev.VectorScaling.fit(probs, targets)
    assert result.scale.numpy() == pytest.approx(scale.numpy(), abs=0.1)
    assert result.bias.numpy() == pytest.approx(bias.numpy(), abs=0.1)
    assert (result(probs) - true).abs().max() < 0.04


def test_a_fit_that_came_out_worse_than_nothing_is_nothing(monkeypatch):
    probs, targets = random_case(50, 3)
    worse = type("R", (), {"x": np.repeat([-5.0, 9.0], 3)})
    monkeypatch.setattr(vector_scaling.scipy.optimize, "minimize", lambda *_, **__: worse)
    result = ev.VectorScaling.fit(probs, targets)
    assert result.scale.tolist() == [1.0] * 3
    assert result.bias.tolist() == [0.0] * 3


def test_blocks_of_examples_change_nothing(monkeypatch):
    probs, targets = random_case(200, 5)
    whole = ev.VectorScaling.fit(probs, targets)
    monkeypatch.setattr(vector_scaling, "BLOCK", 64)
    parts = ev.VectorScaling.fit(probs, targets)
    torch.testing.assert_close(parts.scale, whole.scale, rtol=0, atol=1e-8)
    torch.testing.assert_close(parts.bias, whole.bias, rtol=0, atol=1e-8)


def test_a_class_that_never_came_stays_possible():
    probs, _ = random_case(300, 3)
    targets = torch.multinomial(probs[:, :2], 1, generator=torch.Generator().manual_seed(0))[:, 0]
    after = ev.VectorScaling.fit(probs, targets)(probs)
    assert 0 < after[:, 2].max() < 0.2
    assert after[:, 2].min() > 0


class AsTheyCome:
    """A classifier whose inputs are its probabilities."""

    def __init__(self, classes: int):
        self.classes_ = np.arange(classes)

    def fit(self, x, y):
        return self

    def predict(self, x):
        return x.argmax(axis=1)

    def predict_proba(self, x):
        return x

    def __sklearn_is_fitted__(self):
        return True

    def __sklearn_tags__(self):
        return LogisticRegression().__sklearn_tags__()


@pytest.mark.parametrize(("classes", "seed", "ties"), [(2, 0, False), (3, 1, True), (6, 2, False)])
def test_isotonic_calibration_is_sklearns(classes, seed, ties):
    probs, targets = random_case(600, classes, seed)
    probs = (2 * probs.log()).round().softmax(dim=1) if ties else (2 * probs.log()).softmax(dim=1)
    theirs = CalibratedClassifierCV(FrozenEstimator(AsTheyCome(classes)), method="isotonic")
    expected = theirs.fit(probs.numpy(), targets.numpy())
    result = ev.IsotonicCalibration.fit(probs, targets)
    for values in (probs, random_case(200, classes, seed + 10)[0]):
        assert result(values).numpy() == pytest.approx(expected.predict_proba(values.numpy()), abs=1e-12)


def test_a_row_that_becomes_all_zero_keeps_its_probabilities():
    curve = (np.array([0.0, 0.5, 0.6, 1.0]), np.array([0.0, 0.0, 0.4, 1.0]))
    result = ev.IsotonicCalibration((curve,) * 3, "s", 1)
    probs = torch.tensor([[0.4, 0.3, 0.3], [0.6, 0.3, 0.1]], dtype=torch.float64)
    torch.testing.assert_close(result(probs), torch.tensor([[0.4, 0.3, 0.3], [1.0, 0.0, 0.0]], dtype=torch.float64))


def test_numpy_float32_and_bfloat16_are_taken():
    probs, targets = random_case(200, 4)
    for fit in MAPS:
        expected = fit.fit(probs, targets)(probs)
        assert torch.equal(fit.fit(probs.numpy(), targets.numpy())(probs.numpy()), expected)
        coarse = fit.fit(probs.bfloat16(), targets)(probs.bfloat16())
        torch.testing.assert_close(coarse.sum(dim=1), torch.ones(200, dtype=torch.float64), rtol=0, atol=1e-12)


def test_each_says_what_it_is_and_where_it_was_fitted():
    probs, targets = random_case(1200, 3)
    sharp = (2 * probs.log()).softmax(dim=1)
    result = [fit.fit(sharp, targets, split="validation") for fit in MAPS]
    assert [(map_.split, map_.num_examples) for map_ in result] == [("validation", 1200)] * 3
    patterns = (
        r"Temperature scaling, WHERE: T = [12]\.\d{3}, which makes predictions less sure\.",
        r"Vector scaling, WHERE: scales from 0\.\d\d to 0\.\d\d, biases from −0\.\d\d to 0\.\d\d\.",
        r"Isotonic calibration, WHERE: a rising curve for each class\.",
    )
    for map_, pattern in zip(result, patterns, strict=True):
        assert re.fullmatch(pattern.replace("WHERE", "fitted on “validation”, 1,200 examples"), map_.describe())
    assert ev.TemperatureScaling(0.5, "a", 1).describe().endswith("T = 0.500, which makes predictions surer.")
    assert ev.TemperatureScaling(1.0, "a", 1).describe().endswith("T = 1.000, which changes nothing.")


@pytest.mark.parametrize("fit", MAPS)
def test_section_holds_the_scores_afterwards(fit):
    probs, targets = random_case(2000, 4)
    sharp = (2 * probs.log()).softmax(dim=1)
    half = slice(0, 1000), slice(1000, 2000)
    result = fit.fit(sharp[half[0]], targets[half[0]])
    section = recalibration_section(sharp[half[1]], targets[half[1]], result, None, NullSettings(15, 100, 0))
    after, labels = result(sharp[half[1]]), targets[half[1]]
    assert section.scores["recalibrated_accuracy"].value == ev.accuracy(after, labels)
    nll = section.scores["recalibrated_nll"].value
    assert nll == ev.negative_log_likelihood(after, labels)
    assert section.scores["recalibrated_brier"].value == pytest.approx(ev.brier_score(after, labels))
    ece = ev.calibration_test(after, labels, num_simulations=100)
    assert section.scores["recalibrated_ece"] == ece.score()
    assert section.sizes == {"examples of the recalibration, “calibration”": 1000}
    before = ev.negative_log_likelihood(sharp[half[1]], labels)
    if math.isfinite(nll):
        change = section.scores["recalibrated_nll_change"]
        assert change.value == pytest.approx(nll - before)
        assert change.interval.low < change.value < change.interval.high < 0
        assert f"The log loss here falls by {-change.value:.3f} nats (0." in section.verdict[0]
    else:
        assert fit is ev.IsotonicCalibration
        assert "A label here gets probability zero" in section.verdict[0]
    assert section.verdict[0].startswith(result.describe())
    assert (
        f"ECE changes from {ev.expected_calibration_error(sharp[half[1]], labels):.3f} to {ece.value:.3f}"
        in section.verdict[0]
    )


@pytest.mark.parametrize(
    ("temperature", "said"),
    [(3.0, "The log loss here rises by 0."), (1.001, "The log loss here does not clearly change (")],
)
def test_a_recalibration_that_does_not_help_is_said(temperature, said):
    probs, targets = random_case(300, 4)
    section = recalibration_section(
        probs, targets, ev.TemperatureScaling(temperature, "elsewhere", 10), None, NullSettings(15, 100, 0)
    )
    assert said in section.verdict[0]


def test_section_where_the_loss_was_or_is_infinite():
    probs = torch.tensor([[1.0, 0.0], [0.8, 0.2]] * 10)
    targets = torch.tensor([1, 0] + [0] * 18)
    chance = NullSettings(15, 39, 0)
    finite = recalibration_section(probs, targets, ev.TemperatureScaling.fit(probs, targets), None, chance)
    assert "The log loss here, infinite before, is " in finite.verdict[0]
    assert "recalibrated_nll_change" not in finite.scores
    curve = (np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    infinite = recalibration_section(probs, targets, ev.IsotonicCalibration((curve,) * 2, "s", 20), None, chance)
    assert infinite.scores["recalibrated_nll"].value == math.inf
    assert "so the log loss is infinite; ECE changes from" in infinite.verdict[0]


def test_bad_input_is_refused():
    probs, targets = random_case(20, 3)
    for fit in MAPS:
        with pytest.raises(ValueError, match=r"^`targets` must lie in 0\.\.2, got values in 3\.\.3\.$"):
            fit.fit(probs, torch.full((20,), 3))
        with pytest.raises(ValueError, match=r"^`probs` must sum to one in every row"):
            fit.fit(2 * probs, targets)
    for fit in (ev.VectorScaling, ev.IsotonicCalibration):
        with pytest.raises(ValueError, match=r"^`probs` must have the 3 classes of the fit, got 2\.$"):
            fit.fit(probs, targets)(torch.full((1, 2), 0.5))
    with pytest.raises(ValueError, match=r"^`penalty` must be finite and not negative, got -1\.0\.$"):
        ev.VectorScaling.fit(probs, targets, penalty=-1.0)
