"""Selective prediction: all orders of small cases, resamples written out, what is drawn and what the report says."""

import itertools
import math

import numpy as np
import pytest
import torch
from evaluation_cases import random_case
from matplotlib.figure import Figure
from scipy.stats import binomtest

from bayes_kf import evaluation as ev
from bayes_kf.evaluation.score import flatten_scores
from bayes_kf.evaluation.sections.selective import usefulness_section

SIZES = (1, 2, 3, 5, 6)


def small_case(size: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidences with ties, correctness and other losses."""
    rng = np.random.default_rng([size, seed])
    return (
        rng.integers(3, size=size) / 2,
        rng.integers(2, size=size),
        rng.exponential(size=size) * rng.integers(2, size=size),
    )


def all_orders(loss: np.ndarray, confidence: np.ndarray | None = None) -> np.ndarray:
    """The curves of all orders, or of those with descending confidence, one a row."""
    curves = []
    for order in map(list, itertools.permutations(range(len(loss)))):
        if confidence is None or (np.diff(confidence[order]) <= 0).all():
            curves.append(np.cumsum(loss[order]) / np.arange(1, len(loss) + 1))
    return np.array(curves)


@pytest.mark.parametrize(("size", "seed"), list(itertools.product(SIZES, range(8))))
def test_curve_and_areas_are_means_over_all_orders(size, seed):
    confidence, correct, loss = small_case(size, seed)
    for losses, arguments in ((1 - correct, {"correct": correct}), (loss, {"loss": loss})):
        result = ev.risk_coverage(confidence, **arguments)
        expected = all_orders(losses, confidence).mean(axis=0)
        assert result.risk.numpy() == pytest.approx(expected, abs=1e-12)
        assert result.coverage.numpy() == pytest.approx(np.arange(1, size + 1) / size)
        least = all_orders(losses).mean(axis=1).min()
        assert ev.aurc(confidence, **arguments) == pytest.approx(expected.mean(), abs=1e-12)
        assert ev.excess_aurc(confidence, **arguments) == pytest.approx(expected.mean() - least, abs=1e-12)
        assert ev.best_risk_coverage(**arguments).risk.mean().item() == pytest.approx(least, abs=1e-12)


@pytest.mark.parametrize(("size", "seed"), list(itertools.product(SIZES, range(4))))
def test_accuracy_at_coverage_is_that_of_the_least_number_that_makes_the_share(size, seed):
    confidence, correct, _ = small_case(size, seed)
    coverages = (0.2, 0.5, 0.6, 0.8, 0.95, 1.0)
    result = ev.accuracy_at_coverage(confidence, correct, coverages)
    accuracy = 1 - all_orders(1 - correct, confidence).mean(axis=0)
    for share, value in zip(coverages, result.tolist(), strict=True):
        kept = next(k for k in range(1, size + 1) if k / size >= share - 1e-12)
        assert value == pytest.approx(accuracy[kept - 1], abs=1e-12)


def test_many_ties_do_not_depend_on_the_order_of_examples():
    rng = np.random.default_rng(0)
    confidence, correct = rng.integers(5, size=1000), rng.integers(2, size=1000)
    shuffled = rng.permutation(1000)
    first, second = ev.risk_coverage(confidence, correct), ev.risk_coverage(confidence[shuffled], correct[shuffled])
    torch.testing.assert_close(first.risk, second.risk, rtol=0, atol=1e-12)


def test_one_confidence_for_all_is_a_random_order():
    correct = np.array([1, 1, 1, 0])
    assert ev.risk_coverage(np.zeros(4), correct).risk.tolist() == [0.25] * 4
    assert ev.aurc(np.zeros(4), correct) == 0.25


def test_the_best_order_has_no_excess_and_the_worst_has_most():
    loss = np.random.default_rng(0).exponential(size=50)
    assert ev.excess_aurc(-loss, loss=loss) == 0
    excess = ev.excess_aurc(loss, loss=loss)
    assert all(ev.excess_aurc(np.random.default_rng(k).random(50), loss=loss) < excess for k in range(20))


def test_all_right_and_all_wrong():
    confidence = np.linspace(0, 1, 7)
    assert ev.aurc(confidence, np.ones(7)) == ev.excess_aurc(confidence, np.ones(7)) == 0
    assert ev.aurc(confidence, np.zeros(7)) == 1
    assert ev.excess_aurc(confidence, np.zeros(7)) == 0
    result = ev.selective_intervals(confidence, np.zeros(7))
    assert result.accuracy[0] == pytest.approx((0, 1 - 0.025 ** (1 / 6)), abs=1e-12)  # six of seven are kept


def test_intervals_are_scipys_of_the_predictions_that_are_kept():
    rng = np.random.default_rng(0)
    confidence, correct = rng.random(60), rng.integers(2, size=60)
    result = ev.selective_intervals(confidence, correct, (0.5, 0.9)).accuracy
    for interval, kept in zip(result, (30, 54), strict=True):
        hits = int(correct[np.argsort(-confidence)[:kept]].sum())
        assert interval == pytest.approx(binomtest(hits, kept).proportion_ci(0.95, "exact"), abs=1e-12)


@pytest.mark.parametrize(("size", "least"), [(30, 0.5), (300, 0.5), (30, 0.9)])
def test_intervals_hold_the_truth_as_often_as_they_say(size, least):
    """400 sets; the truth is that of 400,000. 90 % of them; the bootstrap had 76 % of 30 with few errors."""
    rng = np.random.default_rng(0)
    confidence = rng.random(400_000)
    correct = (rng.random(400_000) < least + (1 - least) * confidence).astype(float)
    accuracy = ev.accuracy_at_coverage(confidence, correct, (0.8,)).item()
    inside = 0
    for part in np.arange(400 * size).reshape(400, size):
        low, high = ev.selective_intervals(confidence[part], correct[part], (0.8,)).accuracy[0]
        inside += low <= accuracy <= high
    assert inside / 400 >= 0.9


def weighted_by_hand(confidence, loss, weights):
    """Coverages and risks of distinct confidences, one prediction at a time."""
    order = np.argsort(-confidence)
    kept = [order[: k + 1] for k in range(len(order))]
    return (
        np.array([weights[of].sum() / weights.sum() for of in kept]),
        np.array([np.average(loss[of], weights=weights[of]) for of in kept]),
        weights[order] / weights.sum(),
    )


def test_weighted_scores_are_those_by_hand():
    rng = np.random.default_rng(3)
    confidence, loss, weights = rng.random(40), rng.exponential(size=40), rng.exponential(size=40)
    coverage, risk, shares = weighted_by_hand(confidence, loss, weights)
    curve = ev.risk_coverage(confidence, loss=loss, weights=weights)
    assert curve.coverage.numpy() == pytest.approx(coverage)
    assert curve.risk.numpy() == pytest.approx(risk)
    area = ev.aurc(confidence, loss=loss, weights=weights)
    assert area == pytest.approx((shares * risk).sum())
    assert ev.augrc(confidence, loss=loss, weights=weights) == pytest.approx((shares * coverage * risk).sum())
    _, best, best_shares = weighted_by_hand(-loss, loss, weights)
    excess = area - (best_shares * best).sum()
    assert ev.excess_aurc(confidence, loss=loss, weights=weights) == pytest.approx(excess)
    mean = np.average(loss, weights=weights)
    assert ev.sparsification_error(-confidence, loss, weights=weights) == pytest.approx(excess / mean)
    assert ev.rejection_ratio(-loss, loss=loss, weights=weights) == pytest.approx(1.0)
    assert ev.rejection_ratio(np.zeros(40), loss=loss, weights=weights) == pytest.approx(0.0, abs=1e-12)
    correct = (loss < 1).astype(float)
    coverage, risk, _ = weighted_by_hand(confidence, 1 - correct, weights)
    accuracies = ev.accuracy_at_coverage(confidence, correct, (0.3, 0.8, 1.0), weights=weights)
    assert accuracies.numpy() == pytest.approx([1 - risk[coverage >= c - 1e-9][0] for c in (0.3, 0.8, 1.0)])


def test_equal_weights_change_nothing_and_zero_weights_leave_out():
    rng = np.random.default_rng(4)
    confidence, loss = rng.integers(6, size=50).astype(float), rng.exponential(size=50)
    for score in (ev.aurc, ev.augrc, ev.excess_aurc, ev.rejection_ratio):
        assert score(confidence, loss=loss, weights=np.full(50, 3.0)) == pytest.approx(score(confidence, loss=loss))
        part = score(confidence[:20], loss=loss[:20])
        assert score(confidence, loss=loss, weights=np.arange(50) < 20) == pytest.approx(part)


def test_weights_of_ties_do_not_depend_on_the_order_of_examples():
    rng = np.random.default_rng(5)
    confidence, loss, weights = rng.integers(5, size=200), rng.exponential(size=200), rng.exponential(size=200)
    shuffled = rng.permutation(200)
    first = ev.aurc(confidence, loss=loss, weights=weights)
    assert ev.aurc(confidence[shuffled], loss=loss[shuffled], weights=weights[shuffled]) == pytest.approx(first)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0]])
def test_weights_that_do_not_fit_are_named(weights):
    for score in (ev.aurc, ev.error_detection):
        with pytest.raises(ValueError, match=r"^`weights` must"):
            score([0.9, 0.8, 0.7], [1, 1, 0], weights=weights)


def test_confidences_per_example():
    probs, _ = random_case(40, 4)
    ordered = np.sort(probs.numpy(), axis=1)
    assert ev.max_probability(probs).numpy() == pytest.approx(ordered[:, -1])
    assert ev.margin(probs).numpy() == pytest.approx(ordered[:, -1] - ordered[:, -2], abs=1e-15)
    assert ev.margin(np.array([[0.5, 0.5], [1.0, 0.0]])).tolist() == [0, 1]
    assert ev.max_probability(torch.tensor([[0.25, 0.75]], dtype=torch.float16)).dtype == torch.float64


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_energy_is_the_free_energy(temperature):
    logits = np.random.default_rng(0).normal(size=(30, 5))
    expected = -temperature * np.log(np.exp(logits / temperature).sum(axis=1))
    assert ev.energy(logits, temperature).numpy() == pytest.approx(expected, abs=1e-12)
    shifted = ev.energy(logits + 1e5, temperature).numpy()  # no overflow
    assert shifted == pytest.approx(expected - 1e5, abs=1e-9)


def test_two_classes_rank_alike_by_entropy_confidence_and_margin():
    probs, _ = random_case(100, 2)
    by_entropy = ev.entropy(probs).argsort()
    assert torch.equal(ev.max_probability(probs).argsort(descending=True), by_entropy)
    assert torch.equal(ev.margin(probs).argsort(descending=True), by_entropy)


def test_plot_draws_curves_over_their_best_orders():
    probs, targets = random_case(300, 4)
    confidence, correct = probs.max(dim=1).values, probs.argmax(dim=1) == targets
    ax = ev.risk_coverage_plot({"a": (confidence, correct), "$b$": (-confidence, correct)}, ax=Figure().subplots())
    curve, best = ev.risk_coverage(confidence, correct), ev.best_risk_coverage(correct)
    lines = ax.get_lines()
    assert lines[0].get_xdata() == pytest.approx(curve.coverage.numpy())
    assert lines[0].get_ydata() == pytest.approx(curve.risk.numpy())
    assert lines[1].get_ydata() == pytest.approx(ev.risk_coverage(-confidence, correct).risk.numpy())
    assert lines[0].get_linestyle() != lines[1].get_linestyle()
    assert [line.get_ydata() == pytest.approx(best.risk.numpy()) for line in lines[2:]] == [True, True]
    names = ax.get_legend_handles_labels()[1]
    assert names == [
        f"a: AURC {ev.aurc(confidence, correct):.3f}",
        rf"\$b\$: AURC {ev.aurc(-confidence, correct):.3f}",
        "best possible order",
    ]
    ax.figure.canvas.draw()


def test_plot_of_many_predictions_is_thinned_to_its_ends():
    rng = np.random.default_rng(0)
    confidence, correct = rng.random(10_000), rng.integers(2, size=10_000)
    line = ev.risk_coverage_plot((confidence, correct), ax=Figure().subplots()).get_lines()[0]
    risk = ev.risk_coverage(confidence, correct).risk
    assert len(line.get_xdata()) == 500
    assert line.get_ydata()[[0, -1]].tolist() == risk[[0, -1]].tolist()
    assert line.get_xdata()[[0, -1]].tolist() == [1e-4, 1]


@pytest.mark.parametrize("num_classes", [2, 5])
def test_section_holds_scores_verdicts_figure_and_table(num_classes):
    probs, targets = random_case(400, num_classes, seed=1)
    correct, confidence = probs.argmax(dim=1) == targets, ev.max_probability(probs)
    section = usefulness_section(probs, targets)
    intervals = ev.selective_intervals(confidence, correct)
    scores = flatten_scores(section.scores)
    assert scores["aurc"] == ev.aurc(confidence, correct)
    assert not {"aurc_low", "aurc_excess_low", "error_entropy_aupr_low", "error_entropy_fpr95_low"} & set(scores)
    assert scores["aurc_excess"] == ev.excess_aurc(confidence, correct)
    kept = ev.accuracy_at_coverage(confidence, correct).tolist()
    assert [scores[f"accuracy_at_{share}"] for share in (80, 90, 95)] == kept
    assert (scores["accuracy_at_95_low"], scores["accuracy_at_95_high"]) == intervals.accuracy[2]
    result = ev.error_detection(ev.entropy(probs), correct)
    assert [scores[f"error_entropy_{name}"] for name in result._fields] == list(result)
    by_confidence = "error_confidence_auroc" in scores
    assert by_confidence == (num_classes > 2)
    if by_confidence:
        assert scores["error_confidence_auroc"] == ev.error_detection(1 - confidence, correct).auroc
    assert section.verdict[0].startswith(
        f"Without the least confident 20 % of predictions, accuracy is {100 * kept[0]:.1f} %"
    )
    assert f"in {100 * result.auroc:.1f} % (" in section.verdict[1]
    assert section.verdict[1].startswith("Uncertainty detects errors: ")
    rows = section.drawings["risk_coverage"].table.rows
    assert len(rows) == 20
    assert [cell.text for cell in rows[-1][:2]] == ["100.0 %", "400"]
    assert rows[9][2].value == ev.risk_coverage(confidence, correct).risk[199].item()
    assert set(section.drawings) == {"risk_coverage"}
    section.drawings["risk_coverage"].draw(Figure().subplots())


def test_section_where_nothing_is_wrong_says_so():
    section = usefulness_section(np.array([[0.9, 0.1]] * 3), np.array([0, 0, 0]))
    assert math.isnan(section.scores["error_entropy_auroc"].value)
    assert section.scores["error_entropy_auroc"].interval is None
    assert section.verdict[1] == "No prediction is wrong, so error detection is not defined."
    assert section.scores["aurc"].value == 0
    assert len(section.drawings["risk_coverage"].table.rows) == 3


def test_section_of_one_example():
    section = usefulness_section(np.array([[0.9, 0.1]]), np.array([1]))
    assert section.scores["aurc"].value == 1
    assert section.verdict[1] == "Every prediction is wrong, so error detection is not defined."


@pytest.mark.parametrize(
    ("probs", "targets", "word"),
    [
        ([[0.9, 0.1], [0.6, 0.4]] * 20, [1, 0] * 20, "Uncertainty is lower for errors"),
        ([[0.9, 0.1], [0.9, 0.1]] * 20, [0, 1] * 20, "Too few examples to tell whether uncertainty detects errors"),
        ([[0.9, 0.1], [0.9, 0.1]] * 80, [0, 1] * 80, "No evidence that uncertainty detects errors"),
    ],
)
def test_uncertainty_that_detects_no_errors_is_said(probs, targets, word):
    assert usefulness_section(np.array(probs), np.array(targets)).verdict[1].startswith(f"{word}: ")


def test_too_few_errors_are_not_said_to_be_detected():
    """One error in 200 is too few wherever it lies; 30 errors at the most uncertain predictions are enough."""
    sure = np.linspace(0.99, 0.51, 200)
    probs = np.stack([sure, 1 - sure], axis=1)
    for wrong in (0, 40, 160, 199):
        result = usefulness_section(probs, (np.arange(200) == wrong).astype(int)).verdict[1]
        assert result.startswith(
            "Too few examples to tell whether uncertainty detects errors: 1 wrong and 199 correct predictions"
        )
        assert result.endswith("00 examples with this share of errors would be enough.")
    result = usefulness_section(probs, (np.arange(200) >= 170).astype(int)).verdict[1]
    assert result.startswith("Uncertainty detects errors: ")


BAD = [
    (lambda: ev.risk_coverage(torch.ones(2)), "`correct` or `loss` must be given, got neither."),
    (lambda: ev.aurc(torch.ones(2), torch.ones(2), loss=torch.ones(2)), "`correct` or `loss` must be given, got both."),
    (lambda: ev.aurc(torch.ones(2), torch.tensor([1, 2])), "`correct` must hold zeros and ones, got values in 1..2."),
    (lambda: ev.aurc(torch.ones(2), torch.ones(3)), "`correct` must have shape (2,) as `confidence` has, got (3,)."),
    (lambda: ev.aurc(torch.ones(2), loss=torch.ones(3)), "`loss` must have shape (2,) as `confidence` has, got (3,)."),
    (lambda: ev.aurc(torch.ones(2), loss=torch.tensor([1.0, -1.0])), "`loss` must not be negative, got -1."),
    (
        lambda: ev.aurc(torch.ones(2), loss=torch.tensor([1.0, math.inf])),
        "`loss` must be finite, got 1 bad of 2 values.",
    ),
    (lambda: ev.aurc(torch.empty(0), torch.empty(0)), "`confidence` must not be empty, got shape (0,)."),
    (
        lambda: ev.accuracy_at_coverage(torch.ones(2), torch.ones(2), (0.0, 1.0)),
        "`coverages` must be above 0 and at most 1, got values in 0..1.",
    ),
    (
        lambda: ev.selective_intervals(torch.ones(2), torch.ones(2), level=1.0),
        "`level` must lie strictly between 0 and 1, got 1.0.",
    ),
    (lambda: ev.risk_coverage_plot({}), "`selections` must hold at least one, got none."),
    (lambda: ev.energy(torch.ones(2)), "`logits` must have shape (N, C), got (2,)."),
    (lambda: ev.energy(torch.ones(2, 2), 0.0), "`temperature` must be positive and finite, got 0.0."),
    (
        lambda: ev.margin(torch.ones(2, 2)),
        "`probs` must sum to one in every row, got 2 in row 0; pass the softmax of the logits, taken in float32, or "
        "divide each row by its sum.",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=r"^`") as error:
        call()
    assert str(error.value) == message
