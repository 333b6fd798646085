"""Scores of rows against answers by hand."""

import math

import pytest
import torch

from bayes_kf.data import uci_digits_split
from bayes_kf.models.zoo import lora_digits_vit
from benchmarks.bench.registry.problems import QualityData
from benchmarks.common.learners import Stream
from benchmarks.quality.rows import Predicted
from benchmarks.quality.split.distance import features, nearest_distance
from benchmarks.quality.split.scores import GaussianPredicted, classification_scores, regression_scores

TRAIN, REST = uci_digits_split(60)
DATA = QualityData(
    Stream(*TRAIN),
    Stream(REST.images[:50], REST.labels[:50]),
    Stream(torch.ones(30, 1, 28, 28), torch.zeros(30).long()),
)
MODEL = lora_digits_vit(rank=2)


def oracle(epistemic):
    """Confident and right on the test images, uniform on the white out-of-distribution images."""

    def predict(given):
        is_ood = given.inputs.flatten(1).min(1).values == 1
        probs = torch.full((len(given.labels), 10), 0.1, dtype=torch.float64)
        known = torch.nn.functional.one_hot(given.labels, 10).double() * 0.8 + 0.02
        probs[~is_ood] = known[~is_ood]
        return Predicted(probs, epistemic(given))

    return predict


def test_a_row_without_epistemic_entropy_has_no_scores_of_it():
    scores = classification_scores(oracle(lambda given: None), DATA, MODEL, 0)
    assert scores["accuracy"] == 1.0
    assert scores["nll"] == pytest.approx(-math.log(0.82))
    assert scores["ood_auroc"] == 1.0
    assert scores["error_auroc"] is None  # no errors
    assert scores["aurc"] == 0.0
    assert scores["ood_auroc_epistemic"] is None
    assert scores["distance_correlation"] is None
    assert {f"{name}_{severity}" for name in ("nll", "ece", "accuracy") for severity in (1, 2, 3)} <= set(scores)


def test_epistemic_entropy_that_grows_with_the_distance_has_a_correlation_of_one():
    known = features(MODEL, DATA.stream)
    scores = classification_scores(
        oracle(lambda given: nearest_distance(known, features(MODEL, given)).square()), DATA, MODEL, 0
    )
    assert scores["distance_correlation"] == 1.0
    assert scores["distance_correlation_ood"] == 1.0
    assert scores["ood_auroc_epistemic"] > 0.9


def test_what_is_not_finite_is_an_error():
    broken = lambda given: Predicted(torch.full((len(given.labels), 10), torch.nan))  # noqa: E731
    with pytest.raises(FloatingPointError, match="a probability is not finite"):
        classification_scores(broken, DATA, MODEL, 0)
    bad = GaussianPredicted(torch.zeros(2), torch.tensor([1.0, torch.inf]))
    with pytest.raises(FloatingPointError, match="a mean or variance is not finite"):
        regression_scores(bad, torch.zeros(2, 1))


def test_scores_of_a_regression_are_those_by_hand():
    mean, variance = torch.zeros(4, dtype=torch.float64), torch.full((4,), 4.0, dtype=torch.float64)
    targets = torch.tensor([[0.0], [1.0], [3.0], [-4.0]])  # in sds: 0, 0.5, 1.5, −2; half the mass within 0.674
    scores = regression_scores(GaussianPredicted(mean, variance), targets)
    assert scores["rmse"] == pytest.approx((26 / 4) ** 0.5)
    assert scores["nll"] == pytest.approx(0.5 * math.log(2 * math.pi * 4) + 26 / 4 / 8)
    assert (scores["coverage_50"], scores["coverage_90"]) == (0.5, 0.75)
