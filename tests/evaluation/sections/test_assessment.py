"""The top of the page: answers, findings and advice, of good models, bad ones, and too few examples."""

import math
import re

import numpy as np
import pytest
import scipy
import torch

from bayes_kf import evaluation as ev
from bayes_kf.evaluation.calibration.calibration_errors import smooth_calibration_error
from bayes_kf.evaluation.regression_report import make_forecast
from bayes_kf.evaluation.score import Interval, Score
from bayes_kf.evaluation.sections.distrust import distrust_section, is_beyond_chance, two_sided, worst_section
from bayes_kf.evaluation.sections.regression_assessment import spread_correlation
from bayes_kf.evaluation.sections.verdicts.selective import detection_answer, detection_card

QUICK = {"num_simulations": 99}


def classifier(count, classes=5, seed=0, over=1.0, sharp=2.0):
    """Probabilities that are right, then sharpened by ``over``, and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharp * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return (over * logits).softmax(1), labels


def answers(report):
    return [card.answer for card in report.sections.cards]


def test_a_good_model_is_trusted_and_says_so():
    probs, labels = classifier(1500, 3, sharp=3.0)
    report = ev.evaluate_predictions(probs, labels, ood={"noise": torch.full((200, 3), 1 / 3)}, **QUICK)
    assert answers(report) == ["yes", "yes", "yes"]
    assert report.headline == [
        "Its probabilities can be trusted on inputs like these.",
        "It knows its errors: it is less sure of them.",
        "It notices “noise”.",
    ]  # fmt: skip
    assert "of 1,500 answers are right; the most frequent class: 3" in report.sections.lead


def test_an_overconfident_one_is_not_and_calibration_helps_by_what_is_said():
    probs, labels = classifier(900, over=3.0)
    report = ev.evaluate_predictions(probs, labels, ood={"sure": (9 * torch.eye(5)).softmax(1)[:3]}, **QUICK)
    assert answers(report)[0] == "no"
    assert "they are too high" in report.headline[0]
    (advice,) = [one for one in report.sections.advice if one.what.startswith("Calibrate")]
    order = torch.randperm(900, generator=torch.Generator().manual_seed(0))
    after = probs.clone()
    for fitted, other in ((order[:450], order[450:]), (order[450:], order[:450])):
        after[other] = ev.TemperatureScaling.fit(probs[fitted], labels[fitted])(probs[other])
    for values in (probs, after):
        assert f"{smooth_calibration_error(values, labels):.3f}" in advice.gain
        assert f"{ev.negative_log_likelihood(values, labels):.3f}" in advice.gain
    assert advice.call.startswith("bayes_kf.evaluation.TemperatureScaling.fit(")
    (finding,) = [one for one in report.sections.findings if one.where.startswith("Too sure")]
    assert finding.where.endswith("to 100 %")


def test_an_error_that_no_temperature_mends_is_not_promised_to_be():
    """The confidence is right on the whole, but 80 % means 88 % and 90 % means 82 %."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.full((2000, 2), 0.5, dtype=torch.float64)
    probs[:1000, 0], probs[1000:, 0] = 0.8, 0.9
    probs[:, 1] = 1 - probs[:, 0]
    right = torch.cat([torch.rand(1000, generator=generator) < 0.88, torch.rand(1000, generator=generator) < 0.82])
    report = ev.evaluate_predictions(probs, (~right).long(), **QUICK)
    assert answers(report)[0] == "no"
    assert any(one.what == "Calibration would bring little" for one in report.sections.advice)
    assert not any("TemperatureScaling" in one.call for one in report.sections.advice)
    assert [one.where.split(" at")[0] for one in report.sections.findings[:3]] == [
        "Errors on 1", "Too sure", "Right more often than it says",
    ]  # fmt: skip
    assert report.sections.advice[0].what == "Do not rely on it for that class"
    assert "too high in some ranges and too low in others" in report.headline[0]


def test_a_slight_error_is_called_slight():
    probs, labels = classifier(4000, over=1.2)
    report = ev.evaluate_predictions(probs, labels, **QUICK)
    assert answers(report)[0] == "no"
    assert report.score("ece_smooth").value < 0.05
    assert report.headline[0].startswith("Its probabilities are slightly too high: on average it says ")


