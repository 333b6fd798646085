"""Scores, uncertainty and detection against independent implementations."""

import math

import numpy as np
import pytest
import scoringrules
import torch
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    cohen_kappa_score,
    log_loss,
    roc_auc_score,
    roc_curve,
)
from torchmetrics.functional.classification import multiclass_accuracy

from bayes_kf import evaluation as ev
from bayes_kf.evaluation.inputs import as_probs


def random_case(num_examples: int = 300, num_classes: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    probs = (2 * torch.randn(num_examples, num_classes, generator=generator, dtype=torch.float64)).softmax(dim=1)
    return probs, torch.multinomial(probs, 1, generator=generator)[:, 0]


@pytest.mark.parametrize("num_classes", [2, 3, 20])
def test_scores_equal_torchmetrics_and_sklearn(num_classes):
    probs, targets = random_case(num_classes=num_classes)
    labels = list(range(num_classes))
    accuracy = multiclass_accuracy(probs, targets, num_classes, average="micro").item()
    assert ev.accuracy(probs, targets) == pytest.approx(accuracy, abs=1e-6)
    nll = log_loss(targets, probs, labels=labels)
    assert ev.negative_log_likelihood(probs, targets) == pytest.approx(nll, abs=1e-9)
    brier = brier_score_loss(targets, probs, labels=labels, scale_by_half=False)
    assert ev.brier_score(probs, targets) == pytest.approx(brier, abs=1e-12)


def test_a_single_example_and_numpy_input_work():
    assert ev.accuracy(np.array([[0.3, 0.7]]), np.array([1])) == 1.0
    assert ev.brier_score(np.array([[0.3, 0.7]]), np.array([0])) == pytest.approx(2 * 0.49)


@pytest.mark.parametrize("num_classes", [2, 3, 8])
def test_ranked_probability_score_by_hand(num_classes):
    probs, targets = random_case(num_classes=num_classes)
    total = 0.0
    for row, target in zip(probs.numpy(), targets.numpy(), strict=True):
        total += sum((row[: k + 1].sum() - (target <= k)) ** 2 for k in range(num_classes - 1))
    assert ev.ranked_probability_score(probs, targets) == pytest.approx(total / len(targets), abs=1e-12)
    theirs = scoringrules.rps_score(targets.numpy() + 1, probs.numpy(), k_axis=-1).mean()
    assert ev.ranked_probability_score(probs, targets) == pytest.approx(theirs, abs=1e-9)
    if num_classes == 2:
        assert ev.ranked_probability_score(probs, targets) == pytest.approx(ev.brier_score(probs, targets) / 2)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_scores_of_ordered_classes_by_hand(num_classes):
    probs, targets = random_case(num_classes=num_classes)
    places = np.arange(num_classes)
    for row, target in zip(probs.numpy(), targets.numpy(), strict=True):
        error = ev.ordinal_error(row[None], target[None])
        expected = [(row * abs(places - answer)).sum() for answer in places]  # of each answer
        medians = places[expected <= min(expected) + 1e-12]
        assert error in abs(medians - target)
    mean = np.mean(
        [ev.ordinal_error(row[None], y[None]) for row, y in zip(probs.numpy(), targets.numpy(), strict=True)]
    )
    assert ev.ordinal_error(probs, targets) == pytest.approx(mean, abs=1e-12)
    theirs = cohen_kappa_score(targets, probs.argmax(1), weights="quadratic", labels=list(places))
    assert ev.weighted_kappa(probs, targets) == pytest.approx(theirs, abs=1e-12)


def test_a_median_between_two_classes_is_the_first_one():
    tied = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.4, 0.5], [0.2, 0.3, 0.5]])  # in float32 0.1 + 0.4 is above one half
    assert ev.ordinal_error(tied, torch.tensor([0, 1, 1])) == 0.0
    same = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    assert math.isnan(ev.weighted_kappa(same, torch.zeros(4, dtype=torch.long)))
    assert ev.weighted_kappa(same, torch.tensor([0, 0, 1, 1])) == 0.0


def murphy_by_hand(probs: np.ndarray, targets: np.ndarray) -> tuple[float, float, float]:
    """Murphy's three parts, a group for each distinct probability of each class, summed over the classes."""
    parts = np.zeros(3)
    for c in range(probs.shape[1]):
        hit = (targets == c).astype(float)
        parts[2] += hit.mean() * (1 - hit.mean())
        for value in np.unique(probs[:, c]):
            group = probs[:, c] == value
            parts[0] += group.mean() * (value - hit[group].mean()) ** 2
            parts[1] += group.mean() * (hit[group].mean() - hit.mean()) ** 2
    return tuple(parts)


def test_brier_decomposition_is_murphys_where_bins_hold_one_probability_each():
    generator = np.random.default_rng(0)
    probs = np.array([[0.05, 0.25, 0.7], [0.5, 0.35, 0.15], [1.0, 0.0, 0.0]])[generator.integers(3, size=400)]
    targets = generator.integers(3, size=400)
    parts = ev.brier_decomposition(probs, targets, num_bins=10)
    assert parts[1:4] == pytest.approx(murphy_by_hand(probs, targets), abs=1e-12)
    assert parts.within == pytest.approx(0, abs=1e-12)
    assert parts.brier == pytest.approx(ev.brier_score(probs, targets), abs=1e-12)


