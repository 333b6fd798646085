"""Verdicts: false alarms of calibrated models, power where they give an all-clear, and what few examples say."""

import math
import re

import numpy as np
import pytest
import torch

from bayes_kf import evaluation as ev
from bayes_kf.evaluation.calibration.confidence_profile import exact_profile
from bayes_kf.evaluation.calibration.null_distribution import profile_tests
from bayes_kf.evaluation.calibration.score_summary import PRIMARY
from bayes_kf.evaluation.report.score_table import score_table
from bayes_kf.evaluation.resampling.null_test import NullSettings
from bayes_kf.evaluation.score import Score
from bayes_kf.evaluation.sections.verdicts.calibration import calibration_verdict, detectable_error

REPEATS = 120


def said(confidence: np.ndarray, hits: np.ndarray, seed: int) -> str:
    """The verdict on top-label confidences, with 99 simulated data sets."""
    profile = exact_profile(torch.from_numpy(confidence), torch.from_numpy(hits))
    gap, smooth = profile_tests(
        profile, (("gap", "equal_width"), ("smooth", "equal_width")), NullSettings(15, 99, seed), 0.95
    )
    scores = {"confidence": Score(confidence.mean()), "confidence_gap": gap.score(), PRIMARY: smooth.score()}
    return calibration_verdict(scores, len(hits))


@pytest.mark.parametrize(("size", "least"), [(20, 0.5), (200, 0.95), (300, 0.3)])
def test_a_calibrated_model_is_called_miscalibrated_in_five_per_cent_of_data_sets(size, least):
    """Confidences uniform above `least`; the band is two-sided, and three standard errors of 120 are 6.0 %."""
    alarms = 0
    for seed in range(REPEATS):
        rng = np.random.default_rng(seed)
        confidence = least + (1 - least) * rng.random(size)
        text = said(confidence, (rng.random(size) < confidence).astype(float), seed)
        alarms += text.startswith("Miscalibrated") or "are the targets independent" in text
    assert alarms / REPEATS <= 0.05 + 3 * (0.05 * 0.95 / REPEATS) ** 0.5


@pytest.mark.parametrize(("size", "shift"), [(320, 0.1), (320, -0.1)])
def test_an_error_that_would_be_seen_is_seen_in_four_of_five_data_sets(size, shift):
    """An all-clear is given only to sizes that show an error of 0.1: here it is there, over all confidences."""
    seen = 0
    grid = np.linspace(0.6, 0.9, size)
    assert detectable_error(0.07, grid.mean(), size) < 0.1  # the band ends below 0.07 here: no "Too few"
    for seed in range(60):
        rng = np.random.default_rng(seed)
        confidence = 0.6 + 0.3 * rng.random(size)
        seen += said(confidence, (rng.random(size) < confidence - shift).astype(float), seed).startswith("Miscal")
    assert seen / 60 >= 0.8 - 3 * (0.8 * 0.2 / 60) ** 0.5


