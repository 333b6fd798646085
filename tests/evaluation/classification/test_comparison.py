"""Comparisons: coverage of the joint intervals, ties where there are ties, and bad input."""

import math

import pytest
import torch
from matplotlib.figure import Figure

from bayes_kf import evaluation as ev


def models(num_examples: int, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A calibrated model, the same sharpened, and one that knows less."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(num_examples, 4, generator=generator, dtype=torch.float64)
    targets = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    noisy = logits + 1.5 * torch.randn(num_examples, 4, generator=generator, dtype=torch.float64)
    return {"right": logits.softmax(1), "sharp": (1.7 * logits).softmax(1), "noisy": (noisy / 2).softmax(1)}, targets


def test_values_are_the_scores_and_the_ranking_is_right():
    probs, targets = models(3000, 0)
    result = ev.compare_predictions(probs, targets)
    functions = {"nll": ev.negative_log_likelihood, "brier": ev.brier_score, "accuracy": ev.accuracy}
    for score, function in functions.items():
        assert result[score].values == pytest.approx({name: function(p, targets) for name, p in probs.items()})
        for difference in result[score].differences:
            values = result[score].values
            assert difference.value == pytest.approx(values[difference.first] - values[difference.second])
    assert [rank.name for rank in result["nll"].ranking] == ["right", "sharp", "noisy"]
    assert [rank.place for rank in result["nll"].ranking] == [1, 2, 3]
    assert result["accuracy"].best == ("right", "sharp")  # sharpening changes no prediction
    assert result["accuracy"].ranking[0].tied_with == ("sharp",)
    assert result["accuracy"].ranking[2].place == 3


@pytest.mark.parametrize("size", [60, 400])
def test_all_intervals_cover_all_true_differences_together(size):
    """300 data sets: all nine differences are inside in at least 95 % of them, less 3.8 %."""
    probs, targets = models(300 * size, 1)
    truth = ev.compare_predictions(probs, targets)
    together = 0
    for rows in torch.arange(300 * size).view(300, size):
        result = ev.compare_predictions({name: p[rows] for name, p in probs.items()}, targets[rows])
        together += all(
            d.low <= true.value <= d.high
            for score in result
            for d, true in zip(result[score].differences, truth[score].differences, strict=True)
        )
    assert together / 300 >= 0.912


def test_models_that_are_equally_good_are_told_apart_no_more_often_than_stated():
    """Four models with errors of their own: of 18 comparisons one is clear in at most 5 % of 300 data sets of 60."""
    generator = torch.Generator().manual_seed(3)
    alarms = 0
    for _ in range(300):
        logits = 3 * torch.randn(4, 60, 3, generator=generator, dtype=torch.float64)
        targets = torch.randint(3, (60,), generator=generator)
        result = ev.compare_predictions({str(k): p for k, p in enumerate(logits.softmax(2))}, targets)
        alarms += any(d.is_clear for comparison in result.values() for d in comparison.differences)
    assert alarms / 300 < 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5


def test_calibration_errors_are_not_compared():
    probs, targets = models(100, 0)
    with pytest.raises(ValueError, match=r"^`scores` must be among nll, brier, accuracy, aurc, got ece\.$"):
        ev.compare_predictions(probs, targets, scores=["ece"])


def test_equal_models_are_tied():
    probs, targets = models(200, 2)
    result = ev.compare_predictions({"a": probs["right"], "b": probs["right"].clone()}, targets)
    for comparison in result.values():
        assert comparison.best == ("a", "b")
        assert comparison.differences == (("a", "b", 0.0, 0.0, 0.0),)


def test_small_differences_on_few_examples_are_ties_and_large_ones_on_many_are_not():
    for num_examples, best in ((30, 2), (20_000, 1)):
        probs, targets = models(num_examples, 3)
        pair = {name: probs[name] for name in ("right", "sharp")}
        assert len(ev.compare_predictions(pair, targets, scores=["nll"])["nll"].best) == best


def test_an_infinite_loss_is_worse_than_any_other_and_two_are_tied():
    sure = torch.tensor([[1.0, 0.0]] * 20)
    targets = torch.tensor([0] * 19 + [1])
    result = ev.compare_predictions({"sure": sure, "unsure": torch.full((20, 2), 0.5)}, targets)["nll"]
    assert result.values["sure"] == math.inf
    assert result.best == ("unsure",)
    both = ev.compare_predictions({"a": sure, "b": sure, "c": torch.full((20, 2), 0.5)}, targets)["nll"]
    assert [rank.place for rank in both.ranking] == [1, 2, 2]
    assert math.isnan(both.differences[0].value)
    assert not both.differences[0].is_clear


@pytest.mark.parametrize(
    ("probs", "settings", "message"),
    [
        ({"a": torch.full((3, 2), 0.5)}, {}, r"^`probs` must hold at least two models, got 1\.$"),
        ({"a": torch.full((3, 2), 0.5), "b": torch.full((4, 2), 0.5)}, {}, r"^`targets` must have shape \(4,\)"),
        ({"a": torch.full((3, 2), 0.5), "b": torch.full((3, 2), 0.6)}, {}, r"^`probs\['b'\]` must sum to one"),
        (None, {"scores": ["nll", "auc"]}, r"^`scores` must be among nll, brier, accuracy, aurc, got auc\.$"),
        (None, {"level": 1.0}, r"^`level` must lie strictly between 0 and 1, got 1\.0\.$"),
    ],
)
def test_bad_input_is_refused(probs, settings, message):
    given = probs or {"a": torch.full((3, 2), 0.5), "b": torch.full((3, 2), 0.5)}
    with pytest.raises(ValueError, match=message):
        ev.compare_predictions(given, torch.tensor([0, 1, 0]), **settings)


def test_forest_plot_draws_points_intervals_and_what_is_not_finite():
    differences = [
        ev.Difference("a", "b", 0.2, 0.1, 0.3),
        ev.Difference("a", "c", 0.0, -0.1, 0.1),
        ev.Difference("b", "$c", math.inf, math.inf, math.inf),
    ]
    ax = ev.forest_plot(differences, label="nats", ax=Figure().subplots())
    lines = ax.get_lines()
    assert [
        line.get_xdata().tolist() if hasattr(line.get_xdata(), "tolist") else list(line.get_xdata()) for line in lines
    ] == [[0.1, 0.3], [0.2], [-0.1, 0.1], [0.0], [0, 0]]
    assert [lines[1].get_markerfacecolor(), lines[3].get_markerfacecolor()] == ["#0072B2", "white"]
    assert [text.get_text() for text in ax.texts] == ["+inf"]
    assert ax.get_xlabel() == "nats"
    with pytest.raises(ValueError, match=r"^`differences` must hold at least one, got none\.$"):
        ev.forest_plot([])


def test_online_comparison_draws_every_run():
    runs = {"a": {"correct": torch.tensor([1, 0, 1]), "log_loss": torch.tensor([1.0, 2.0, 3.0])}}
    runs["b"] = {"correct": torch.tensor([0, 0, 1]), "log_loss": torch.tensor([3.0, 1.0, 1.0])}
    ax = ev.online_comparison(runs, ax=Figure().subplots())
    assert [line.get_ydata().tolist() for line in ax.get_lines()][1] == pytest.approx([0, 0, 1 / 3])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    ax = ev.online_comparison(runs, "log_loss", window=2, ax=Figure().subplots())
    assert ax.get_lines()[0].get_ydata().tolist() == [1.5, 2.5]
    assert ax.get_lines()[0].get_xdata().tolist() == [2, 3]
    with pytest.raises(ValueError, match=r"^`histories` must hold correct for every run, got \['x'\] for 'c'\.$"):
        ev.online_comparison({"c": {"x": torch.ones(2)}})
    with pytest.raises(ValueError, match=r"^`series` must be one of correct, log_loss, got 'nll'\.$"):
        ev.online_comparison(runs, "nll")


def test_constant_predictions_do_not_widen_the_intervals_of_others():
    probs, targets = models(300, 4)
    pair = {name: probs[name] for name in ("right", "noisy")}
    even = {"a": torch.full((300, 4), 0.25), "b": torch.full((300, 6), 1 / 6).double()}  # log 4 and log 6
    alone = ev.compare_predictions(pair, targets, scores=["nll"])["nll"].differences[0]
    beside = ev.compare_predictions(pair | even, targets, scores=["nll"])["nll"].differences
    result = next(d for d in beside if (d.first, d.second) == ("right", "noisy"))
    assert alone.high - alone.low <= result.high - result.low < 2 * (alone.high - alone.low)


def test_one_example_says_nothing():
    pair = {"a": torch.tensor([[0.9, 0.1]]), "b": torch.tensor([[0.6, 0.4]])}
    result = ev.compare_predictions(pair, torch.tensor([0]))
    for comparison in result.values():
        assert comparison.best == ("a", "b")
        assert comparison.differences[0].low < comparison.differences[0].value < comparison.differences[0].high
    ev.forest_plot(result["nll"].differences, ax=Figure().subplots()).figure.canvas.draw()


@pytest.mark.parametrize("num_examples", [2, 5, 10])
def test_equally_good_models_are_clearly_different_no_more_often_than_stated_on_few_examples(num_examples):
    """300 data sets on which two models err independently: 5 % of alarms, and four standard errors."""
    generator = torch.Generator().manual_seed(5)
    clear = 0
    for _ in range(300):
        logits = torch.randn(2, num_examples, 3, generator=generator)
        targets = torch.randint(3, (num_examples,), generator=generator)
        pair = {name: values.softmax(1) for name, values in zip("ab", logits, strict=True)}
        result = ev.compare_predictions(pair, targets, scores=["brier"])["brier"]
        clear += result.differences[0].is_clear
    assert clear / 300 < 0.05 + 4 * (0.05 * 0.95 / 300) ** 0.5


def test_names_of_several_words_are_quoted_in_sentences():
    names = {"ours, T = 1": 0.9, "rank 4, T = 2": 0.5}
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(2, (400,), generator=g)
    right = torch.nn.functional.one_hot(targets, 2).double()
    probs = {name: share * right + (1 - share) * 0.5 for name, share in names.items()}
    result = ev.report_comparison(probs, targets, num_simulations=50)
    sentence = next(text for text in result.sections.verdict if text.startswith("Best in negative log-likelihood"))
    assert "likelihood: “ours, T = 1” (" in sentence
    assert "; “rank 4, T = 2” is worse by" in sentence
    assert "“ours, T = 1”: " in result.sections.drawings["reliability_ours, T = 1"].alt
