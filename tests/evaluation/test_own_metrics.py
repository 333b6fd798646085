"""A user's own metric has a row with its interval and null band, and is right where another way gives the answer."""

import pytest
import torch
from sklearn.metrics import f1_score

from bayes_kf import evaluation as ev
from bayes_kf.evaluation.own_metrics import own_scores
from bayes_kf.evaluation.resampling.null_test import NullSettings


@pytest.fixture
def registered():
    names = []

    def register(name, function, **settings):
        ev.register_metric(name, **settings)(function)
        names.append(name)

    yield register
    for name in names:
        ev.unregister_metric(name)


def case(size: int = 400, seed: int = 0, power: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    probs = (2 * torch.randn(size, 3, generator=generator)).double().softmax(dim=1)
    labels = torch.multinomial(probs, 1, generator=generator)[:, 0]
    sharp = probs.pow(power)
    return sharp / sharp.sum(dim=1, keepdim=True), labels


def brier(probs, labels):
    return probs.square().sum(dim=1) - 2 * probs.gather(1, labels[:, None])[:, 0] + 1


def macro_f1(probs, labels):
    table = torch.bincount(3 * labels + probs.argmax(dim=1), minlength=9).view(3, 3)
    return (2 * table.diag() / (table.sum(dim=0) + table.sum(dim=1)).clamp(min=1)).mean()


def test_a_mean_with_bounds_is_a_score_of_the_package(registered):
    registered("mine", brier, label="My Brier score", remark="lower is better", bounds=(0, 2))
    probs, labels = case()
    report = ev.evaluate_predictions(probs, labels)
    mine, own = report.score("mine"), report.score("brier")
    assert mine.value == pytest.approx(own.value)
    assert mine.interval == pytest.approx(own.interval)
    assert mine.null_position == 0
    assert mine.p_value > 0.05
    page = report.to_html()
    assert "My Brier score" in page
    assert "lower is better" in page
    assert report.to_pandas().loc["mine", "value"] == own.value
    with_clusters = ev.evaluate_predictions(probs, labels, clusters=torch.arange(400) // 4)
    assert with_clusters.score("mine").interval == with_clusters.score("brier").interval
    assert with_clusters.score("mine").null_band is None


def test_an_over_confident_model_leaves_the_band_of_a_loss(registered):
    registered("loss", lambda probs, labels: -probs.gather(1, labels[:, None])[:, 0].log())
    probs, labels = case(power=3.0)
    score = ev.evaluate_predictions(probs, labels).score("loss")
    assert score.null_position == 1
    assert score.p_value < 0.02
    low, high = score.interval
    assert low < score.value < high
    assert ev.evaluate_predictions(probs[:30], labels[:30]).score("loss").interval is None


def test_the_interval_of_a_single_number_covers_it(registered):
    """95 % intervals of the macro F1 of 200 examples: at least 88 of 100 cover that of 200,000."""
    registered("f1", macro_f1, label="Macro F1")
    probs, labels = case(200_000, seed=1)
    truth = f1_score(labels.numpy(), probs.argmax(dim=1).numpy(), average="macro")
    covered = outside = 0
    for seed in range(100):
        score = own_scores(*case(200, seed=100 + seed), NullSettings(num_simulations=39))["f1"]
        covered += score.interval.low <= truth <= score.interval.high
        outside += score.null_position != 0
    assert covered >= 88
    assert outside <= 14


def test_a_metric_without_a_value_has_no_interval_and_cannot_change_the_data(registered):
    registered("rare", lambda probs, labels: float("nan") if (labels == 0).sum() < 40 else 0.5)
    registered("rough", lambda probs, labels: probs.clamp_(max=0.5).sum(dim=1))
    probs, labels = case(120)
    given = probs.numpy().copy()
    report = ev.evaluate_predictions(given, labels, num_simulations=39)
    assert (given == probs.numpy()).all()
    assert report.score("rare").interval is None
    assert report.score("rare").null_band is None


def test_bad_metrics_are_refused(registered):
    probs, labels = case(20)
    for name in ("accuracy", "ood_noise_auroc", "no name"):
        with pytest.raises(ValueError, match=r"^`name` must be an identifier that is no score of this package, got"):
            ev.register_metric(name)
    with pytest.raises(ValueError, match=r"^`bounds` must be two finite numbers, the smaller first, got \(1, 0\)\.$"):
        ev.register_metric("mine", bounds=(1, 0))
    with pytest.raises(ValueError, match=r"^`name` must be that of a registered metric, got 'mine'\.$"):
        ev.unregister_metric("mine")
    registered("mine", lambda probs, labels: probs)
    with pytest.raises(
        ValueError, match=r"^The metric 'mine' must return a number or one for each of 20 examples, got"
    ):
        ev.evaluate_predictions(probs, labels)
    registered("other", brier, bounds=(0, 0.1))
    ev.unregister_metric("mine")
    ev.register_metric("mine")(lambda probs, labels: 0.0)
    with pytest.raises(ValueError, match=r"^The metric 'other' must stay in its bounds \(0, 0\.1\), got values in"):
        ev.evaluate_predictions(probs, labels)
