"""Detection of errors and of foreign inputs: scikit-learn's scores, intervals and their coverage."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from bayes_kf import evaluation as ev
from bayes_kf.evaluation.calibration.rank_intervals import auroc_interval


def by_sklearn(negatives: np.ndarray, positives: np.ndarray) -> list[float]:
    """AUROC, AUPR and FPR@95; the last by its definition."""
    truth, scores = np.repeat([0, 1], [len(negatives), len(positives)]), np.r_[negatives, positives]
    threshold = max(t for t in np.unique(positives) if np.count_nonzero(positives >= t) * 20 >= 19 * len(positives))
    fpr95 = (negatives >= threshold).mean()
    assert fpr95 in roc_curve(truth, scores, drop_intermediate=False)[0]
    return [roc_auc_score(truth, scores), average_precision_score(truth, scores), fpr95]


def scores_of(sizes: tuple[int, int], levels: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Known and foreign scores, the latter higher; few levels make ties."""
    rng = np.random.default_rng(seed)
    return rng.integers(levels, size=sizes[0]) / levels, (rng.integers(levels, size=sizes[1]) + levels // 3) / levels


CASES = [((1, 1), 3), ((1, 20), 4), ((25, 1), 4), ((60, 40), 3), ((60, 40), 10**9), ((40, 100), 12)]


@pytest.mark.parametrize(("sizes", "levels"), CASES)
@pytest.mark.parametrize("seed", range(3))
def test_error_detection_is_sklearns(sizes, levels, seed):
    right, wrong = scores_of(sizes, levels, seed)
    order = np.random.default_rng(seed).permutation(sum(sizes))
    result = ev.error_detection(np.r_[right, wrong][order], np.repeat([True, False], sizes)[order])
    assert list(result) == pytest.approx(by_sklearn(right, wrong), abs=1e-12)


@pytest.mark.parametrize(("sizes", "levels"), [((60, 40), 3), ((40, 100), 10**9)])
def test_whole_weights_are_copies(sizes, levels):
    known, foreign = scores_of(sizes, levels, 0)
    numbers, more = np.arange(sizes[0]) % 4, 1 + np.arange(sizes[1]) % 3
    copied = by_sklearn(np.repeat(known, numbers), np.repeat(foreign, more))
    assert list(ev.ood_scores(known, foreign, weights_id=numbers, weights_ood=more)) == pytest.approx(copied)
    one_sided = by_sklearn(np.repeat(known, numbers), foreign)
    found = ev.ood_scores(known, foreign, weights_id=numbers)
    assert [found.auroc, found.fpr95] == pytest.approx([one_sided[0], one_sided[2]])  # AUPR depends on the scale
    correct = np.repeat([True, False], sizes)
    both = ev.error_detection(np.r_[known, foreign], correct, weights=np.r_[numbers, more])
    assert list(both) == pytest.approx(copied)


@pytest.mark.parametrize("seed", range(20))
def test_equal_weights_change_nothing_and_their_scale_does_not_count(seed):
    known, foreign = scores_of((100, 100), 10**9, seed)
    plain = list(ev.ood_scores(known, foreign))
    third = np.full(100, 1 / 3)
    assert list(ev.ood_scores(known, foreign, weights_id=third, weights_ood=third)) == pytest.approx(plain, abs=1e-12)
    assert list(ev.ood_scores(known, foreign, weights_id=third)) == pytest.approx(plain, abs=1e-12)


@pytest.mark.parametrize("clustered", [False, True])
def test_weighted_intervals_hold_the_truth(clustered):
    """300 sets of 150 known and 60 foreign scores; skewed weights that go with them; clusters of two equal scores."""
    rng = np.random.default_rng(8)

    def draw(number, shift):
        scores = shift + (np.repeat(rng.normal(size=number // 2), 2) if clustered else rng.normal(size=number))
        return torch.from_numpy(scores), torch.from_numpy(np.exp(0.5 * scores + 0.7 * rng.normal(size=number)))

    known, foreign = draw(40_000, 0.0), draw(40_000, 1.0)
    truth = ev.ood_scores(known[0], foreign[0], weights_id=known[1], weights_ood=foreign[1]).auroc
    clusters = (torch.arange(150) // 2, 75 + torch.arange(60) // 2) if clustered else None
    inside = 0
    for _ in range(300):
        known, foreign = draw(150, 0.0), draw(60, 1.0)
        low, high = auroc_interval(known[0], foreign[0], 0.95, clusters, (known[1], foreign[1]))
        inside += low <= truth <= high
    assert inside / 300 >= 0.9


def test_nothing_wrong_or_nothing_right_is_not_defined():
    for correct in (np.ones(5), np.zeros(5)):
        assert all(math.isnan(value) for value in ev.error_detection(np.arange(5.0), correct))
        result = ev.error_detection_intervals(np.arange(5.0), correct)
        assert all(math.isnan(end) for interval in result for end in interval)


@pytest.mark.parametrize(("sizes", "levels"), CASES)
def test_the_interval_of_the_auroc_is_that_of_a_grid_search(sizes, levels):
    """All θ with (θ − A)² ≤ z² V(θ), V of Hanley and McNeil, multiplied where DeLong's variance is larger."""
    known, foreign = scores_of(sizes, levels, 0)
    low, high = ev.detection_intervals(known, foreign).auroc
    n, m = sizes
    wins = (foreign[:, None] > known) + 0.5 * (foreign[:, None] == known)  # (m, n)
    value = wins.mean()
    theta = np.linspace(0, 1, 200_001)[1:-1]

    def variance(t):
        half = (n + m) / 2 - 1
        return t * (1 - t) * (1 + half * (1 - t) / (2 - t) + half * t / (1 + t)) / (n * m)

    delong = (wins.mean(1).var(ddof=1) / m if m > 1 else 0) + (wins.mean(0).var(ddof=1) / n if n > 1 else 0)
    scale = max(1.0, delong / variance(value)) if 0 < value < 1 else 1.0
    inside = theta[(theta - value) ** 2 <= norm.ppf(0.975) ** 2 * scale * variance(theta)]
    assert low == pytest.approx(min(inside[0], value), abs=2e-5)
    assert high == pytest.approx(max(inside[-1], value), abs=2e-5)
    assert low <= ev.ood_scores(known, foreign).auroc <= high


def test_error_detection_has_the_interval_of_its_two_groups():
    right, wrong = scores_of((60, 40), 12, 0)
    order = np.random.default_rng(0).permutation(100)
    result = ev.error_detection_intervals(np.r_[right, wrong][order], np.repeat([True, False], (60, 40))[order])
    assert result == ev.detection_intervals(right, wrong)


def test_a_million_examples_have_narrow_intervals_around_the_value():
    rng = np.random.default_rng(0)
    known, foreign = rng.normal(size=500_000), rng.normal(2, size=500_000)
    low, high = ev.detection_intervals(known, foreign).auroc
    assert low < ev.ood_scores(known, foreign).auroc < high < low + 0.01


def test_levels():
    known, foreign = scores_of((80, 50), 10**9, 0)
    inner, outer = (ev.detection_intervals(known, foreign, level=level).auroc for level in (0.95, 0.99))
    assert outer.low < inner.low < inner.high < outer.high


def test_groups_that_never_mix_are_not_certain():
    """Newcombe's interval for five and five: 0.629 to 1 by the quadratic in θ at A = 1."""
    low, high = ev.detection_intervals(np.arange(5), 10 + np.arange(5)).auroc
    assert 0.5 < low < 0.75
    assert high == 1


@pytest.mark.parametrize(("known", "foreign"), [(100, 100), (27, 3), (290, 10)])
@pytest.mark.parametrize("distance", [0.0, 1.0, 2.5])
def test_intervals_hold_the_truth_of_two_gaussians(known, foreign, distance):
    """N(0, 1) and N(d, 1), AUROC Φ(d/√2); 90 % and more of 300 data sets, less three standard errors, 5.2 %.

    The bootstrap covers it in less than 80 % of data sets of 27 and 3.
    """
    auroc = norm.cdf(distance / math.sqrt(2))
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(300):
        low, high = ev.detection_intervals(rng.normal(size=known), rng.normal(distance, size=foreign)).auroc
        inside += low <= auroc <= high
    assert inside / 300 >= 0.9


BAD = [
    (
        lambda: ev.error_detection(torch.ones(2), torch.ones(3)),
        "`correct` must have shape (2,) as `uncertainty` has, got (3,).",
    ),
    (
        lambda: ev.error_detection(torch.ones(2), torch.tensor([0.5, 1])),
        "`correct` must hold zeros and ones, got values in 0.5..1.",
    ),
    (
        lambda: ev.error_detection(torch.tensor([1.0, math.nan]), torch.ones(2)),
        "`uncertainty` must be finite, got 1 bad of 2 values.",
    ),
    (
        lambda: ev.detection_intervals(torch.ones(2), torch.empty(0)),
        "`uncertainty_ood` must not be empty, got shape (0,).",
    ),
    (
        lambda: ev.detection_intervals(torch.ones(2, 2), torch.ones(2)),
        "`uncertainty_id` must be a vector, got shape (2, 2).",
    ),
    (
        lambda: ev.error_detection_intervals(torch.ones(2), torch.ones(2), level=1.0),
        "`level` must lie strictly between 0 and 1, got 1.0.",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=r"^`") as error:
        call()
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("shift", "number", "words"),
    [
        (2.0, 300, "The model is less certain of out-of-distribution inputs “far”: they have the higher entropy in"),
        (-2.0, 300, "The model is more certain of out-of-distribution inputs “far” than of in-distribution inputs: "),
        (0.0, 2000, "The model does not detect out-of-distribution inputs “far”: "),
        (0.0, 12, "It is unclear whether the model detects out-of-distribution inputs “far”: "),
    ],
)
def test_the_verdict_on_ood_inputs_says_whether_they_are_detected(shift, number, words):
    def confident(size, more, seed):
        logits = 1.0 + more + torch.randn(size, generator=torch.Generator().manual_seed(seed)).double()
        right = logits.abs().sigmoid()
        return torch.stack([right, 1 - right], 1)

    known = confident(number, 1.5, 0)
    probs = ev.evaluate_predictions(
        known, torch.zeros(number).long(), ood={"far": confident(number, 1.5 - shift, 1)}, num_simulations=50
    )
    sentence = next(text for text in probs.sections.verdict if "“far”" in text)
    assert sentence.startswith(words)