@pytest.mark.parametrize("num_bins", [1, 4, 15])
@pytest.mark.parametrize("num_examples", [1, 2, 300])
def test_brier_parts_add_up_whatever_the_bins(num_bins, num_examples):
    probs, targets = random_case(num_examples)
    brier, miscalibration, resolution, uncertainty, within = ev.brier_decomposition(probs, targets, num_bins)
    assert brier == pytest.approx(ev.brier_score(probs, targets), abs=1e-12)
    assert miscalibration - resolution + uncertainty + within == pytest.approx(brier, abs=1e-12)
    assert min(miscalibration, resolution, uncertainty) >= 0


def test_probability_zero_for_the_label_is_infinite_loss():
    probs = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert ev.negative_log_likelihood(probs, torch.tensor([0, 1])) == math.inf
    assert ev.negative_log_likelihood(probs, torch.tensor([0, 0])) == 0


def test_the_first_of_equal_probabilities_is_the_prediction():
    probs = torch.full((3, 3), 1 / 3)
    assert ev.accuracy(probs, torch.tensor([0, 1, 2])) == pytest.approx(1 / 3)


def test_inputs_are_left_as_they_are():
    probs, targets = random_case()
    before = probs.clone(), targets.clone()
    ev.evaluate_predictions(probs, targets, num_simulations=39)
    assert torch.equal(probs, before[0])
    assert torch.equal(targets, before[1])


def test_entropy_parts_add_up_and_have_the_right_sign():
    generator = torch.Generator().manual_seed(1)
    samples = (3 * torch.randn(16, 50, 7, generator=generator)).softmax(dim=-1)
    parts = ev.entropy_parts(samples)
    torch.testing.assert_close(parts.total, parts.aleatoric + parts.epistemic, rtol=0, atol=1e-12)
    torch.testing.assert_close(parts.total, torch.distributions.Categorical(samples.double().mean(0)).entropy())
    torch.testing.assert_close(ev.predictive_entropy(samples), parts.total)
    torch.testing.assert_close(ev.aleatoric_entropy(samples), ev.entropy(samples.flatten(0, 1)).view(16, 50).mean(0))
    assert (ev.epistemic_entropy(samples) > 0).all()  # the draws differ


def test_equal_draws_have_no_epistemic_entropy():
    generator = torch.Generator().manual_seed(2)
    draw = torch.randn(200, 11, generator=generator, dtype=torch.float64).softmax(dim=1)
    epistemic = ev.epistemic_entropy(draw.expand(7, 200, 11))
    assert (epistemic >= 0).all()
    assert epistemic.max() < 1e-14  # sixteen digits, less the rounding of seven additions


def test_certain_draws_that_disagree_are_all_epistemic():
    samples = torch.eye(4)[:, None, :]  # four draws, one example
    parts = ev.entropy_parts(samples)
    assert parts.aleatoric.item() == 0
    assert parts.epistemic.item() == pytest.approx(math.log(4))


def test_ood_scores_equal_sklearn_with_ties():
    rng = np.random.default_rng(0)
    known, foreign = rng.integers(0, 8, 200) / 8, rng.integers(3, 11, 120) / 8
    truth, scores = np.r_[np.zeros(200), np.ones(120)], np.r_[known, foreign]
    result = ev.ood_scores(known, foreign)
    assert result.auroc == pytest.approx(roc_auc_score(truth, scores))
    assert result.aupr == pytest.approx(average_precision_score(truth, scores))
    # by hand: the highest threshold that still flags 95 % of the foreign inputs
    threshold = max(t for t in np.unique(foreign) if (foreign >= t).mean() >= 0.95)
    assert result.fpr95 == pytest.approx((known >= threshold).mean())
    assert result.fpr95 in roc_curve(truth, scores)[0]


def test_95_percent_of_20_foreign_inputs_are_19():
    foreign = np.arange(1, 21)
    assert ev.ood_scores(np.array([1.5, 2.5, 0.0, 0.0]), foreign).fpr95 == 0.25  # flagged from 2 upwards


def test_ood_scores_of_the_same_inputs_are_chance():
    values = torch.rand(300, generator=torch.Generator().manual_seed(0))
    assert ev.ood_scores(values, values).auroc == pytest.approx(0.5)


