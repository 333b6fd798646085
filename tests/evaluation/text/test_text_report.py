"""The page on texts: its test keeps its size although tokens of a text are dependent, and finds what is wrong."""

import math

import pytest
import torch
from scipy.stats import binomtest, spearmanr

from bayes_kf import evaluation as ev
from bayes_kf.evaluation.text.token_scores import TokenScores, surprise_correlation, surprise_gap
from bayes_kf.inference.predictive.text.scored_text import ScoredText


def texts(num_texts: int, length: int, generator: torch.Generator, sharpness: float = 1.0) -> dict[str, torch.Tensor]:
    """Tokens drawn from the model; with probability 0.6 by a random number that all tokens of the text share."""
    logits = 2 * torch.randn(num_texts, length, 6, generator=generator).double()
    shared = torch.rand(num_texts, length, generator=generator) < 0.6
    common = torch.rand(num_texts, 1, generator=generator).expand(-1, length)
    uniform = torch.where(shared, common, torch.rand(num_texts, length, generator=generator)).double()
    sorted_probs, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)  # a high number is a surprise
    place = (sorted_probs.cumsum(dim=-1) < uniform[..., None]).sum(dim=-1, keepdim=True).clamp(max=5)
    log_probs = (sharpness * logits).log_softmax(dim=-1)
    return {
        "log_prob": log_probs.gather(-1, order.gather(-1, place))[..., 0],
        "entropy": -(log_probs.exp() * log_probs).sum(dim=-1),
    }


def test_the_test_of_the_gap_keeps_its_size_and_its_interval_covers():
    """Of 400 data sets of 25 texts, 5 % are rejected; independent tokens would say so of more than 20 %."""
    generator = torch.Generator().manual_seed(0)
    rejected = outside = covered = plain = 0
    for _ in range(400):
        case = texts(25, 12, generator)
        score = surprise_gap(TokenScores.of(case["log_prob"], case["entropy"], None, None, None))
        rejected += score.p_value < 0.05
        outside += score.null_position != 0
        covered += score.interval.low <= 0 <= score.interval.high
        gap = -case["log_prob"] - case["entropy"]
        plain += abs(float(gap.mean() / gap.std())) * math.sqrt(gap.numel()) > 1.96
    assert binomtest(rejected, 400, 0.05, alternative="greater").pvalue > 0.01, rejected
    assert binomtest(outside, 400, 0.05, alternative="greater").pvalue > 0.01, outside
    assert covered >= 360
    assert plain > 60


def test_the_interval_of_the_correlation_covers_it():
    generator = torch.Generator().manual_seed(1)

    def of(case):
        return surprise_correlation(TokenScores.of(case["log_prob"], case["entropy"], None, None, None))

    truth = of(texts(4000, 12, generator)).value
    covered = 0
    for _ in range(200):
        case = texts(40, 12, generator)
        score = of(case)
        covered += score.interval.low <= truth <= score.interval.high
    assert covered >= 180
    expected = spearmanr(case["entropy"].flatten(), -case["log_prob"].flatten()).statistic
    assert score.value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("sharpness", "answer", "word"), [(1.0, "yes", ""), (2.0, "no", "too high"), (0.5, "no", "too low")]
)
def test_the_page_says_whether_the_probabilities_can_be_trusted(sharpness, answer, word):
    case = texts(300, 20, torch.Generator().manual_seed(2), sharpness)
    report = ev.evaluate_texts(**case, ood={"flat": torch.full((50,), 1.7)})
    card = report.sections.cards[0]
    assert card.answer == answer
    assert word in card.headline
    assert report.scores["nll"] == pytest.approx(-float(case["log_prob"].mean()))
    assert report.scores["perplexity"] == pytest.approx(math.exp(report.scores["nll"]))
    assert report.scores["surprise_gap"] == pytest.approx(report.scores["nll"] - float(case["entropy"].mean()))
    assert report.sections.cards[2].answer == "yes"
    wrong = {finding.where.split(" at ")[0] for finding in report.sections.findings}
    assert wrong == ({"Nearly everywhere"} if word else set())
    if word:
        costs = "costs more than it expects" if word == "too high" else "costs less than it expects"
        assert report.sections.findings[0].what.endswith(costs)
    assert any("calibrate" in advice.call for advice in report.sections.advice) == (answer == "no")


