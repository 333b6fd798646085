"""Scores of selective prediction, events, quantiles and intervals, against other packages and brute force."""

import itertools

import numpy as np
import pytest
import scipy
import torch
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import mean_pinball_loss

from bayes_kf import evaluation as ev


def predictions(count=200, seed=0):
    rng = np.random.default_rng(seed)
    confidence = rng.random(count).round(2)  # with ties
    return confidence, rng.random(count) < confidence


def test_augrc_is_the_mean_number_of_undetected_errors_over_random_orders_of_ties():
    confidence, correct = np.array([0.9, 0.7, 0.7, 0.7, 0.2]), np.array([1, 0, 1, 1, 0])
    areas = []
    for order in itertools.permutations(range(5)):
        if all(confidence[a] >= confidence[b] for a, b in itertools.pairwise(order)):
            areas.append(np.cumsum(1 - correct[list(order)]).mean() / 5)
    assert ev.augrc(confidence, correct) == pytest.approx(np.mean(areas))


def test_augrc_is_a_function_of_auroc_and_accuracy():
    """Traub et al. 2024: for N to infinity (1 − AUROC) · acc · (1 − acc) + ½ (1 − acc)²."""
    confidence, correct = predictions(200_000)
    correct = torch.from_numpy(correct)
    auroc = ev.error_detection(torch.from_numpy(1 - confidence), correct).auroc
    accuracy = correct.double().mean().item()
    expected = (1 - auroc) * accuracy * (1 - accuracy) + 0.5 * (1 - accuracy) ** 2
    assert ev.augrc(confidence, correct) == pytest.approx(expected, rel=1e-4)


def test_rejection_ratio_has_its_ends():
    confidence, correct = predictions()
    assert ev.rejection_ratio(correct.astype(float), correct) == pytest.approx(1.0)
    assert ev.rejection_ratio(np.zeros(200), correct) == pytest.approx(0.0)
    assert ev.rejection_ratio(-correct.astype(float), correct) == pytest.approx(-1.0)
    assert 0 < ev.rejection_ratio(confidence, correct) < 1
    assert np.isnan(ev.rejection_ratio(confidence, np.ones(200)))


def test_out_of_distribution_inputs_count_as_errors():
    confidence, correct = predictions()
    foreign = np.random.default_rng(1).random(50)
    curve = ev.ood_risk_coverage(confidence, correct, foreign)
    both = ev.risk_coverage(np.concatenate([confidence, foreign]), np.concatenate([correct, np.zeros(50)]))
    assert torch.equal(curve.risk, both.risk)
    assert curve.risk[-1] == pytest.approx((50 + (~correct).sum()) / 250)


def test_sparsification_error_is_the_area_between_the_curves():
    rng = np.random.default_rng(0)
    variance, errors = rng.random(60), rng.random(60)

    def curve(order):
        return np.array([errors[order[: 60 - k]].mean() for k in range(60)])

    area = (curve(np.argsort(variance)) - curve(np.argsort(errors))).mean() / errors.mean()
    assert ev.sparsification_error(variance, errors) == pytest.approx(area)
    assert ev.sparsification_error(errors, errors) == 0.0


def test_corp_is_isotonic_regression_and_its_parts_add_up():
    confidence, correct = predictions()
    found = ev.corp_reliability(confidence, correct)
    expected = IsotonicRegression(out_of_bounds="clip").fit(confidence, correct).predict(confidence)
    np.testing.assert_allclose(found.calibrated, expected, atol=1e-12)
    assert found.brier == pytest.approx(((correct - confidence) ** 2).mean())
    assert found.miscalibration - found.discrimination + found.uncertainty == pytest.approx(found.brier)
    assert min(found.miscalibration, found.discrimination) >= 0
    right = ev.corp_reliability(found.calibrated, correct)
    assert right.miscalibration == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="between 0 and 1"):
        ev.corp_reliability([1.5], [1])


def test_net_benefit_is_that_of_counting():
    rng = np.random.default_rng(0)
    probs = rng.random(300).round(2)
    labels = (rng.random(300) < probs).astype(int)
    curve = ev.decision_curve(probs, labels, thresholds=[0.1, 0.25, 0.5, 0.9])
    for threshold, benefit, always in zip(*(field.tolist() for field in curve), strict=True):
        acted = probs >= threshold
        hits, alarms = (acted & (labels == 1)).sum(), (acted & (labels == 0)).sum()
        cost = threshold / (1 - threshold)
        assert benefit == pytest.approx(hits / 300 - alarms / 300 * cost)
        assert always == pytest.approx(labels.mean() - (1 - labels.mean()) * cost)
    three = torch.full((4, 3), 1 / 3)
    assert ev.decision_curve(three, torch.tensor([2, 0, 1, 2]), positive=2, thresholds=[0.2]).net_benefit.item() > 0
    with pytest.raises(ValueError, match=r"`positive` must be a class in 0\.\.2, got 3"):
        ev.decision_curve(three, torch.tensor([2, 0, 1, 2]), positive=3)
    with pytest.raises(ValueError, match="`thresholds` must lie between 0 and 1"):
        ev.decision_curve(three, torch.tensor([2, 0, 1, 2]), thresholds=[1.0])


