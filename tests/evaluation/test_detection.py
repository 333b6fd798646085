"""Detection of errors and of foreign inputs: scikit-learn's scores, also of every resampled data set, and coverage."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from bayes_kf import evaluation as ev
from bayes_kf.evaluation import resampled_cells


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
    found = ev.error_detection(np.r_[right, wrong][order], np.repeat([True, False], sizes)[order])
    assert list(found) == pytest.approx(by_sklearn(right, wrong), abs=1e-12)


def test_nothing_wrong_or_nothing_right_is_not_defined():
    for correct in (np.ones(5), np.zeros(5)):
        assert all(math.isnan(value) for value in ev.error_detection(np.arange(5.0), correct))
        found = ev.error_detection_intervals(np.arange(5.0), correct)
        assert all(math.isnan(end) for interval in found for end in interval)


@pytest.mark.parametrize(("sizes", "levels"), CASES)
def test_intervals_are_sklearns_over_resamples_written_out(sizes, levels):
    """199 resamples of either group; the 95 % ends are the fifth from either side."""
    known, foreign = scores_of(sizes, levels, 0)
    found = ev.detection_intervals(known, foreign, num_resamples=199, seed=3)
    pairs = [np.random.default_rng([3, k]).integers(size, size=(199, size)) for k, size in enumerate(sizes)]
    by_hand = np.sort([by_sklearn(known[i], foreign[j]) for i, j in zip(*pairs, strict=True)], axis=0)
    for k, interval in enumerate(found):
        assert interval == pytest.approx((by_hand[4, k], by_hand[-5, k]), abs=1e-12)


@pytest.mark.parametrize(("sizes", "levels"), [((60, 40), 3), ((60, 40), 10**9), ((30, 2), 12)])
def test_intervals_of_error_detection_are_sklearns_over_resamples_written_out(sizes, levels):
    """Examples are drawn all together; data sets without an error do not count."""
    scores, correct = np.r_[scores_of(sizes, levels, 1)], np.repeat([True, False], sizes)
    found = ev.error_detection_intervals(scores, correct, num_resamples=399, seed=3)
    drawn = np.random.default_rng([3]).integers(len(scores), size=(399, len(scores)))
    by_hand = [
        by_sklearn(scores[i[correct[i]]], scores[i[~correct[i]]]) for i in drawn if 0 < correct[i].sum() < len(i)
    ]
    assert (len(by_hand) < 399) == (sizes[1] == 2)
    outside = int(0.025 * (len(by_hand) + 1))
    ordered = np.sort(by_hand, axis=0)
    for k, interval in enumerate(found):
        assert interval == pytest.approx((ordered[outside - 1, k], ordered[-outside, k]), abs=1e-12)


def test_blocks_change_nothing(monkeypatch):
    known, foreign = scores_of((30, 50), 7, 0)
    whole = ev.detection_intervals(known, foreign, num_resamples=100)
    monkeypatch.setattr(resampled_cells, "BLOCK", 300)
    assert ev.detection_intervals(known, foreign, num_resamples=100) == whole


@pytest.mark.parametrize("levels", [40, 10**9])
def test_cells_of_many_examples_change_little(monkeypatch, levels):
    """Ends from 4,000 resamples of 3,000 examples, in 1,000 cells or not, differ by a tenth of the interval at most."""
    known, foreign = scores_of((2000, 1000), levels, 0)
    exact = ev.detection_intervals(known, foreign, num_resamples=4000)
    monkeypatch.setattr(resampled_cells, "LARGE", 500)
    monkeypatch.setattr(resampled_cells, "MOST_CELLS", 1000)
    for (low, high), found in zip(exact, ev.detection_intervals(known, foreign, num_resamples=4000), strict=True):
        assert found != (low, high)
        assert found == pytest.approx((low, high), abs=0.1 * (high - low))


def test_a_million_examples_have_narrow_intervals_around_the_value():
    rng = np.random.default_rng(0)
    known, foreign = rng.normal(size=500_000), rng.normal(2, size=500_000)
    values, found = ev.ood_scores(known, foreign), ev.detection_intervals(known, foreign, num_resamples=39)
    for value, (low, high) in zip(values, found, strict=True):
        assert low < value < high < low + 0.01


def test_seeds_and_levels():
    known, foreign = scores_of((80, 50), 10**9, 0)
    first = ev.detection_intervals(known, foreign)
    assert ev.detection_intervals(known, foreign) == first
    assert ev.detection_intervals(known, foreign, seed=1) != first
    wide = ev.detection_intervals(known, foreign, level=0.99)
    for inner, outer in zip(first, wide, strict=True):
        assert outer.low <= inner.low < inner.high <= outer.high


def test_groups_that_never_mix_are_certain():
    found = ev.detection_intervals(np.arange(5), 10 + np.arange(5))
    assert found == ((1, 1), (1, 1), (0, 0))


def test_intervals_hold_the_truth_of_two_gaussians():
    """Known inputs N(0, 1), foreign N(1, 1), 400 sets of 100 each; four standard errors of 400 are 4.4 %.

    AUROC is Φ(1/√2) and the false positive rate at the 5 % quantile of the foreign is Φ(1.645 − 1).
    """
    auroc, fpr95 = norm.cdf(1 / math.sqrt(2)), norm.sf(1 + norm.ppf(0.05))
    rng = np.random.default_rng(0)
    inside = np.zeros(2)
    for seed in range(400):
        found = ev.detection_intervals(rng.normal(size=100), rng.normal(1, size=100), num_resamples=199, seed=seed)
        inside += [found.auroc.low <= auroc <= found.auroc.high, found.fpr95.low <= fpr95 <= found.fpr95.high]
    assert inside.min() / 400 >= 0.906
    assert inside.max() / 400 <= 0.994


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
        lambda: ev.detection_intervals(torch.ones(2), torch.ones(2), num_resamples=38),
        "`num_resamples` must be at least 39 for level 0.95, got 38.",
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
        (2.0, 300, "Foreign inputs “far” have the higher entropy in"),
        (-2.0, 300, "The model is surer of foreign inputs “far” than of known ones"),
        (0.0, 2000, "The model does not notice foreign inputs “far”"),
        (0.0, 12, "Whether the model notices foreign inputs “far” cannot be seen"),
    ],
)
def test_the_verdict_on_foreign_inputs_says_whether_they_are_noticed(shift, number, words):
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