BAD_PROBS = [
    (torch.tensor([[0.5, 0.6]]), r"`probs` must sum to one in every row, got 1\.1 in row 0; pass the softmax .*"),
    (torch.tensor([[float("nan"), 0.5]]), r"`probs` must be finite, got 1 bad of 2 values\."),
    (torch.tensor([[1.5, -0.5]]), r"`probs` must not be negative, got -0\.5; if these are logits, pass .*"),
    (
        torch.tensor([0.5, 1.5]),
        r"`probs` of one column must be probabilities of class 1 between 0 and 1, got values .*",
    ),
    (torch.tensor(0.5), r"`probs` must have shape \(N, C\) with at least two classes, got \(\)\."),
    (torch.empty(0, 3), r"`probs` must not be empty, got shape \(0, 3\)\."),
    (torch.tensor([[1j, 1.0]]), r"`probs` must hold real numbers, got torch\.complex64\."),
]


@pytest.mark.parametrize(("probs", "message"), BAD_PROBS)
def test_bad_probabilities_are_refused(probs, message):
    for score in (ev.accuracy, ev.expected_calibration_error, ev.evaluate_predictions):
        with pytest.raises(ValueError, match=f"^{message}$"):
            score(probs, torch.tensor([0]))


BAD_TARGETS = [
    (torch.tensor([0, 2]), r"`targets` must lie in 0\.\.1, got values in 0\.\.2\."),
    (torch.tensor([-1, 0]), r"`targets` must lie in 0\.\.1, got values in -1\.\.0\."),
    (torch.tensor([0]), r"`targets` must have shape \(2,\) as `probs` has, got \(1,\)\."),
    (
        torch.tensor([[0, 1], [1, 1]]),
        r"`targets` of the shape of `probs` must be one-hot: one 1 and zeros in every row\.",
    ),
    (["cat", "dog"], r"`targets` must hold class indices unless `class_names` is given, got 'cat'\."),
    (torch.tensor([0.0, 1.0]), r"`targets` must hold integer class indices, got torch\.float32\."),
]


@pytest.mark.parametrize(("targets", "message"), BAD_TARGETS)
def test_bad_targets_are_refused(targets, message):
    for score in (ev.brier_score, ev.reliability_bins, ev.calibration_test):
        with pytest.raises(ValueError, match=f"^{message}$"):
            score(torch.full((2, 2), 0.5), targets)


def test_bad_samples_are_refused():
    with pytest.raises(
        ValueError, match=r"^`samples` must have shape \(S, N, C\) with at least one draw, got \(2, 2\)"
    ):
        ev.entropy_parts(torch.full((2, 2), 0.5))
    with pytest.raises(ValueError, match=r"^`samples` must sum to one"):
        ev.entropy_parts(torch.full((2, 2, 2), 0.6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", ["none", "float32", "float64", "numpy"])
def test_softmax_in_half_precision_is_accepted_whatever_it_is_cast_to(dtype, cast):
    """Scores are those of the rows divided by their sums."""
    logits = 3 * torch.randn(500, 60, generator=torch.Generator().manual_seed(0))
    half = logits.softmax(dim=1).to(dtype)
    if dtype == torch.bfloat16:
        assert (half.double().sum(1) - 1).abs().max() > 1e-3  # or the test would show nothing
    probs = {"none": half, "float32": half.float(), "float64": half.double(), "numpy": half.float().numpy()}[cast]
    exact = half.double() / half.double().sum(1, keepdim=True)
    targets = torch.arange(500) % 60
    assert ev.brier_score(probs, targets) == pytest.approx(ev.brier_score(exact, targets), abs=1e-6)  # rows may stay so


def test_rows_that_are_no_probabilities_are_refused_with_the_cure():
    logits = 3 * torch.randn(500, 10, generator=torch.Generator().manual_seed(0))
    targets = torch.zeros(500, dtype=torch.int64)
    off = logits.softmax(dim=1) * 1.003
    with pytest.raises(
        ValueError, match=r"sum to one in every row, got 1\.003 in row \d+; pass the softmax of the logits"
    ):
        ev.brier_score(off, targets)
    with pytest.raises(ValueError, match=r"sum to one in every row, got 1\.03"):
        ev.brier_score((logits.softmax(dim=1) * 1.03).bfloat16(), targets)
    for log_probs in (logits.log_softmax(1), logits.bfloat16().log_softmax(1).float()):
        with pytest.raises(ValueError, match=r"got -.*; these look like log probabilities: pass `probs\.exp\(\)`\.$"):
            ev.brier_score(log_probs, targets)
    with pytest.raises(ValueError, match=r"got -.*; if these are logits, pass their softmax, taken in float32\.$"):
        ev.brier_score(logits, targets)


def test_rows_that_miss_one_are_divided_by_their_sum_and_others_stay():
    rough = torch.tensor([[1.0009, 0.0], [0.0, 0.9995]], dtype=torch.float64)
    assert ev.negative_log_likelihood(rough, torch.tensor([0, 1])) == 0
    assert ev.brier_score(rough, torch.tensor([0, 1])) == pytest.approx(0, abs=1e-15)
    close = torch.tensor([[1 + 5e-7, 0.0], [0.3 + 5e-7, 0.7]], dtype=torch.float64)
    assert torch.equal(as_probs(close), close)
    assert ev.negative_log_likelihood(close[:1], torch.tensor([0])) == 0
    assert ev.entropy(close[:1]).tolist() == [0.0]
