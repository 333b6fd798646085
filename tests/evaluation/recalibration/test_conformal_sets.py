"""Conformal sets and intervals: MAPIE's, definitions written out, the law of coverage, and what the report says."""

import itertools
import math

import numpy as np
import pytest
import torch
from evaluation_cases import random_case
from mapie.classification import SplitConformalClassifier
from mapie.regression import SplitConformalRegressor
from scipy.stats import betabinom, binomtest, chisquare
from sklearn.datasets import make_classification, make_regression
from sklearn.linear_model import LinearRegression, LogisticRegression

from bayes_kf import evaluation as ev
from bayes_kf.evaluation.resampling.null_test import NullSettings
from bayes_kf.evaluation.sections.selective import recalibration_section

REPETITIONS = 2000


def tied_case(size: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities with ties, zeros and ones."""
    rng = np.random.default_rng([size, classes, seed])
    counts = rng.multinomial(4, np.full(classes, 1 / classes), size=size)
    return counts / 4, rng.integers(classes, size=size)


def threshold_by_hand(scores: list[float], level: str) -> float:
    """With whole numbers: the smallest score such that at least level · (n + 1) of the scores are at or below."""
    numerator, denominator = (int(part) for part in level.split("/"))
    rank = -(-numerator * (len(scores) + 1) // denominator)
    return sorted(scores)[rank - 1] if rank <= len(scores) else math.inf


def aps_by_hand(row: np.ndarray, label: int, u: float) -> float:
    """Probability of all that come before the label, the first of equals first, and u of its own."""
    before = sum(p for c, p in enumerate(row) if p > row[label] or (p == row[label] and c < label))
    return before + u * row[label]


@pytest.mark.parametrize("level", ["1/2", "3/4", "9/10", "19/20"])
@pytest.mark.parametrize(("size", "classes"), [(1, 2), (9, 3), (19, 4), (40, 6)])
@pytest.mark.parametrize("score", ["lac", "aps"])
def test_sets_by_hand(level, size, classes, score):
    share = int(level.split("/")[0]) / int(level.split("/")[1])
    probs, targets = tied_case(size, classes, 0)
    test, _ = tied_case(30, classes, 1)
    result = ev.ConformalSets.fit(probs, targets, level=share, score=score, seed=7)
    uniforms = [np.random.default_rng([7, k]).random(n) for k, n in enumerate((size, 30))]

    def score_of(row: np.ndarray, label: int, u: float) -> float:
        return 1 - row[label] if score == "lac" else aps_by_hand(row, label, u)

    scores = [score_of(row, y, u) for row, y, u in zip(probs, targets, uniforms[0], strict=True)]
    threshold = threshold_by_hand(scores, level)
    assert result.threshold == pytest.approx(threshold, abs=1e-12)
    sets = result.sets(test)
    assert sets.dtype == torch.bool
    for row, members, u in zip(test, sets.tolist(), uniforms[1], strict=True):
        assert members == [score_of(row, c, u) <= result.threshold for c in range(classes)]


class Given(np.random.RandomState):
    """A source of random numbers that gives those that it was given."""

    def __init__(self, *uniforms: np.ndarray):
        super().__init__(0)
        self.uniforms = list(uniforms)

    def uniform(self, size: tuple[int, ...]) -> np.ndarray:
        return self.uniforms.pop(0).reshape(size)


@pytest.mark.parametrize("score", ["lac", "aps"])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.97])
@pytest.mark.parametrize("seed", range(3))
def test_sets_are_mapies(score, level, seed):
    """MAPIE's uniform numbers count from the other side of the label's probability."""
    x, y = make_classification(
        900, 6, n_informative=4, n_classes=4, n_clusters_per_class=1, flip_y=0.2, random_state=seed
    )
    model = LogisticRegression().fit(x[:300], y[:300])
    probs = model.predict_proba(x)
    uniforms = [1 - np.random.default_rng([seed, k]).random(300) for k in range(2)]
    theirs = SplitConformalClassifier(
        model, confidence_level=level, conformity_score=score, random_state=Given(*uniforms)
    ).conformalize(x[300:600], y[300:600])
    options = {"include_last_label": "randomized"} if score == "aps" else None
    expected = theirs.predict_set(x[600:], conformity_score_params=options)[1][:, :, 0]
    result = ev.ConformalSets.fit(probs[300:600], y[300:600], level=level, score=score, seed=seed)
    assert np.array_equal(result.sets(probs[600:]).numpy(), expected)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.97])
def test_intervals_are_mapies(level):
    x, y = make_regression(600, 5, noise=20.0, random_state=0)
    model = LinearRegression().fit(x[:200], y[:200])
    theirs = SplitConformalRegressor(model, confidence_level=level).conformalize(x[200:400], y[200:400])
    expected = theirs.predict_interval(x[400:])[1][:, :, 0]
    result = ev.ConformalIntervals.fit(model.predict(x[200:400]), y[200:400], level=level)
    low, high = result.intervals(model.predict(x[400:]))
    assert low.numpy() == pytest.approx(expected[:, 0], abs=1e-9)
    assert high.numpy() == pytest.approx(expected[:, 1], abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_aps_is_the_generalized_inverse_quantile_of_the_paper(seed):
    """Romano et al., equations 2 to 5, with U = 1 − u: the shortest prefix that reaches τ, its last class dropped where
    U ≤ (its cumulative probability − τ)/its probability."""
    probs, _ = random_case(20, 5, seed)
    result = ev.ConformalSets.fit(*random_case(60, 5, seed + 50), level=0.8, score="aps", seed=seed)
    uniforms = np.random.default_rng([seed, 1]).random(20)
    for row, members, u in zip(probs.numpy(), result.sets(probs).numpy(), uniforms, strict=True):
        order = np.argsort(-row)
        cumulative = row[order].cumsum()
        last = int(np.argmax(cumulative >= result.threshold))
        drop = 1 - u <= (cumulative[last] - result.threshold) / row[order[last]]
        assert set(np.flatnonzero(members)) == set(order[: last + 1 - drop])


@pytest.mark.parametrize("score", ["lac", "aps"])
@pytest.mark.parametrize(("num_fitted", "level"), [(20, 0.8), (50, 0.9)])
def test_coverage_follows_its_law(score, num_fitted, level):
    """2,000 fits of a model that is wrong: the mean coverage lies in [level, level + 1/(n + 1)], and counts are
    beta-binomial."""
    num_tested = 40
    probs, targets = random_case(REPETITIONS * (num_fitted + num_tested), 4, seed=1)
    probs = (3 * probs.log() + torch.tensor([1.0, 0.0, 0.0, -1.0])).softmax(dim=1)
    counts = []
    for repetition, rows in enumerate(torch.arange(len(probs)).chunk(REPETITIONS)):
        fitted, tested = rows[:num_fitted], rows[num_fitted:]
        sets = ev.ConformalSets.fit(probs[fitted], targets[fitted], level=level, score=score, seed=repetition)
        covered = sets.sets(probs[tested])[torch.arange(num_tested), targets[tested]]
        counts.append(int(covered.sum()))
    rank = math.ceil((num_fitted + 1) * level)
    law = betabinom(num_tested, rank, num_fitted + 1 - rank)
    error = law.std() / num_tested / math.sqrt(REPETITIONS)
    assert level - 4 * error <= np.mean(counts) / num_tested <= level + 1 / (num_fitted + 1) + 4 * error
    edges = [law.ppf(q) for q in (0.05, 0.2, 0.4, 0.6, 0.8)]
    groups = np.searchsorted(edges, counts)
    cumulative = np.r_[0, law.cdf(edges), 1]
    assert chisquare(np.bincount(groups, minlength=6), REPETITIONS * np.diff(cumulative)).pvalue > 1e-3
    low, high = ev.conformal_coverage_null(level, num_fitted, num_tested)
    inside = sum(low <= count / num_tested <= high for count in counts)
    probability = law.cdf(round(high * num_tested)) - law.cdf(round(low * num_tested) - 1)
    assert abs(probability - 0.95) < 0.03
    assert binomtest(inside, REPETITIONS, probability).pvalue > 1e-3


@pytest.mark.parametrize(
    ("num_fitted", "num_tested", "level"), list(itertools.product((19, 100, 1000), (1, 50, 2000), (0.5, 0.9)))
)
def test_band_of_coverage_holds_as_near_to_its_probability_as_whole_numbers_allow(num_fitted, num_tested, level):
    low, high = (round(end * num_tested) for end in ev.conformal_coverage_null(level, num_fitted, num_tested))
    rank = math.ceil((num_fitted + 1) * level - 1e-9)
    law = betabinom(num_tested, rank, num_fitted + 1 - rank)
    below, above = law.cdf(low - 1), law.sf(high)
    assert below <= 0.025 + law.pmf(low - 1) / 2 + 1e-12
    assert above <= 0.025 + law.pmf(high + 1) / 2 + 1e-12
    assert below + law.pmf(low) / 2 >= 0.025 - 1e-12
    assert above + law.pmf(high) / 2 >= 0.025 - 1e-12


def test_ties_cover_more_not_less():
    """Every probability ½ of two classes: sets hold both or, never, none."""
    probs = torch.full((50, 2), 0.5)
    result = ev.ConformalSets.fit(probs, torch.arange(50) % 2, level=0.6)
    assert result.sets(probs).all()


@pytest.mark.parametrize("score", ["lac", "aps"])
def test_too_few_examples_give_every_class(score):
    probs, targets = random_case(8, 3)
    result = ev.ConformalSets.fit(probs, targets, level=0.9, score=score)
    assert result.threshold == math.inf
    assert result.sets(probs).all()
    assert ev.conformal_coverage_null(0.9, 8, 100) == (1, 1)
    enough = ev.ConformalSets.fit(*random_case(9, 3), level=0.9, score=score)
    assert math.isfinite(enough.threshold)


def test_sets_are_the_same_for_the_same_seed_and_the_fit_is_remembered():
    probs, targets = random_case(100, 5)
    result = ev.ConformalSets.fit(probs.numpy(), targets.numpy(), level=0.8, score="aps", split="held out", seed=3)
    assert (result.split, result.num_examples, result.num_classes) == ("held out", 100, 5)
    assert torch.equal(result.sets(probs), result.sets(probs.numpy()))
    again = ev.ConformalSets.fit(probs, targets, level=0.8, score="aps", split="held out", seed=3)
    assert again == result
    other = ev.ConformalSets.fit(probs, targets, level=0.8, score="aps", seed=4)
    assert not torch.equal(result.sets(probs), other.sets(probs))


def test_coverage_and_size_by_hand():
    sets = np.array([[True, True, False], [False, False, False], [False, False, True]])
    result = ev.coverage_and_size(sets, np.array([1, 0, 0]))
    assert result == pytest.approx((1 / 3, 1.0, 1 / 3))


@pytest.mark.parametrize("level", ["1/2", "9/10"])
@pytest.mark.parametrize("size", [1, 9, 30])
@pytest.mark.parametrize("scaled", [False, True])
def test_intervals_by_hand(level, size, scaled):
    rng = np.random.default_rng(size)
    mean, targets, scale = rng.normal(size=size), rng.normal(size=size), rng.uniform(0.5, 2, size=size)
    widths = scale if scaled else np.ones(size)
    share = int(level.split("/")[0]) / int(level.split("/")[1])
    result = ev.ConformalIntervals.fit(mean, targets, scale if scaled else None, level=share, split="s")
    threshold = threshold_by_hand((np.abs(targets - mean) / widths).tolist(), level)
    assert result.threshold == pytest.approx(threshold)
    low, high = result.intervals(mean, scale if scaled else None)
    assert low.numpy() == pytest.approx(mean - threshold * widths)
    assert high.numpy() == pytest.approx(mean + threshold * widths)
    assert (result.split, result.num_examples) == ("s", size)


def test_intervals_cover_as_they_say():
    """2,000 fits on 30 skewed errors each: coverage of one more target, binomial about ⌈31 · 0.8⌉/31."""
    rng = np.random.default_rng(0)
    mean, scale = rng.normal(size=(REPETITIONS, 31)), rng.uniform(0.5, 2, size=(REPETITIONS, 31))
    targets = mean + scale * (rng.exponential(size=mean.shape) - 0.3)
    covered = 0
    for m, s, y in zip(mean, scale, targets, strict=True):
        result = ev.ConformalIntervals.fit(m[:30], y[:30], s[:30], level=0.8)
        low, high = result.intervals(m[30:], s[30:])
        covered += low.item() <= y[30] <= high.item()
    assert binomtest(covered, REPETITIONS, 25 / 31).pvalue > 1e-3


def test_section_says_coverage_size_and_split():
    probs, targets = random_case(1500, 4)
    result = ev.ConformalSets.fit(probs[:500], targets[:500], level=0.9)
    section = recalibration_section(probs[500:], targets[500:], None, result, NullSettings(15, 100, 0))
    coverage, size, empty = ev.coverage_and_size(result.sets(probs[500:]), targets[500:])
    values = [section.scores[f"conformal_{name}"].value for name in ("coverage", "size", "empty")]
    assert values == [coverage, size, empty]
    interval = section.scores["conformal_size"].interval
    assert interval.low < size < interval.high
    null_band = section.scores["conformal_coverage"].null_band
    assert null_band == ev.conformal_coverage_null(0.9, 500, 1000) == (0.867, 0.93)
    assert section.sizes == {"examples of the conformal sets (lac), “calibration”": 500}
    assert section.verdict == [
        f"Conformal sets at 90 %, fitted on “calibration” (500 examples), contain {100 * coverage:.1f} % of the "
        f"labels, inside the null band of 86.7 % to 93.0 %. A set has {size:.2f} classes on average."
    ]


def test_sets_of_another_source_are_called_out():
    probs, targets = random_case(1000, 4)
    result = ev.ConformalSets.fit(probs, probs.argmax(dim=1), level=0.9)
    section = recalibration_section(probs, targets, None, result, NullSettings(15, 39, 0))
    assert " of the labels, below the null band of " in section.verdict[0]
    generous = ev.ConformalSets.fit(probs, targets, level=0.9)
    section = recalibration_section(probs, probs.argmax(dim=1), None, generous, NullSettings(15, 39, 0))
    assert " of the labels, above the null band of " in section.verdict[0]


def good_sets() -> ev.ConformalSets:
    return ev.ConformalSets.fit(torch.full((9, 3), 1 / 3), torch.zeros(9, dtype=torch.int64))


def good_intervals(scale: torch.Tensor | None) -> ev.ConformalIntervals:
    return ev.ConformalIntervals.fit(torch.zeros(9), torch.ones(9), scale)


BAD = [
    (
        lambda: ev.ConformalSets.fit(torch.full((1, 2), 0.5), torch.tensor([0]), level=1.0),
        "`level` must lie strictly between 0 and 1, got 1.0.",
    ),
    (
        lambda: ev.ConformalSets.fit(torch.full((1, 2), 0.5), torch.tensor([0]), score="rapss"),
        "`score` must be one of lac, aps, raps, got 'rapss'; did you mean 'raps'?",
    ),
    (lambda: good_sets().sets(torch.full((1, 2), 0.5)), "`probs` must have the 3 classes of the fit, got 2."),
    (
        lambda: ev.coverage_and_size(torch.ones(2, 2), torch.tensor([0, 1])),
        "`sets` must be a boolean (N, C), got torch.float32 of shape (2, 2).",
    ),
    (
        lambda: ev.coverage_and_size(torch.ones(2, 2, dtype=torch.bool), torch.tensor([0, 2])),
        "`targets` must lie in 0..1, got values in 0..2.",
    ),
    (lambda: ev.conformal_coverage_null(0.9, 0, 5), "`num_fitted` must be a positive integer, got 0."),
    (
        lambda: good_intervals(None).intervals(torch.zeros(2), torch.ones(2)),
        "`scale` must be left out as it was for the fit, got one.",
    ),
    (
        lambda: good_intervals(torch.ones(9)).intervals(torch.zeros(2)),
        "`scale` must be given as it was for the fit, got none.",
    ),
    (lambda: good_intervals(torch.zeros(9)), "`scale` must be positive, got 0."),
    (lambda: good_intervals(torch.ones(8)), "`scale` must have shape (9,) as `mean` has, got (8,)."),
    (
        lambda: ev.ConformalIntervals.fit(torch.zeros(9), torch.ones(8)),
        "`targets` must have shape (9,) as `mean` has, got (8,).",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=r"^`") as error:
        call()
    assert str(error.value) == message