def test_the_number_that_would_do_does():
    """Of 40 the verdict asks for about N; a data set of N is not too few any more, one of N/3 is."""
    rng = np.random.default_rng(0)

    def verdict(size):
        confidence = 0.6 + 0.3 * rng.random(size)
        return said(confidence, (rng.random(size) < confidence).astype(float), 0)

    needed = int(re.search(r"About ([\d,]+) targets would", verdict(40)).group(1).replace(",", ""))
    assert 100 <= needed <= 400
    assert verdict(needed // 3).startswith("Too few examples to tell whether the model is calibrated")
    assert not verdict(int(1.3 * needed)).startswith("Too few")


@pytest.mark.parametrize(
    ("probs", "targets"), [([[0.6, 0.4], [0.7, 0.3], [0.8, 0.2]], [0, 1, 1]), (np.eye(3).tolist(), [0, 1, 2])]
)
def test_three_examples_are_too_few_to_tell(probs, targets):
    report = ev.evaluate_predictions(np.array(probs), np.array(targets), num_simulations=39)
    assert report.sections.verdict[0].startswith("Too few examples to tell whether the model is calibrated: ")
    assert re.search(
        r"About \d+ targets would detect an error of 0\.1 in four of five data sets\.$", report.sections.verdict[0]
    )
    text = " ".join(report.sections.verdict)
    assert "No miscalibration detected" not in text
    assert "100.0 % (100.0 % to 100.0 %)" not in text
    assert report.scores["accuracy_high"] - report.scores["accuracy_low"] > 0.7


def test_sure_examples_without_an_error_are_no_all_clear_if_they_are_few():
    """Their null band is a point at zero. An error rate of 0.1 leaves 10 examples without one in 35 % of data sets."""
    sure = said(np.ones(10), np.ones(10), 0)
    assert sure.startswith("Too few")
    assert said(np.ones(60), np.ones(60), 0).startswith("No miscalibration detected")
    assert detectable_error(0.0, 1.0, 3) == pytest.approx(1 - 0.2 ** (1 / 3))
    assert detectable_error(0.0, 1.0, 10_000) < 0.01


def test_only_the_tested_score_is_bold_and_only_where_the_verdict_says_so():
    """Of 30 calibrated data sets 5 % have a bold score; of their seven errors some is outside in 14 to 25 %."""
    bold = outside = 0
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        logits = 2 * torch.randn(100, 3, generator=generator, dtype=torch.float64)
        targets = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
        report = ev.evaluate_predictions(logits.softmax(1), targets, num_simulations=79, seed=seed)
        marked = [
            row
            for group in score_table(report.sections.scores, report.sections.tested).groups
            for row in group.rows
            if row[1].is_outside
        ]
        text = report.sections.verdict[0]
        assert len(marked) == (text.startswith("Miscalibrated") or "are the targets independent" in text)
        bold += len(marked)
        outside += any(score.null_position > 0 for score in report.sections.scores.values())
    assert bold <= 6  # binomial with 30 and 5 %: more in 0.1 %
    assert outside > bold


def test_verdicts_on_confidence_and_coverage_give_numbers_and_no_words():
    rng = np.random.default_rng(0)
    confidence = np.full(500, 0.9)
    probs = np.stack([confidence, 1 - confidence], 1)
    report = ev.evaluate_predictions(probs, (rng.random(500) > 0.6).astype(int), num_simulations=39)
    assert report.sections.verdict[0].startswith("Miscalibrated, over-confident on average: ")
    assert re.match(r"Mean confidence is 90\.0 %, accuracy \d\d\.\d %: a difference of \+", report.sections.verdict[1])
    wide = ev.evaluate_regression(np.zeros(400), 3 * rng.normal(size=400), variance=np.ones(400), num_simulations=39)
    coverage = [text for text in wide.sections.verdict if re.match(r"The \d\d % intervals contain", text)]
    assert len(coverage) == 3
    assert not any("too " in text for text in coverage)
    assert any("forecasts are too narrow" in text for text in wide.sections.verdict)  # the one test's


def test_intervals_of_several_ood_sets_hold_together():
    probs = torch.rand(80, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probs = probs / probs.sum(1, keepdim=True)
    targets = torch.zeros(80, dtype=torch.int64)
    one = ev.evaluate_predictions(probs, targets, ood={"a": probs[:40]}, num_simulations=39).scores
    two = ev.evaluate_predictions(probs, targets, ood={"a": probs[:40], "b": probs[40:]}, num_simulations=39).scores
    low, high = ev.detection_intervals(ev.entropy(probs), ev.entropy(probs[:40]), level=0.975).auroc
    assert (two["ood_a_auroc_low"], two["ood_a_auroc_high"]) == pytest.approx((low, high))
    assert two["ood_a_auroc_low"] < one["ood_a_auroc_low"]
    assert not any(name.endswith(("aupr_low", "fpr95_low")) for name in two)
    assert math.isfinite(two["ood_a_aupr"])


def test_few_updates_are_no_proof_of_consistency():
    """With d degrees of freedom χ²/d is up to 1 + 2.8/√d by chance: 31 of them let 1.5 be seen, and one does not."""
    for number, beginning in ((1, "Too few updates to tell"), (10, "Too few updates to tell"), (200, "The filter was")):
        history = {"innovation": torch.ones(number), "dof": torch.ones(number)}
        probs, targets = torch.full((40, 2), 0.5), torch.arange(40) % 2
        report = ev.evaluate_predictions(probs, targets, history=history, num_simulations=39)
        actual = [
            sentence
            for sentence in report.sections.verdict
            if "squared innovations are" in sentence and "times" in sentence
        ]
        assert [sentence.startswith(beginning) for sentence in actual] == [True], number
