"""Weights and clusters: repeated examples add nothing, and dependent examples are not mistaken for evidence."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from bayes_kf import evaluation as ev
from bayes_kf.evaluation.resampling.sample_design import SampleDesign

SCORES = ("accuracy", "nll", "brier", "confidence", "ece", "ece_smooth", "ks", "ece_equal_mass", "confidence_gap")


def independent(num_examples: int, seed: int = 0, num_classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    probs = (1.5 * torch.randn(num_examples, num_classes, generator=generator)).double().softmax(dim=1)
    return probs, torch.multinomial(probs, 1, generator=generator)[:, 0]


def clustered(num_clusters: int, size: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Calibrated predictions; in a cluster they are alike, and most labels come from one random number."""
    logits = 1.5 * torch.randn(num_clusters, 1, 4, generator=generator)
    logits = logits + 0.5 * torch.randn(num_clusters, size, 4, generator=generator)
    probs = logits.double().softmax(dim=-1)
    common = torch.rand(num_clusters, 1, generator=generator).expand(-1, size)
    shared = torch.rand(num_clusters, size, generator=generator) < 0.7
    uniform = torch.where(shared, common, torch.rand(num_clusters, size, generator=generator)).double()
    labels = (probs.cumsum(dim=-1) < uniform[..., None]).sum(dim=-1).clamp(max=3)
    return probs.flatten(0, 1), labels.flatten(), torch.arange(num_clusters).repeat_interleave(size)


def test_copies_of_examples_in_one_cluster_change_no_score_interval_or_band():
    probs, labels = independent(80)
    alone = ev.evaluate_predictions(probs, labels, clusters=torch.arange(80), ood={"flat": torch.full((9, 4), 0.25)})
    copied = ev.evaluate_predictions(
        probs.repeat_interleave(5, dim=0),
        labels.repeat_interleave(5),
        clusters=[f"input {k // 5}" for k in range(400)],
        ood={"flat": torch.full((9, 4), 0.25)},
    )
    assert copied.scores.keys() == alone.scores.keys()
    for name in SCORES:
        one, other = alone.score(name), copied.score(name)
        assert other.value == pytest.approx(one.value, abs=1e-9), name
        for first, second in ((one.interval, other.interval), (one.null_band, other.null_band)):
            assert (first is None) == (second is None)
            if first is not None:  # the clusters are numbered in another order, so the signs are others
                assert second == pytest.approx(first, abs=0.02), name
    for name in ("error_entropy_auroc", "ood_flat_auroc"):
        assert copied.score(name).interval == pytest.approx(alone.score(name).interval, abs=0.02)
    assert copied.scores["spiegelhalter"] == pytest.approx(alone.scores["spiegelhalter"])


def test_clusters_of_one_are_independent_examples():
    probs, labels = independent(400)
    plain = ev.evaluate_predictions(probs, labels)
    own = ev.evaluate_predictions(probs, labels, clusters=torch.arange(400))
    for name in ("accuracy", "nll", "brier", "confidence_gap", "error_entropy_auroc"):
        assert own.score(name).value == pytest.approx(plain.score(name).value)
        assert own.score(name).interval == pytest.approx(plain.score(name).interval, abs=0.01)
    for name in ("ece", "ece_smooth", "ks"):
        assert own.score(name).null_band == pytest.approx(plain.score(name).null_band, abs=0.012)


def test_whole_weights_are_copies_in_every_mean_and_calibration_error():
    probs, labels = independent(120)
    number = torch.arange(120) % 4
    weighted = ev.evaluate_predictions(probs, labels, weights=number)
    copied = ev.evaluate_predictions(probs.repeat_interleave(number, dim=0), labels.repeat_interleave(number))
    for name in set(SCORES) - {"ece_equal_mass"}:  # whose bins are counted in examples
        assert weighted.scores[name] == pytest.approx(copied.scores[name], abs=1e-6), name
    for name in ("error_entropy_auroc", "error_entropy_aupr", "error_entropy_fpr95", "accuracy_at_80"):
        assert weighted.scores[name] == pytest.approx(copied.scores[name]), name
    for name in ("aurc", "aurc_excess"):  # by whole steps of an example, not of a copy
        assert weighted.scores[name] == pytest.approx(copied.scores[name], abs=0.01), name
    width = [report.score("accuracy").interval for report in (weighted, copied)]
    assert width[0].high - width[0].low > width[1].high - width[1].low  # copies are no evidence
    assert f"{100 * copied.scores['accuracy']:.1f} % of 120 answers are right" in weighted.sections.lead