def test_few_examples_answer_nothing_and_the_number_that_would_is_named():
    probs, labels = classifier(40)
    report = ev.evaluate_predictions(probs, labels, **QUICK)
    assert answers(report)[0] == "too few"
    assert answers(report)[2] == "not tested"
    assert report.headline[0].startswith("40 examples are too few")
    assert any(one.what == "Evaluate more examples" for one in report.sections.advice)
    assert any("ood=" in one.call for one in report.sections.advice)


@pytest.mark.parametrize(("sharp", "answer"), [(3.0, "yes"), (1.0, "partly")])
def test_how_well_errors_are_known_is_said(sharp, answer):
    report = ev.evaluate_predictions(*classifier(3000, 3, sharp=sharp), **QUICK)
    assert answers(report)[1] == answer
    assert (report.scores["error_entropy_auroc"] >= 0.8) == (answer == "yes")


def test_the_page_says_in_large_type_what_is_wrong_and_the_rest_on_cards():
    probs, labels = classifier(900, 3, sharp=3.0)
    html = ev.evaluate_predictions(probs, labels, ood={"same": classifier(300, 3, 7, sharp=3.0)[0]}, **QUICK).to_html()
    large = re.findall(r'<p class="headline">([^<]*)</p>', html)
    assert large == ["Its probabilities can be trusted on inputs like these.", "It does not notice “same”."]


def test_where_it_is_least_sure_is_said():
    probs, labels = classifier(1000, 3, sharp=3.0)
    (finding,) = ev.evaluate_predictions(probs, labels, **QUICK).sections.findings
    confidence, wrong = probs.max(1).values, probs.argmax(1) != labels
    edge = confidence.sort().values[200]
    assert finding.where == f"Often wrong below a confidence of {100 * edge:.1f} %"
    assert finding.what.startswith(f"{100 * wrong[confidence < edge].double().mean():.1f} % of these 200 answers")


def test_inputs_that_are_missed_are_among_what_not_to_trust():
    probs, labels = classifier(900, 3)
    report = ev.evaluate_predictions(probs, labels, ood={"same": classifier(300, 3, 7)[0]}, **QUICK)
    auroc = report.scores["ood_same_auroc"]
    (finding,) = [finding for finding in report.sections.findings if finding.where == "Inputs like “same”"]
    assert f"{100 * max(auroc, 1 - auroc):.1f} % of the time" in finding.what
    assert ("even surer" in finding.what) == (auroc < 0.5)
    assert any(one.what.startswith("Keep such other inputs away") for one in report.sections.advice)


def test_a_threshold_is_offered_only_where_it_leaves_errors_out():
    probs, labels = classifier(3000, 3, sharp=3.0)
    report = ev.evaluate_predictions(probs, labels, **QUICK)
    start = int(re.search(r'data-start="(\d+)"', report.to_html())[1])
    assert report.sections.thresholds[start][0] == pytest.approx(start / 100)
    assert report.sections.thresholds[start][1] == pytest.approx(0.8, abs=0.02) or "Answer only" in "".join(
        one.what for one in report.sections.advice
    )
    shuffled = probs[torch.randperm(3000, generator=torch.Generator().manual_seed(0))]
    assert "data-start" not in ev.evaluate_predictions(shuffled, labels, **QUICK).to_html()


def test_no_error_is_no_praise():
    probs = torch.full((300, 3), 0.01, dtype=torch.float64)
    probs[:, 0] = 0.98
    report = ev.evaluate_predictions(probs, torch.zeros(300, dtype=torch.int64), **QUICK)
    assert answers(report)[1] == "too few"
    assert "It makes no error here, so nothing says whether it would know one." in report.headline


@pytest.mark.parametrize(
    ("value", "interval", "answer"),
    [
        (0.9, (0.85, 0.95), "yes"),
        (0.65, (0.52, 0.75), "partly"),
        (0.55, (0.52, 0.58), "no"),
        (0.5, (0.45, 0.55), "no"),
        (0.3, (0.2, 0.4), "no"),
        (0.55, (0.4, 0.7), "too few"),
    ],
)
def test_detection_needs_more_than_being_clear(value, interval, answer):
    assert detection_answer(Score(value, Interval(*interval))) == answer