def test_few_texts_are_too_few_and_one_has_no_test():
    case = texts(12, 6, torch.Generator().manual_seed(3))
    report = ev.evaluate_texts(**case)
    assert report.sections.cards[0].answer == "too few"
    assert "such texts would show" in report.sections.cards[0].reason
    one = ev.evaluate_texts(case["log_prob"][:1], case["entropy"][:1])
    assert one.sections.cards[0].answer == "too few"
    assert "surprise_gap_null_low" not in one.scores
    assert "<svg" in one.to_html()


def test_errors_of_both_signs_are_said_range_by_range():
    generator = torch.Generator().manual_seed(6)
    entropy = 0.1 + 2.9 * torch.rand(60, 50, generator=generator, dtype=torch.float64)
    factor = torch.where(entropy < 1.5, 1.9, 0.6)
    loss = -entropy * factor * (1 - torch.rand(60, 50, generator=generator, dtype=torch.float64)).log()
    found = {finding.where.split(" at ")[0] for finding in ev.evaluate_texts(-loss, entropy).sections.findings}
    assert found == {"Too sure", "Right more often than it says"}


def test_odd_texts_have_a_page():
    one = ev.evaluate_texts(torch.tensor([[-1.0]]), torch.tensor([[0.5]]))
    assert "<svg" in one.to_html()
    equal = ev.evaluate_texts(-torch.rand(9, 5), torch.ones(9, 5))
    assert "are equal" in equal.sections.cards[1].reason
    blank = torch.tensor([[1.0, 0.0]] * 9)
    given = {"log_prob": torch.where(blank == 1, -1.0, math.nan), "entropy": torch.where(blank == 1, 0.9, math.nan)}
    assert ev.evaluate_texts(**given, counted=blank).scores["nll"] == 1.0
    assert math.isfinite(ev.evaluate_texts(torch.full((9, 2), -800.0), torch.ones(9, 2)).scores["perplexity"])


def test_a_scored_text_makes_its_page_with_coloured_tokens():
    class Tokenizer:
        def decode(self, ids):
            return f"<{ids[0]}> "

    case = texts(8, 5, torch.Generator().manual_seed(4))
    counted = torch.arange(5).expand(8, -1) > 1
    blank = {name: values * counted for name, values in case.items()}
    scored = ScoredText(torch.arange(40).view(8, 5), counted, **blank, epistemic=0.1 * blank["entropy"])
    report = scored.report(Tokenizer(), title="Mine")
    assert report.sections.sizes == {"texts": 8, "tokens": 24}
    assert report.scores["aleatoric"] == pytest.approx(0.9 * report.scores["entropy"])
    page = report.to_html()
    assert "&lt;0&gt; " in page  # a token that does not count is plain, and every text is escaped
    assert "of which epistemic" in page
    assert page.count("--depth:") == sum(len(gallery.examples) for gallery in report.sections.galleries) * 3
    assert report.title == "Mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_prob": torch.zeros(3)}, r"^`log_prob` must have shape \(B, T\), texts and tokens, got \(3,\)\.$"),
        ({"entropy": torch.zeros(2, 2)}, r"^`entropy` must have shape \(2, 3\), got \(2, 2\)\.$"),
        ({"entropy": -torch.ones(2, 3)}, r"^`entropy` must not be negative, got -1\.$"),
        ({"log_prob": torch.ones(2, 3)}, r"^`log_prob` must be finite and at most 0, got values in 1\.\.1\.$"),
        ({"log_prob": torch.full((2, 3), -math.inf)}, r"^`log_prob` must be finite and at most 0"),
        ({"counted": torch.zeros(2, 3)}, r"^`counted` must hold a token that counts, got none\.$"),
        ({"words": [["a"] * 3]}, r"^`words` must hold 3 tokens for each of 2 texts, got others\.$"),
        ({"epistemic": torch.zeros(3, 2)}, r"^`epistemic` must have shape \(2, 3\), got \(3, 2\)\.$"),
    ],
)
def test_bad_texts_are_refused(change, message):
    given = {"log_prob": -torch.ones(2, 3), "entropy": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=message):
        ev.evaluate_texts(**{**given, **change})