def test_pinball_loss_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    targets, levels = rng.standard_normal(80), [0.1, 0.5, 0.8]
    quantiles = rng.standard_normal((80, 3))
    losses = [mean_pinball_loss(targets, quantiles[:, k], alpha=level) for k, level in enumerate(levels)]
    assert ev.pinball_loss(quantiles, targets, levels) == pytest.approx(np.mean(losses))
    with pytest.raises(ValueError, match=r"`quantiles` must have shape \(80, 2\)"):
        ev.pinball_loss(quantiles, targets, [0.1, 0.5])


def test_crps_of_many_quantiles_is_that_of_the_distribution():
    targets = np.random.default_rng(0).standard_normal(50)
    levels = (np.arange(2000) + 0.5) / 2000
    quantiles = np.tile(scipy.stats.norm.ppf(levels), (50, 1))
    expected = ev.crps_gaussian(torch.zeros(50), torch.ones(50), torch.from_numpy(targets))
    assert ev.crps_quantiles(quantiles, targets, levels.tolist()) == pytest.approx(expected, rel=1e-3)
    uneven = [0.05, 0.1, 0.2, 0.5, 0.7, 0.95]
    weights = np.diff([0, *((a + b) / 2 for a, b in itertools.pairwise(uneven)), 1])
    some = scipy.stats.norm.ppf(uneven) + np.zeros((50, 1))
    losses = [mean_pinball_loss(targets, some[:, k], alpha=level) for k, level in enumerate(uneven)]
    assert ev.crps_quantiles(some, targets, uneven) == pytest.approx(2 * np.dot(weights, losses))


def test_interval_score_is_that_of_uncertainty_toolbox_and_least_at_the_true_quantiles():
    toolbox = pytest.importorskip("uncertainty_toolbox", reason="needs the Python package uncertainty_toolbox")
    targets = np.random.default_rng(0).standard_normal(4000)
    zero, one = np.zeros(4000), np.ones(4000)
    expected = toolbox.interval_score(zero, one, targets, resolution=99)
    levels = np.linspace(0.01, 0.99, 99)
    ends = [scipy.stats.norm.ppf((1 + level) / 2) for level in levels]
    found = [ev.interval_score(zero - e, zero + e, targets, level=level) for e, level in zip(ends, levels, strict=True)]
    assert np.mean(found) == pytest.approx(expected, rel=1e-6)
    right, narrow, wide = (ev.interval_score(zero - e, zero + e, targets, level=0.8) for e in (1.2816, 1.0, 1.6))
    assert right < min(narrow, wide)
    with pytest.raises(ValueError, match="`high` must not be below `low`"):
        ev.interval_score(one, zero, targets, level=0.8)


@pytest.mark.parametrize("score", ["aps", "raps"])
def test_raps_covers_and_its_largest_sets_are_smaller(score):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 50, generator=generator, dtype=torch.float64)
    labels = torch.multinomial((2 * logits).softmax(1), 1, generator=generator)[:, 0]
    probs = logits.softmax(1)  # under-confident
    sets = ev.ConformalSets.fit(probs[:2000], labels[:2000], level=0.9, score=score, penalty=0.05, free=2)
    members = sets.sets(probs[2000:])
    found = ev.coverage_and_size(members, labels[2000:])
    low, high = ev.conformal_coverage_null(0.9, 2000, 2000, 0.999)
    assert low <= found.coverage <= high
    if score == "raps":
        plain = ev.ConformalSets.fit(probs[:2000], labels[:2000], level=0.9, score="aps")
        assert members.sum(1).max() < plain.sets(probs[2000:]).sum(1).max()


def test_raps_scores_are_those_of_its_equation():
    probs = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    sets = ev.ConformalSets.fit(
        probs.repeat(9, 1), torch.tensor([0, 1, 2] * 3), level=0.5, score="raps", penalty=0.1, free=1
    )
    uniform = np.random.default_rng([0, 0]).random(9)
    labels = np.array([0, 1, 2] * 3)
    before, own, extra = (
        np.array([0, 0.5, 0.8])[labels],
        np.array([0.5, 0.3, 0.2])[labels],
        np.array([0, 0.1, 0.2])[labels],
    )
    assert sets.threshold == pytest.approx(np.sort(before + uniform * own + extra)[4])
    with pytest.raises(ValueError, match="must not be negative"):
        ev.ConformalSets.fit(probs, torch.tensor([0]), score="raps", penalty=-1)