def test_one_kind_of_inputs_that_is_missed_is_named():
    good, bad, unclear = (
        Score(v, Interval(*i)) for v, i in ((0.9, (0.8, 0.95)), (0.5, (0.45, 0.55)), (0.5, (0.2, 0.8)))
    )
    assert detection_card({"a": good, "b": bad, "c": unclear}).headline == "It does not notice “b”."
    assert detection_card({"a": good, "c": unclear}).answer == "too few"
    many = {str(number): good for number in range(5)}
    assert detection_card(many).headline == "It notices “0”, “1” and 3 other kinds of inputs."


def test_a_calibrated_model_has_findings_in_five_per_cent_of_data_sets():
    """Ranges, shares and recall together, for classes that are equally hard; three standard errors of 200 are 4.6 %."""
    names, alarms = [str(c) for c in range(5)], 0
    for seed in range(200):
        probs, labels = classifier(400, seed=seed)
        alarms += bool(distrust_section(probs, labels, names).findings)
    assert alarms / 200 <= 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5


def test_classes_that_stand_out_are_found():
    probs, labels = classifier(2000)
    probs[labels == 3] = probs[labels == 3].roll(1, dims=1)  # class 3 is taken for 4
    section = distrust_section(probs, labels, ["a", "b", "c", "the fourth", "e"])
    found = [finding.where for finding in section.findings]
    assert "Errors on “the fourth”" in found
    assert "Too little probability for “the fourth”" in found
    assert "Too much probability for e" in found
    report = ev.evaluate_predictions(probs, labels, class_names=list("abcde"), **QUICK)
    recall = (probs.argmax(1) == labels)[labels == 3].double().mean()
    assert report.headline[-1] == f"It seldom recognizes d: {100 * recall:.1f} % of {int((labels == 3).sum())}."
    assert answers(report)[-1] == "no"
    (collect,) = [one for one in report.sections.advice if one.what.startswith("Collect")]
    assert collect.what == "Collect more examples of d"
    wrong = probs.argmax(1) != labels
    assert f"{100 * (wrong & (labels == 3)).sum() / wrong.sum():.1f} % of the errors" in collect.gain


def test_holms_method_and_binomial_tails_are_those_of_scipy():
    p_values = np.array([0.0001, 0.004, 0.2, 0.0005, math.nan])
    limit = 0.05 / 3
    adjusted = np.minimum(np.maximum.accumulate(np.sort(p_values[:4]) * [4, 3, 2, 1]), 1)
    expected = np.isin(p_values[:4], np.sort(p_values[:4])[adjusted <= limit])
    assert is_beyond_chance(p_values).tolist() == [*expected.tolist(), False]
    hits, counts, rates = np.array([3, 50, 0]), np.array([10, 60, 0]), np.array([0.6, 0.5, 0.5])
    tails = two_sided(hits, counts, rates)
    for k in range(2):
        below, above = (
            scipy.stats.binomtest(hits[k], counts[k], rates[k], side).pvalue for side in ("less", "greater")
        )
        assert tails[k] == pytest.approx(min(1.0, 2 * min(below, above)))
    assert math.isnan(tails[2])


def test_the_most_confident_errors_are_listed_without_examples():
    probs, labels = classifier(300)
    (table,) = worst_section(probs, labels, list("abcde")).tables
    confidence, predicted = probs.max(1)
    wrong = confidence.where(predicted != labels, -1.0)
    assert [int(row[0].text) for row in table.rows] == wrong.argsort(descending=True)[:10].tolist()
    assert worst_section(probs, predicted, list("abcde")).tables == []


def test_abstention_is_advised_with_the_rules_own_numbers():
    probs, labels = classifier(3000)
    advice = ev.evaluate_predictions(probs, labels, **QUICK).sections.advice
    (abstain,) = [one for one in advice if one.what.startswith("Answer only")]
    confidence, correct = probs.max(1).values, probs.argmax(1) == labels
    rule = ev.AbstentionRule.fit(confidence, correct, risk=float(abstain.call.partition("risk=")[2].rstrip(")")))
    assert f"{100 * rule.threshold:.1f} %" in abstain.what
    assert abstain.what.startswith(f"Answer only {100 * rule.answered:.1f} % of inputs")
    assert rule.risk <= float((~correct).double().mean()) / 2


