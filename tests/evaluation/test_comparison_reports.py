"""Comparisons of AURC, detection, regressions and cost: right differences, and no more clear ones than by chance."""

import math

import pytest
import torch
from scipy.stats import binomtest
from torch import nn

import bayes_kf as bkf
from bayes_kf import evaluation as ev
from bayes_kf.evaluation.classification.selective import aurc_influence


def noisy(logits: torch.Tensor, generator: torch.Generator, noise: float = 0.7) -> torch.Tensor:
    return (logits + noise * torch.randn(logits.shape, generator=generator)).double().softmax(dim=1)


def test_the_influence_of_an_example_on_the_aurc_is_the_jackknifes():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(200, generator=generator, dtype=torch.float64)
    correct = torch.rand(200, generator=generator) < confidence
    influence = aurc_influence(confidence, correct)
    whole = ev.aurc(confidence, correct)
    assert float(influence.mean()) == pytest.approx(whole)
    left = [torch.arange(200) != k for k in range(200)]
    pseudo = torch.tensor([200 * whole - 199 * ev.aurc(confidence[rest], correct[rest]) for rest in left]).double()
    assert float(torch.corrcoef(torch.stack([influence, pseudo]))[0, 1]) > 0.999
    assert float(influence.std()) == pytest.approx(float(pseudo.std()), rel=0.01)