def test_equal_weights_change_nothing_but_the_draws():
    probs, labels = independent(300)
    plain = ev.evaluate_predictions(probs, labels)
    weighted = ev.evaluate_predictions(probs, labels, weights=np.full(300, 7.0))
    assert weighted.score("accuracy").interval == pytest.approx(plain.score("accuracy").interval, abs=1e-3)
    assert weighted.score("ece").null_band == pytest.approx(plain.score("ece").null_band, abs=0.01)
    assert weighted.scores["spiegelhalter"] == pytest.approx(plain.scores["spiegelhalter"])


def test_dependent_examples_of_a_calibrated_model_are_no_evidence_against_it():
    """Of 120 data sets of 30 clusters no more are called miscalibrated than chance allows; without clusters half."""
    generator = torch.Generator().manual_seed(5)
    outside, plain_outside, found, covered = 0, 0, 0, 0
    for seed in range(120):
        probs, labels, clusters = clustered(30, 20, generator)
        settings = {"num_simulations": 199, "seed": seed}
        report = ev.evaluate_predictions(probs, labels, clusters=clusters, **settings)
        outside += report.score("ece_smooth").null_position != 0
        found += any(not finding.where.startswith("Often wrong") for finding in report.sections.findings)
        gap = report.score("confidence_gap").interval
        covered += gap.low <= 0 <= gap.high
        plain_outside += ev.evaluate_predictions(probs, labels, **settings).score("ece_smooth").null_position != 0
    assert binomtest(outside, 120, 0.06, alternative="greater").pvalue > 0.01, outside
    assert binomtest(found, 120, 0.05, alternative="greater").pvalue > 0.01, found
    assert covered >= 110
    assert plain_outside > 30


def test_a_wrong_model_is_found_in_spite_of_clusters():
    probs, labels, clusters = clustered(40, 20, torch.Generator().manual_seed(1))
    sure = probs.pow(4) / probs.pow(4).sum(dim=1, keepdim=True)
    report = ev.evaluate_predictions(sure, labels, clusters=clusters, groups={"part": clusters % 2})
    assert report.sections.cards[0].answer == "no"
    assert any("Too sure" in finding.where for finding in report.sections.findings)
    assert report.sections.advice[0].what == "Calibrate on held-out examples"


def test_pixels_of_an_image_are_its_cluster_and_have_its_group():
    probs, labels, clusters = clustered(24, 16, torch.Generator().manual_seed(2))
    images, masks = probs.view(24, 8, 2, 4).movedim(-1, 1), labels.view(24, 8, 2)
    groups = {"source": ["left", "right"] * 12}
    report = ev.evaluate_predictions(images, masks, groups=groups)
    flat = ev.evaluate_predictions(
        probs, labels, clusters=clusters, groups={"source": np.array(groups["source"])[clusters.numpy()]}
    )
    assert report.scores == flat.scores
    assert "those of 24 inputs; intervals and null bands allow for that" in report.sections.lead
    table = report.tables["Groups by source"]
    assert [row[1].value for row in table.rows] == [192, 192]
    with pytest.raises(ValueError, match=r"^`groups\['source'\]` must have shape \(24,\), an entry for each input"):
        ev.evaluate_predictions(images, masks, groups={"source": ["left"] * 384})


def test_the_equivalent_sample_has_the_mean_and_the_robust_variance():
    values = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.5], dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 1.0, 1.0, 3.0, 1.0], dtype=torch.float64)
    design = SampleDesign.of(weights, ["a", "a", "b", "b", "c", "d"], 6)
    number, total, squares, _ = design.equivalent(values)
    mean = float((weights * values).sum() / weights.sum())
    parts = [float((weights[k] * (values[k] - mean)).sum()) / 9 for k in ([0, 1], [2, 3], [4], [5])]
    assert total / number == pytest.approx(mean)
    assert number == pytest.approx(81 / (9 + 4 + 9 + 1))
    assert (squares / number - mean**2) / number == pytest.approx(sum(part**2 for part in parts) * 4 / 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": [1.0] * 9}, r"^`weights` must have shape \(10,\), one for each example, got \(9,\)\.$"),
        ({"weights": [-1.0] + [1.0] * 9}, r"^`weights` must not be negative, and one must be positive\.$"),
        ({"weights": [0.0] * 10}, r"^`weights` must not be negative, and one must be positive\.$"),
        ({"weights": [math.nan] * 10}, r"^`weights` must be finite"),
        ({"clusters": [1] * 10}, r"^`clusters` must hold at least two clusters, got 1\.$"),
        ({"clusters": [1, 2]}, r"^`clusters` must have shape \(10,\), an entry for each example, got \(2,\)\.$"),
    ],
)
def test_bad_designs_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ev.evaluate_predictions(*independent(10), **settings)