def test_thresholds_are_what_a_reader_would_count():
    probs, labels = classifier(300)
    steps = ev.evaluate_predictions(probs, labels, **QUICK).sections.thresholds
    confidence, correct = probs.max(1).values, probs.argmax(1) == labels
    for threshold, answered, wrong in steps[::17]:
        chosen = confidence >= threshold
        assert answered == pytest.approx(chosen.double().mean().item(), abs=1e-4)
        assert wrong == pytest.approx((~correct[chosen]).double().mean().item(), abs=1e-4)


def forecasts(count, factor=1.0, seed=0, spread=0.5):
    """Means, targets and variances; the errors are ``factor`` times as large as said."""
    rng = np.random.default_rng(seed)
    mean, sd = rng.standard_normal(count), np.exp(spread * rng.standard_normal(count))
    return mean, mean + factor * sd * rng.standard_normal(count), sd**2


def test_regressions_have_answers_too():
    mean, targets, variance = forecasts(1200)
    good = ev.evaluate_regression(mean, targets, variance=variance, **QUICK)
    assert answers(good) == ["yes", "partly"]
    assert good.headline == ["Its intervals can be trusted on inputs like these.", "It knows in part where it errs."]
    assert not good.sections.findings
    mean, targets, variance = forecasts(1200, factor=1.5)
    bad = ev.evaluate_regression(mean, targets, variance=variance, **QUICK)
    assert answers(bad) == ["no", "partly"]
    wide = ev.evaluate_regression(*forecasts(1200, spread=1.5)[:2], variance=forecasts(1200, spread=1.5)[2], **QUICK)
    assert answers(wide)[1] == "yes"
    inside = f"{100 * bad.scores['coverage_80']:.1f} %"
    assert bad.headline[0] == f"Do not trust its intervals, they are too narrow: those of 80 % contain {inside}."
    (advice,) = bad.sections.advice
    factor = float(advice.what.partition("intervals ")[2].split()[0])
    assert factor == pytest.approx(1.5, abs=0.1)
    assert all(finding.where.startswith("Too narrow") for finding in bad.sections.findings)
    few = ev.evaluate_regression(mean[:30], mean[:30] + 0.1, variance=variance[:30], **QUICK)
    assert "too few" in answers(few)


def test_equally_wide_forecasts_do_not_know_where_they_err():
    mean, targets, _ = forecasts(500, spread=0.0)
    report = ev.evaluate_regression(mean, targets, variance=np.ones(500), **QUICK)
    assert answers(report)[1] == "no"
    assert "spread_spearman" not in report.scores
    mean, targets, variance = forecasts(500)
    shuffled = np.random.default_rng(1).permutation(variance)
    other = ev.evaluate_regression(mean, targets, variance=shuffled, **QUICK)
    assert answers(other)[1] == "no"


def test_findings_of_calibrated_forecasts_come_in_five_per_cent_of_data_sets():
    alarms = 0
    for seed in range(120):
        mean, targets, variance = forecasts(300, seed=seed)
        report = ev.evaluate_regression(mean, targets, variance=variance, num_simulations=39)
        alarms += bool(report.sections.findings)
    assert alarms / 120 <= 0.05 + 3 * (0.05 * 0.95 / 120) ** 0.5


@pytest.mark.parametrize("spread", [0.2, 0.8])
def test_the_interval_of_the_rank_correlation_covers_it(spread):
    """The true one is that of 400,000 targets; 200 data sets of 150, at least 90 %."""
    truth = spread_correlation(make_forecast(*_columns(forecasts(400_000, seed=1, spread=spread)))).value
    covered = 0
    for seed in range(200):
        low, high = spread_correlation(make_forecast(*_columns(forecasts(150, seed=seed + 2, spread=spread)))).interval
        covered += low <= truth <= high
    assert covered / 200 >= 0.9


def _columns(drawn):
    mean, targets, variance = drawn
    return mean, targets, variance, None
