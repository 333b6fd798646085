"""From a posterior to its report: what is asked of it, and what becomes of its answers."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluation_cases import history, random_case
from torch import nn

import bayes_kf as bkf
from bayes_kf import evaluation as ev


@dataclass(frozen=True)
class Config:
    likelihood: str
    rank: int = 4


class FakePosterior:
    """Gives out the loader itself, with what was asked of it written down."""

    def __init__(self, likelihood: str, recorded: dict[str, torch.Tensor] | None = None):
        self.config = Config(likelihood)
        self.history = recorded
        self.variance = {"a": torch.ones(2)}
        self.asked: list[tuple[str, int, int]] = []

    def predict_loader(self, loader, *, method, num_samples, generator):
        self.asked.append((method, num_samples, generator.initial_seed()))
        names = ("probs", "targets", "entropy", "aleatoric", "epistemic", "log_prob", "mean", "variance", "samples")
        return SimpleNamespace(**({name: None for name in names} | loader))


def test_evaluate_passes_predictions_on():
    probs, targets = random_case()
    parts = {
        "entropy": torch.full((200,), 0.5),
        "aleatoric": torch.full((200,), 0.4),
        "epistemic": torch.full((200,), 0.1),
    }
    posterior = FakePosterior("categorical", history())
    log_prob = probs.gather(1, targets[:, None])[:, 0].log()
    known = {"probs": probs, "targets": targets, "log_prob": log_prob, **parts}
    report = ev.evaluate(posterior, known, ood={"far": {"probs": probs}}, method="probit", num_samples=5, seed=7)
    assert posterior.asked == [("probit", 5, 7)] * 2
    direct = ev.evaluate_predictions(probs, targets, ood={"far": probs}, history=history(), seed=7).scores
    same = {name for name in direct if not name.startswith(("entropy", "nll"))}
    assert {name: report.scores[name] for name in same} == {name: direct[name] for name in same}
    assert report.scores["nll"] == pytest.approx(direct["nll"])
    assert [report.scores[name] for name in parts] == pytest.approx([0.5, 0.4, 0.1])
    assert report.config["rank"] == "4"
    drawn = {"reliability", "entropy", "risk_coverage", "online", "innovation", "variance"}
    assert set(report.sections.drawings) == drawn
    assert report.fingerprints["targets"] != report.fingerprints["predictions"]


def test_everything_a_report_can_be_given():
    probs, targets = random_case()
    other_probs, other_targets = random_case(seed=1)
    shares = (torch.nn.functional.one_hot(targets, 3) * 7 + 1) / 10
    report = ev.evaluate_predictions(
        probs,
        targets,
        examples=[f"example {i}" for i in range(200)],
        human=shares,
        recalibration=ev.TemperatureScaling.fit(other_probs, other_targets, split="spring"),
        conformal=ev.ConformalSets.fit(other_probs, other_targets, level=0.8, split="spring"),
        ordered=True,
        top_k=(2,),
        output_variance={"a.weight": 0.1, "b.weight": 0.0},
        parameter_variance={"a.weight": torch.ones(3)},
        history=history(),
        num_simulations=100,
    )
    scores = report.scores
    for name, score in (
        ("rps", ev.ranked_probability_score),
        ("ordinal_error", ev.ordinal_error),
        ("weighted_kappa", ev.weighted_kappa),
    ):
        assert scores[name] == pytest.approx(score(probs, targets)), name
    assert scores["ece_top2"] == pytest.approx(ev.expected_calibration_error(probs, targets, top_k=2))
    assert scores["spiegelhalter"] == ev.spiegelhalter_test(probs, targets).statistic
    assert {"human_nll", "recalibrated_nll", "conformal_coverage", "aurc", "error_entropy_auroc"} <= set(scores)
    assert "output_variance" in report.figures
    assert all(spec.table is not None for spec in report.sections.drawings.values())
    page = report.to_html()
    for words in ("spring", "example ", "Log loss of people"):
        assert words in page
    with pytest.raises(ValueError, match=r"^`top_k` must hold integers from 2 to the number of classes, 3, got 4\.$"):
        ev.evaluate_predictions(probs, targets, top_k=(4,))


def test_the_first_batch_is_explained():
    probs, targets = random_case()

    class Explaining(FakePosterior):
        def predict_loader(self, loader, **how):
            assert list(loader) == ["first", "second"]
            return super().predict_loader({"probs": probs, "targets": targets}, **how)

        def output_variance(self, batch):
            return {str(batch): 1.0}

    report = ev.evaluate(Explaining("categorical"), iter(["first", "second"]), num_simulations=39)
    assert "first" in report.sections.drawings["output_variance"].alt


def test_several_posteriors_on_one_page():
    probs, targets = random_case()
    first, second = (FakePosterior("categorical", history()) for _ in range(2))
    known = {"probs": probs, "targets": targets}
    report = ev.compare({"a": first, "b": second, "c": probs.flip(1)}, known, num_simulations=100, method="probit")
    assert first.asked == second.asked == [("probit", 64, 0)]
    assert report.scores["a/nll"] == report.scores["b/nll"] < report.scores["c/nll"]
    assert {"online_correct", "online_log_loss", "differences_nll", "reliability_c"} <= set(report.figures)
    assert any(
        s.startswith("Best in negative log-likelihood: a") and "tied with b" in s for s in report.sections.verdict
    )
    assert "a − c" in report.to_html()
    assert all(spec.table is not None for spec in report.sections.drawings.values())
    for posteriors, loader, message in (
        ({"a": first}, known, r"^`posteriors` must hold at least two, got 1\.$"),
        ({"a": first, "b": second}, iter([]), r"^`loader` must be iterable more than once, got an iterator\.$"),
        ({"a": probs, "b": probs}, known, r"^`posteriors` must hold at least one posterior"),
        (
            {"a": first, "b": FakePosterior("gaussian")},
            {"mean": probs, "targets": targets},
            r"^`posteriors\['a'\]` must",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ev.compare(posteriors, loader)


def test_bernoulli_outputs_are_two_class_problems():
    probs, targets = torch.tensor([[0.9, 0.2], [0.6, 0.3]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    report = ev.evaluate(FakePosterior("bernoulli"), {"probs": probs, "targets": targets}, ood={"o": {"probs": probs}})
    assert report.scores["accuracy"] == 0.75
    brier = 2 * np.mean([0.1**2, 0.2**2, 0.6**2, 0.3**2])
    assert report.scores["brier"] == pytest.approx(brier, abs=1e-6)
    assert report.scores["ood_o_auroc"] == pytest.approx(0.5)
    assert report.sections.sizes["examples"] == 4
    with pytest.raises(
        ValueError, match=r"^`targets` must hold zeros and ones for Bernoulli outputs, got values up to 2"
    ):
        ev.evaluate(FakePosterior("bernoulli"), {"probs": probs, "targets": 2 * targets})


def test_regression_report():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(500, 1, generator=generator)
    targets = mean[:, 0] + torch.randn(500, generator=generator)
    prediction = {
        "mean": mean,
        "targets": targets,
        "variance": torch.full((500, 1), 0.25),
        "log_prob": -torch.ones(500),
    }
    posterior = FakePosterior("gaussian", {"log_loss": torch.rand(20, generator=generator)})
    report = ev.evaluate(posterior, prediction)
    scores = report.scores
    assert scores["nll"] == 1
    assert scores["rmse"] == pytest.approx(ev.rmse(mean[:, 0], targets))
    assert scores["coverage_95"] < scores["coverage_95_null_low"] < 0.95
    assert any(sentence.endswith("too narrow.") for sentence in report.sections.verdict)
    assert set(report.figures) == {"predictions", "coverage", "pit", "quantiles", "online", "variance"}
    assert "Coverage of 95 % intervals" in report.to_html()
    assert all(spec.table is not None for spec in report.sections.drawings.values())
    samples = mean + torch.randn(200, 500, 1, generator=generator)
    from_samples = ev.evaluate(posterior, prediction | {"samples": samples}).scores
    assert from_samples["coverage_95"] > scores["coverage_95"] + 0.2


def test_bad_posteriors_and_loaders_are_refused():
    probs, targets = random_case()
    with pytest.raises(ValueError, match=r"^`loader` must give targets, got inputs only\.$"):
        ev.evaluate(FakePosterior("categorical"), {"probs": probs})
    with pytest.raises(
        ValueError, match=r"^`ood` must be None for a posterior without class probabilities, got one\.$"
    ):
        ev.evaluate(FakePosterior("gaussian"), {"mean": probs, "targets": targets}, ood={"o": {}})
    with pytest.raises(ValueError, match=r"^`variance` or `samples` must be given .*, got neither\.$"):
        ev.evaluate(FakePosterior("gaussian"), {"mean": probs, "targets": probs})
    with pytest.raises(ValueError, match=r"^`ood\['far'\]` must be finite, got 1 bad of 2 values\.$"):
        ev.evaluate_predictions(probs, targets, ood={"far": np.array([[math.nan, 1.0]])})


def test_inputs_of_another_kind_may_be_a_tensor():
    torch.manual_seed(0)
    x, far = torch.randn(80, 3), 9 * torch.randn(30, 3)
    batches = [(x[i : i + 8], (x[i : i + 8, 0] > 0).long()) for i in range(0, 80, 8)]
    posterior = bkf.fit(nn.Linear(3, 2), batches, bkf.KalmanConfig(covariance="full"), progress=False)
    settings = {"num_simulations": 39}
    tensor = bkf.evaluate(posterior, batches, ood={"far": far}, **settings)
    assert tensor.sections.sizes["foreign examples, far"] == 30
    assert tensor.scores == bkf.evaluate(posterior, batches, ood={"far": [far]}, **settings).scores
    both = bkf.compare({"a": posterior, "b": posterior}, batches, ood={"far": far}, **settings)
    assert both.scores["a/ood_far_auroc"] == pytest.approx(tensor.scores["ood_far_auroc"], abs=0.03)  # other draws


def test_several_bernoulli_outputs_are_so_many_answers():
    torch.manual_seed(0)
    x = torch.randn(80, 3)
    y = (x @ torch.randn(3, 2) + torch.randn(80, 2) > 0).double()
    config = bkf.KalmanConfig(likelihood="bernoulli", covariance="full")
    posterior = bkf.fit(
        nn.Linear(3, 2), [(x[i : i + 8], y[i : i + 8]) for i in range(0, 80, 8)], config, progress=False
    )
    assert 0 < float((posterior.history["correct"] == 0.5).double().mean()) < 1  # one answer of two
    report = ev.evaluate(posterior, [(x, y)], num_simulations=100)
    ones = posterior.predict(x).probs.double()
    entropies = torch.special.entr(ones) + torch.special.entr(1 - ones)
    assert report.scores["entropy"] == pytest.approx(float(entropies.mean()), rel=1e-4)
    assert report.scores["online_accuracy"] == pytest.approx(float(posterior.history["correct"].mean()))


def test_what_a_regression_has_no_use_for_is_refused_and_the_simulations_are_those_asked_for():
    torch.manual_seed(0)
    x = torch.randn(40, 3)
    y = x.sum(1, keepdim=True) + 0.1 * torch.randn(40, 1)
    config = bkf.KalmanConfig(likelihood="gaussian", covariance="full")
    posterior = bkf.fit(
        nn.Linear(3, 1), [(x[i : i + 8], y[i : i + 8]) for i in range(0, 40, 8)], config, progress=False
    )
    for unused in ({"ordered": True}, {"top_k": (5,)}, {"class_names": ["a"]}):
        with pytest.raises(
            ValueError, match=rf"^`{next(iter(unused))}` must be left out for a posterior without class probabilities"
        ):
            ev.evaluate(posterior, [(x, y)], **unused)
    with pytest.raises(ValueError, match="`num_simulations` must be at least 39"):
        ev.evaluate(posterior, [(x, y)], num_simulations=1)


def test_bernoulli_outputs_of_an_example_are_dependent():
    """Two equal outputs are one answer: the interval of the accuracy is that of the examples."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(100, 1, generator=generator)
    targets = (torch.rand(100, 1, generator=generator) < probs).long()
    one = ev.evaluate(FakePosterior("bernoulli"), {"probs": probs, "targets": targets}, clusters=torch.arange(100))
    both = {"probs": probs.expand(-1, 2), "targets": targets.expand(-1, 2)}
    two = ev.evaluate(FakePosterior("bernoulli"), both)
    assert two.score("accuracy").interval == pytest.approx(one.score("accuracy").interval)
    weighted = ev.evaluate(FakePosterior("bernoulli"), both, weights=torch.arange(100) % 3, clusters=torch.arange(100))
    right = ((probs > 0.5) == targets).double()[:, 0]
    assert weighted.scores["accuracy"] == pytest.approx(float((torch.arange(100) % 3 * right).sum() / 99))
    grouped = ev.evaluate(FakePosterior("bernoulli"), both, groups={"half": torch.arange(100) // 50})
    assert [row[1].value for row in grouped.tables["Groups by half"].rows] == [100, 100]
    with pytest.raises(ValueError, match=r"^`weights` must be left out for a posterior without class probabilities"):
        ev.evaluate(FakePosterior("gaussian"), {"mean": probs, "targets": targets}, weights=[1.0] * 100)