@pytest.mark.parametrize("num_clusters", [2, 5, 7])
def test_too_few_clusters_tell_nothing(num_clusters):
    """A model that says 95 % and is right in 91 %: with so few clusters no test could reject it."""
    probs = torch.tensor([[0.95, 0.05]], dtype=torch.float64).repeat(2000, 1)
    labels = (torch.rand(2000, generator=torch.Generator().manual_seed(0)) < 0.3).long()
    report = ev.evaluate_predictions(probs, labels, clusters=torch.arange(2000) % num_clusters)
    card = report.sections.cards[0]
    assert card.answer == "too few"
    assert f"{num_clusters} clusters are too few" in card.headline
    assert report.score("ece").null_band == (0.0, 1.0)
    assert report.sections.verdict[0].startswith("Too few clusters to tell")
    assert any(advice.what == "Evaluate more clusters" for advice in report.sections.advice)
    assert not any("Too sure" in finding.where for finding in report.sections.findings)
    assert "<svg" in report.to_html()
    enough = ev.evaluate_predictions(probs, labels, clusters=torch.arange(2000) % 10)
    assert enough.sections.cards[0].answer == "no"


def test_a_recalibration_and_conformal_sets_have_the_design_too():
    probs, labels = independent(60)
    settings = {
        "recalibration": ev.TemperatureScaling.fit(*independent(300, 1)),
        "conformal": ev.ConformalSets.fit(*independent(300, 2), level=0.9),
    }
    alone = ev.evaluate_predictions(probs, labels, clusters=torch.arange(60), **settings)
    copied = ev.evaluate_predictions(
        probs.repeat(20, 1), labels.repeat(20), clusters=torch.arange(1200) % 60, **settings
    )
    for name in ("recalibrated_accuracy", "recalibrated_nll", "recalibrated_brier", "conformal_size"):
        assert copied.score(name).interval == pytest.approx(alone.score(name).interval, abs=1e-6), name
    for name in ("recalibrated_ece", "conformal_coverage"):
        assert copied.score(name).null_band == pytest.approx(alone.score(name).null_band, abs=0.02), name
    with pytest.raises(ValueError, match=r"^`human` must be left out with weights or clusters, got both\.$"):
        ev.evaluate_predictions(probs, labels, weights=torch.ones(60), human=probs)


def test_inputs_without_a_target_that_counts_are_no_clusters():
    probs, labels, _ = clustered(6, 12, torch.Generator().manual_seed(3))
    tokens, targets = probs.view(6, 12, 4), labels.view(6, 12).clone()
    targets[1:] = -100
    one = ev.evaluate_predictions(tokens, targets)
    assert "of the one input count as independent" in one.sections.lead
    targets[1] = labels.view(6, 12)[1]
    assert "those of 2 inputs" in ev.evaluate_predictions(tokens, targets).sections.lead


def test_clusters_and_weights_may_be_those_of_the_inputs():
    probs, labels, clusters = clustered(20, 9, torch.Generator().manual_seed(4))
    tokens, targets = probs.view(20, 9, 4), labels.view(20, 9)
    people, weights = [f"person {k // 2}" for k in range(20)], torch.arange(20) % 3
    by_input = ev.evaluate_predictions(tokens, targets, clusters=people, weights=weights)
    by_token = ev.evaluate_predictions(
        probs, labels, clusters=np.array(people)[clusters.numpy()], weights=weights[clusters]
    )
    assert by_input.scores == by_token.scores


def test_one_example_may_have_a_weight():
    report = ev.evaluate_predictions([[0.9, 0.1]], [0], weights=[2.0], num_simulations=39)
    assert report.scores["accuracy"] == 1.0


def test_joint_log_probabilities_are_weighted_too():
    probs, labels = independent(40)
    joint = torch.linspace(-2, -1, 20)
    weights = torch.arange(20).repeat_interleave(2) % 4
    report = ev.evaluate_predictions(probs, labels, log_prob=joint, weights=weights)
    expected = -(weights[::2] * joint).sum() / weights[::2].sum() / 2
    assert report.scores["nll"] == pytest.approx(float(expected))
