"""The abstention rule: its promise in simulations, its p-values, and bad arguments."""

import math

import pytest
import scipy.stats
import torch

from bayes_kf.evaluation import AbstentionRule


def drawn(count, generator, slope=1.0):
    """Confidences, and answers that are right with probability 0.5 + 0.5 · slope · confidence."""
    confidence = torch.rand(count, generator=generator, dtype=torch.float64)
    return confidence, torch.rand(count, generator=generator, dtype=torch.float64) < 0.5 + 0.5 * slope * confidence


def true_risk(threshold, slope=1.0):
    """Error rate among confidences from a threshold to 1."""
    return 0.5 - 0.25 * slope * (1.0 + threshold)


@pytest.mark.parametrize(("risk", "level", "count"), [(0.1, 0.9, 1000), (0.2, 0.8, 100), (0.05, 0.9, 10_000)])
def test_the_error_rate_is_above_the_risk_as_seldom_as_promised(risk, level, count):
    generator, broken, answered = torch.Generator().manual_seed(0), 0, 0.0
    for _ in range(400):
        rule = AbstentionRule.fit(*drawn(count, generator), risk=risk, level=level)
        broken += rule.threshold < math.inf and true_risk(rule.threshold) > risk
        answered += rule.answered / 400
    limit = scipy.stats.binom.ppf(0.999, 400, 1 - level)
    assert broken <= limit
    best = 1.0 - (1.0 - 4 * risk) if risk < 0.25 else 1.0  # share above the threshold where the risk is exact
    assert 0.1 * best < answered < best


def test_it_promises_nothing_for_a_model_whose_answers_are_chance():
    generator = torch.Generator().manual_seed(1)
    rules = [AbstentionRule.fit(*drawn(500, generator, slope=0.0), risk=0.3) for _ in range(100)]
    assert sum(rule.threshold < math.inf for rule in rules) <= 18  # 10 expected at most
    assert any(math.isnan(rule.error_rate) for rule in rules)


def test_it_needs_as_many_answers_as_it_says():
    rule = AbstentionRule.fit(torch.ones(10), torch.ones(10), risk=0.05, level=0.9)
    assert rule.threshold == math.inf
    needed = rule.least_examples
    assert 0.95**needed <= 0.1 / 8 < 0.95 ** (needed - 1)
    for count, can in ((needed - 1, False), (needed, True)):
        rule = AbstentionRule.fit(torch.ones(count), torch.ones(count), risk=0.05, level=0.9)
        assert (rule.threshold < math.inf) == can
        assert rule.answered == (1.0 if can else 0.0)
        assert bool(rule.answers(torch.ones(3)).all()) == can


def test_the_threshold_is_the_lowest_that_its_tests_allow():
    generator = torch.Generator().manual_seed(3)
    confidence, correct = drawn(2000, generator)
    rule = AbstentionRule.fit(confidence, correct, risk=0.1)
    answers = rule.answers(confidence)
    assert float(answers.double().mean()) == rule.answered
    assert float((~correct[answers]).double().mean()) == pytest.approx(rule.error_rate)

    def p_value(threshold):
        kept = confidence >= threshold
        return scipy.stats.binom.cdf(int((~correct[kept]).sum()), int(kept.sum()), 0.1)

    assert p_value(rule.threshold) <= 0.1 / 8 < p_value(rule.threshold - 1 / 200)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.5], [1.0], {"risk": 0.0}), "`risk` must"),
        (([0.5], [1.0], {"level": 1.0}), "`level` must"),
        (([1.5], [1.0], {}), "`confidence` must lie between 0 and 1"),
        (([0.5, 0.6], [1.0], {}), "`correct` must be as many as `confidence`, 2, and some, got 1"),
        (([0.5], [0.3], {}), "`correct` must hold 0 and 1 alone"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    confidence, correct, options = arguments
    with pytest.raises(ValueError, match=message):
        AbstentionRule.fit(torch.tensor(confidence), torch.tensor(correct), **options)
