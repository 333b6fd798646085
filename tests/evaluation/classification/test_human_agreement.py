"""Agreement with people's answers: closed forms, scipy, coverage, and CIFAR-10H."""

import math
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from real_data import real_file
from scipy.stats import entropy, pearsonr, spearmanr

from bayes_kf import evaluation as ev
from bayes_kf.evaluation.sections.human_agreement import human_section

NAMES = ("nll", "kl", "total_variation", "entropy_spearman")


def answers(size: int = 60, classes: int = 4, people: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Predictions, and the shares of a few people's answers drawn from others near them: many ties, many zeros."""
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.normal(size=(size, classes))
    shares = np.exp(logits + rng.normal(size=logits.shape))
    counts = rng.multinomial(people, shares / shares.sum(1, keepdims=True))
    probs = np.exp(logits)
    return probs / probs.sum(1, keepdims=True), counts / people


def rounded_entropy(probs: np.ndarray) -> np.ndarray:
    """Entropies in which the same numbers in another order are ties: 12 decimals of sorted rows."""
    return entropy(np.sort(probs, axis=1), axis=1).round(12)


@pytest.mark.parametrize("classes", [2, 4, 10])
def test_values_are_scipys(classes):
    probs, human = answers(classes=classes)
    result = ev.human_agreement(probs, human)
    own, theirs = rounded_entropy(probs), rounded_entropy(human)
    kl = entropy(human, probs, axis=1)
    expected = {
        "nll": (kl + theirs).mean(),
        "kl": kl.mean(),
        "total_variation": (np.abs(human - probs).sum(1) / 2).mean(),
        "entropy_spearman": spearmanr(own, theirs).statistic,
    }
    assert {name: getattr(result, name).value for name in NAMES} == pytest.approx(expected, abs=1e-12)
    assert result.entropy_pearson == pytest.approx(pearsonr(own, theirs).statistic, abs=1e-12)


def test_intervals_contain_their_values():
    for size in (10, 60):
        result = ev.human_agreement(*answers(size))
        for name in ("total_variation", "entropy_spearman"):
            value, low, high = getattr(result, name)
            assert low < value < high
    for value, low, high in (result.nll, result.kl):
        assert low < value < high
    assert math.isnan(ev.human_agreement(*answers(40)).nll.low)  # too few log losses


def test_people_themselves_agree_with_themselves():
    _, human = answers()
    result = ev.human_agreement(human, human)
    assert result.kl[:2] == result.total_variation[:2] == (0, 0)
    assert 0.02 < result.total_variation.high < 0.1  # 60 examples do not exclude a few of full distance
    assert result.entropy_spearman.value == result.entropy_pearson == pytest.approx(1)
    assert 0.9 < result.entropy_spearman.low < result.entropy_spearman.high == 1
    assert result.nll.value == pytest.approx(ev.entropy(human).mean().item())


def test_one_person_is_a_label():
    probs, _ = answers()
    labels = np.random.default_rng(1).integers(4, size=60)
    result = ev.human_agreement(probs, np.eye(4)[labels])
    assert result.nll.value == pytest.approx(ev.negative_log_likelihood(probs, labels), abs=1e-12)
    assert result.kl == result.nll
    assert all(math.isnan(value) for value in (*result.entropy_spearman, result.entropy_pearson))


def test_an_answer_of_probability_zero_costs_infinitely_much():
    probs, human = np.array([[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]]), np.array([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]])
    result = ev.human_agreement(probs, human)
    assert result.nll.value == result.kl.value == math.inf
    assert math.isnan(result.nll.low)
    assert result.total_variation.value == pytest.approx(1 / 6)


def test_one_example_has_no_correlation():
    result = ev.human_agreement(np.array([[0.5, 0.5]]), np.array([[0.25, 0.75]]))
    assert result.total_variation.value == pytest.approx(0.25)
    assert (result.total_variation.low, result.total_variation.high) == pytest.approx((0, 1), abs=0.05)
    assert all(math.isnan(value) for value in (*result.entropy_spearman, result.entropy_pearson))


def test_three_examples_have_a_correlation_but_no_interval():
    probs = np.array([[0.5, 0.5], [0.6, 0.4], [0.9, 0.1]])
    result = ev.human_agreement(probs, probs)
    assert result.entropy_spearman.value == pytest.approx(1)
    assert math.isnan(result.entropy_spearman.low)
    assert (
        human_section(probs, probs)
        .verdict[1]
        .startswith("Too few examples to tell whether the model is uncertain where people are")
    )


@pytest.mark.parametrize("size", [30, 100])
def test_intervals_hold_the_truth_as_often_as_they_say(size):
    """What 400 × N examples have is taken as the truth for 400 sets of N; four standard errors are 4.4 %."""
    probs, human = answers(400 * size, people=20, seed=5)
    whole = ev.human_agreement(probs, human)
    inside = np.zeros(3)
    for part in np.arange(400 * size).reshape(400, size):
        result = ev.human_agreement(probs[part], human[part])
        for k, name in enumerate(("total_variation", "entropy_spearman", "kl")):
            low, high = getattr(result, name)[1:]
            inside[k] += low <= getattr(whole, name).value <= high or math.isnan(low)
    assert inside.min() / 400 >= 0.906