def test_ties_of_the_confidence_do_not_depend_on_the_order_of_the_examples():
    labels = torch.cat([torch.zeros(300), torch.ones(300)]).long()
    constant = torch.tensor([[0.7, 0.3]], dtype=torch.float64).repeat(600, 1)
    sure = 0.5 + 0.4 * torch.rand(600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probs = {"constant": constant, "random": torch.stack([sure, 1 - sure], dim=1)}
    comparison = ev.compare_predictions(probs, labels, scores=["aurc"])["aurc"]
    assert comparison.values["constant"] == pytest.approx(0.5)
    assert not comparison.differences[0].is_clear
    order = torch.randperm(600, generator=torch.Generator().manual_seed(1))
    shuffled = ev.compare_predictions({n: p[order] for n, p in probs.items()}, labels[order], scores=["aurc"])["aurc"]
    assert shuffled.values["constant"] == pytest.approx(0.5)


def test_few_foreign_inputs_tell_no_models_apart():
    generator = torch.Generator().manual_seed(5)
    probs = {name: noisy(torch.randn(100, 4, generator=generator), generator) for name in "ab"}
    ood = {"far": {"a": torch.eye(4)[:1], "b": torch.full((1, 4), 0.25)}}
    found = ev.compare_predictions(probs, torch.zeros(100, dtype=torch.int64), scores=["nll"], ood=ood)
    assert not found["ood_far_auroc"].differences[0].is_clear


def test_equal_models_differ_clearly_in_no_more_data_sets_than_chance_allows():
    generator = torch.Generator().manual_seed(1)
    clear = {"aurc": 0, "ood_far_auroc": 0}
    for _ in range(150):
        logits, foreign = 2 * torch.randn(150, 4, generator=generator), torch.randn(100, 4, generator=generator)
        labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
        probs = {name: noisy(logits, generator) for name in "ab"}
        ood = {"far": {name: noisy(foreign, generator) for name in "ab"}}
        found = ev.compare_predictions(probs, labels, scores=["aurc"], ood=ood, level=0.9)  # 0.95 each
        for score in clear:
            clear[score] += found[score].differences[0].is_clear
    for score, count in clear.items():
        assert binomtest(count, 150, 0.06, alternative="greater").pvalue > 0.01, score


def test_a_better_ranking_and_a_better_detector_are_found_and_stand_on_the_page():
    generator = torch.Generator().manual_seed(2)
    logits, foreign = 2 * torch.randn(800, 4, generator=generator), 0.3 * torch.randn(300, 4, generator=generator)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    probs = {"near": noisy(logits, generator, 0.1), "far": noisy(logits, generator, 2.0)}
    ood = {"noise": {"near": noisy(foreign, generator, 0.1), "far": noisy(foreign, generator, 2.0)}}
    cost = {"near": 3.0, "far": 1}
    report = ev.report_comparison(probs, labels, ood=ood, cost=cost, num_simulations=39)
    for name in probs:
        confidence, predicted = probs[name].max(dim=1)
        assert report.scores[f"{name}/aurc"] == pytest.approx(ev.aurc(confidence, predicted == labels), abs=1e-9)
        detected = ev.ood_scores(ev.entropy(probs[name]), ev.entropy(ood["noise"][name])).auroc
        assert report.scores[f"{name}/ood_noise_auroc"] == pytest.approx(detected)
    scores = "negative log-likelihood, Brier score, accuracy, AURC (ranking of errors) and detection of noise"
    assert report.headline == [f"Best in {scores}: near.", "Cost: near 3."]
    table = report.tables["Models side by side; place 1: no model is clearly better"]
    assert [column.name for column in table.columns][-2:] == ["ECE", "Cost"]
    assert [row[-1].value for row in table.rows] == [3.0, 1.0]
    page = report.to_html()
    assert "OOD “noise”: AUROC" in page
    assert "better →" in page
    with pytest.raises(ValueError, match=r"^`cost` must hold the models near, far, got near\.$"):
        ev.report_comparison(probs, labels, cost={"near": 1.0})
    with pytest.raises(ValueError, match=r"^`cost` must hold finite numbers"):
        ev.report_comparison(probs, labels, cost={"near": math.nan, "far": 1.0})
    with pytest.raises(ValueError, match=r"^`ood\['noise'\]` must hold the models near, far, got near\.$"):
        ev.report_comparison(probs, labels, ood={"noise": {"near": ood["noise"]["near"]}})
    short = {"near": ood["noise"]["near"], "far": ood["noise"]["far"][:9]}
    with pytest.raises(ValueError, match=r"^`ood\['noise'\]` must hold the same inputs for every model"):
        ev.report_comparison(probs, labels, ood={"noise": short})


@pytest.mark.parametrize("errors", ["normal", "heavy"])
def test_equal_regressions_are_seldom_told_apart(errors):
    """Of 200 data sets of two equal models, at most as many have a clear difference as chance allows."""
    generator = torch.Generator().manual_seed(3)
    clear = 0
    for _ in range(200):
        targets = torch.randn(100, generator=generator, dtype=torch.float64)
        if errors == "heavy":
            targets = targets / torch.rand(100, generator=generator, dtype=torch.float64).sqrt()
        forecasts = {
            name: {
                "mean": 0.5 * torch.randn(100, generator=generator, dtype=torch.float64),
                "variance": torch.full((100,), 1.25),
            }
            for name in "ab"
        }
        report = ev.report_forecast_comparison(forecasts, targets, num_simulations=39)
        clear += any("all are tied" not in sentence for sentence in report.headline)
    assert binomtest(clear, 200, 0.05, alternative="greater").pvalue > 0.01, clear


def test_regressions_are_compared_by_their_own_losses():
    generator = torch.Generator().manual_seed(4)
    targets = torch.randn(200, 2, generator=generator, dtype=torch.float64)
    near = {"mean": targets + 0.1, "variance": torch.full((200, 2), 0.02)}
    far = {"mean": torch.zeros(200, 2), "variance": torch.ones(200, 2)}
    report = ev.report_forecast_comparison({"near": near, "far": far}, targets)
    assert report.scores["near/mse"] == pytest.approx(0.01)
    assert report.scores["far/nll"] == pytest.approx(
        ev.gaussian_log_loss(far["mean"], far["variance"], targets), abs=1e-9
    )
    assert report.scores["far/crps"] == pytest.approx(ev.crps_gaussian(far["mean"], far["variance"], targets), abs=1e-9)
    assert report.headline == ["Best in negative log-likelihood, CRPS and squared error: near."]
    assert "near" in report.to_html()
    draws = {"mean": far["mean"], "samples": torch.randn(50, 200, 2, generator=generator)}
    mixed = ev.report_forecast_comparison({"near": near, "draws": draws}, targets)
    assert "near/crps" in mixed.scores
    assert not any("log-likelihood" in sentence for sentence in mixed.headline)
    with pytest.raises(ValueError, match=r"^`forecasts` must hold at least two models, got 1\.$"):
        ev.report_forecast_comparison({"near": near}, targets)
    with pytest.raises(ValueError, match=r"^`forecasts\['far'\]` must hold mean, and variance or samples, got sd\.$"):
        ev.report_forecast_comparison({"near": near, "far": {"sd": targets}}, targets)


def test_posteriors_of_regressions_and_their_cost_are_compared():
    torch.manual_seed(0)
    x = torch.randn(160, 3)
    y = x.sum(1, keepdim=True) + 0.3 * torch.randn(160, 1)
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 80, 8)]
    config = bkf.KalmanConfig(likelihood="gaussian", covariance="full")
    posteriors = {
        "all": bkf.fit(nn.Linear(3, 1), batches, config, progress=False),
        "first": bkf.fit(nn.Linear(3, 1), batches[:1], config, progress=False),
    }
    report = bkf.compare(posteriors, [(x[80:], y[80:])], cost={"all": 10, "first": 1})
    assert report.scores["all/mse"] < report.scores["first/mse"]
    assert math.isclose(report.scores["all/rmse"] ** 2, report.scores["all/mse"], rel_tol=1e-6)
    loss = -posteriors["all"].predict_loader([(x[80:], y[80:])]).log_prob.double().mean()
    assert report.scores["all/nll"] == pytest.approx(float(loss), rel=1e-4)
    with pytest.raises(ValueError, match=r"^`ood` must be left out for posteriors without class probabilities"):
        bkf.compare(posteriors, [(x, y)], ood={"far": x})