def test_section_holds_scores_verdicts_figure_and_table():
    probs, human = answers(500)
    result, section = ev.human_agreement(probs, human), human_section(probs, human)
    names = {"nll": "nll", "kl": "kl", "tv": "total_variation", "entropy_spearman": "entropy_spearman"}
    for short, name in names.items():
        score = section.scores[f"human_{short}"]
        assert [score.value, *score.interval] == list(getattr(result, name))
    nll, own, divergence = (section.scores[f"human_{name}"].value for name in ("nll", "entropy", "kl"))
    assert nll == pytest.approx(own + divergence)
    assert re.match(r"The log loss of people's answers is \d\.\d{3} nats: \d", section.verdict[0])
    assert section.verdict[1].startswith("The model is uncertain where people are (rank correlation")
    assert set(section.drawings) == {"human_entropy"}
    table = section.drawings["human_entropy"].table
    assert table is not None
    rows = table.rows
    assert [row[1].value for row in rows] == [50] * 10
    own, theirs = rounded_entropy(probs), rounded_entropy(human)
    order = np.argsort(theirs, kind="stable").reshape(10, 50)
    assert [row[2].value for row in rows] == pytest.approx(theirs[order].mean(1))
    assert [row[3].value for row in rows] == pytest.approx(own[order].mean(1))


@pytest.mark.parametrize(
    ("probs", "said"),
    [
        (np.array([[0.5, 0.5], [0.9, 0.1]] * 20), "is not defined"),
        (np.array([[0.5, 0.5]] * 20 + [[0.9, 0.1]] * 20), "most certain where people are uncertain"),
        (np.array([[0.9, 0.1], [0.5, 0.5]] * 20), "Too few examples to tell"),
        (np.array([[0.9, 0.1], [0.5, 0.5]] * 100), "No evidence that"),
    ],
)
def test_uncertainty_about_other_examples_is_said(probs, said):
    half = len(probs) // 2
    human = np.array([[1.0, 0.0]] * half + [[0.5, 0.5]] * half)
    if said == "is not defined":
        human = np.array([[1.0, 0.0]] * 40)
    assert said in human_section(probs, human).verdict[1]


def test_section_of_impossible_answers_says_so():
    section = human_section(np.array([[1.0, 0.0]] * 3), np.array([[0.5, 0.5]] * 3))
    assert section.verdict[0].startswith("At least one answer that people gave has predicted probability zero")


def test_plot_counts_examples(tmp_path):
    probs, human = answers(300)
    ax = ev.human_entropy_plot(probs, human, ax=Figure().subplots())
    cells = ax.collections[0]
    assert cells.get_array().sum() == 300
    x, y = cells.get_offsets().T
    assert (x.max(), y.max()) == (
        pytest.approx(entropy(human, axis=1).max(), abs=0.1),
        pytest.approx(entropy(probs, axis=1).max(), abs=0.1),
    )
    ax.figure.savefig(tmp_path / "plot.svg")


def test_bad_input_is_refused():
    probs, human = answers()
    with pytest.raises(ValueError, match=r"^`human` must have the shape of `probs`, \(60, 4\), got \(59, 4\)\.$"):
        ev.human_agreement(probs, human[1:])
    with pytest.raises(ValueError, match=r"^`human` must sum to one in every row, got 6 in row 0; .*divide each row"):
        ev.human_agreement(probs, 6 * human)
    with pytest.raises(ValueError, match=r"^`human` must not be negative, got -1"):
        ev.human_agreement(probs, -human)
    with pytest.raises(ValueError, match=r"^`level` must lie strictly between 0 and 1, got 1\.0\.$"):
        ev.human_agreement(probs, human, level=1.0)


@pytest.mark.real
def test_people_who_labelled_cifar10():
    """Half of the people against the other half, image by image, and the share of CIFAR-10's label in their answers."""
    with np.load(real_file("cifar10-jpeg/test.npz")) as data:
        counts, labels = data["human_counts"].astype(np.int64), data["y"].astype(np.int64)
    human = counts / counts.sum(1, keepdims=True)
    assert entropy(human, axis=1).mean() == pytest.approx(0.154, abs=5e-4)
    half = np.random.default_rng(0).multivariate_hypergeometric
    first = np.array([half(row, row.sum() // 2) for row in counts])
    second = counts - first
    probs = (first + 0.05) / (first + 0.05).sum(1, keepdims=True)  # smoothed, so that no answer is impossible
    shares = second / second.sum(1, keepdims=True)
    result = ev.human_agreement(probs, shares)
    own, theirs = rounded_entropy(probs), rounded_entropy(shares)
    assert result.nll.value == pytest.approx((entropy(shares, probs, axis=1) + theirs).mean(), abs=1e-9)
    assert result.entropy_spearman.value == pytest.approx(spearmanr(own, theirs).statistic, abs=1e-9)
    assert 0.4 < result.entropy_spearman.low < result.entropy_spearman.high < 0.9
    assert ev.accuracy(human, labels) > 0.99
    others = ev.human_agreement(probs, shares[np.random.default_rng(1).permutation(10_000)])
    assert others.entropy_spearman.low < 0 < others.entropy_spearman.high
    assert others.nll.value > 5 * result.nll.value
