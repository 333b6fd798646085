"""The probability of text that exists, and answers chosen among options."""

import functools
import re
from html import unescape

import language_models as lm
import pytest
import torch

import bayes_kf as bkf
from bayes_kf.models.language import OptionTexts, OptionTokens, option_examples

TEXTS = ["The following are special", "zqx#7 Kj", "Changed in version 3.1"]


def by_hand(posterior, ids, count):
    """Scores of every token but the first, by a loop over drawn adapters and their whole logits."""
    draws = posterior.sample(count, torch.Generator().manual_seed(posterior.config.seed))
    adapter = posterior.adapter
    with torch.no_grad(), adapter.eval_mode():
        spoken = []
        for draw in draws:
            with adapter.substituted(adapter.tensors(draw)):
                spoken.append(adapter.model(input_ids=ids).logits[:, :-1].double().softmax(-1))
    spoken = torch.stack(spoken)
    mean = spoken.mean(0)
    entropy = -(mean * mean.log()).sum(-1)
    agreed = -(spoken * spoken.log()).sum(-1).mean(0)
    return mean.gather(-1, ids[:, 1:, None]).squeeze(-1).log(), entropy, entropy - agreed


def test_scores_are_those_of_the_drawn_adapters():
    posterior = lm.posterior_around(lm.lora(), 1e-2)
    actual = posterior.score(TEXTS, tokenizer=lm.Letters(), num_samples=5)
    assert actual.lengths.tolist() == [len(text) - 1 for text in TEXTS]
    for row, text in enumerate(TEXTS):
        expected = by_hand(posterior, lm.ids(text).unsqueeze(0), 5)
        some = actual.counted[row]
        assert torch.equal(actual.tokens[row, : len(text)], lm.ids(text))
        for values, right in zip((actual.log_prob, actual.entropy, actual.epistemic), expected, strict=True):
            torch.testing.assert_close(values[row][some].double(), right[0], rtol=1e-3, atol=1e-5)
            assert float(values[row][~some].abs().sum()) == 0.0
    assert float(actual.sequence_log_prob[1] / 7) < float(actual.sequence_log_prob[0] / 24) - 1.0
    torch.testing.assert_close(actual.sequence_aleatoric + actual.sequence_epistemic, actual.sequence_entropy)
    assert float(actual.epistemic.sum()) > 0.01


def test_prompts_and_labels_say_which_tokens_count():
    posterior, letters = lm.posterior_around(lm.lora(), 1e-2), lm.Letters()
    whole = posterior.score([TEXTS[0]], tokenizer=letters)
    after = posterior.score([TEXTS[0][13:]], prompts=[TEXTS[0][:13]], tokenizer=letters)
    assert after.counted.sum() == len(TEXTS[0]) - 13
    torch.testing.assert_close(after.log_prob[0, 13:], whole.log_prob[0, 13:], rtol=1e-4, atol=1e-6)
    ids = lm.ids(TEXTS[0]).unsqueeze(0)
    labels = ids.clone()
    labels[:, :13] = -100
    assert torch.equal(posterior.score({"input_ids": ids, "labels": labels}).counted, after.counted)


def test_tokens_are_coloured_by_their_entropy():
    posterior, tokenizer = lm.posterior_around(lm.lora(), 1e-2), lm.tokenizer()
    scored = posterior.score(["a <b> & c"], prompts=["<i>"], tokenizer=lm.Letters())
    html = scored.to_html(tokenizer)
    depths = [float(depth) for depth in re.findall(r"rgba\(213, 94, 0, ([\d.]+)\)", html)]
    entropies = scored.entropy[0][scored.counted[0]].tolist()
    assert depths == [pytest.approx(0.85 * min(entropy / 3, 1), abs=0.006) for entropy in entropies]
    assert unescape(re.sub(r"<[^>]+>", "", html)) == "<i>a <b> & c"
    assert html.startswith('<p style="white-space: pre-wrap">&lt;i&gt;<span title="log p ')


def test_a_mixture_scores_text():
    one, other = lm.posterior_around(lm.lora(), 1e-2), lm.posterior_around(lm.lora(seed=1), 1e-2)
    mixture = bkf.MixturePosterior((one, other), (0.5, 0.5))
    actual = mixture.score(TEXTS, tokenizer=lm.Letters(), num_samples=6)
    assert bool((actual.epistemic >= 0).all())
    assert mixture.generate({"input_ids": lm.ids("The ").unsqueeze(0)}, 3).tokens.shape[0] == 1
    assert len(mixture.answer(TEXTS[:2], ["a", "b"], tokenizer=lm.Letters(), num_samples=16).texts) == 2


def test_answers_are_the_predictions_of_option_texts():
    posterior = lm.posterior_around(lm.lora(), 1e-3)
    prompts, options = ["The following are spec", "Changed in vers"], [["ial", "zzq"], ["xy", "ion"]]
    actual = posterior.answer(prompts, options, tokenizer=lm.Letters(), batch_size=1)
    assert actual.texts == ["ial", "ion"]
    inputs = option_examples(lm.Letters(), prompts, options)
    expected = posterior.with_adapter(OptionTexts(posterior.adapter.model)).predict(inputs)
    torch.testing.assert_close(actual.probs, expected.probs, rtol=0.05, atol=0.02)  # other draws of outputs
    torch.testing.assert_close(actual.aleatoric + actual.epistemic, actual.entropy, rtol=1e-4, atol=1e-6)
    assert actual.confidence.tolist() == actual.probs.max(-1).values.tolist()
    letters = posterior.answer(prompts, ["i", "q"], tokenizer=lm.Letters(), method="mean")
    read = posterior.with_adapter(OptionTokens(posterior.adapter.model, [lm.ids("i")[0].item(), lm.ids("q")[0].item()]))
    ids = lm.ids(prompts[0]).unsqueeze(0)
    torch.testing.assert_close(letters.probs[:1], read.predict({"input_ids": ids}, "mean").probs, rtol=1e-4, atol=1e-6)


@functools.cache
def plain():
    return lm.posterior_around(lm.lora(), 1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.score(["a", "abc"], tokenizer=lm.Letters()), "`texts` must have at least two tokens"),
        (
            lambda p: p.score(["abc"], ["a", "b"], tokenizer=lm.Letters()),
            "`prompts` must be as many as `texts`, 1, got 2",
        ),
        (
            lambda p: p.score({"input_ids": torch.ones(1, 3, dtype=torch.long)}, ["a"]),
            "`prompts` must be None with tokens",
        ),
        (
            lambda p: p.score(["a " * 90], tokenizer=lm.Letters()),
            "`input_ids` must fit the context of 160 tokens, got 180",
        ),
        (lambda p: p.score(["abc"]), "`tokenizer` must be given: none was found at ''"),
        (
            lambda p: p.score(["abc"], tokenizer=lm.Letters(), num_samples=0),
            "`num_samples` must be a whole number >= 1",
        ),
        (
            lambda p: p.answer("a", ["b", "c"], tokenizer=lm.Letters()),
            "`prompts` must be a list of texts, got one text",
        ),
        (
            lambda p: p.answer(["a"], ["b"], tokenizer=lm.Letters()),
            "`options` must be at least two texts for each prompt",
        ),
        (lambda p: p.answer(["a"], "bc", tokenizer=lm.Letters()), "`options` must be texts, or a list of texts"),
        (lambda p: p.answer(["a", "b"], [["b", "c"]], tokenizer=lm.Letters()), "`options` must hold the same number"),
        (
            lambda p: p.answer(["a"], ["b", "c" * 200], tokenizer=lm.Letters()),
            "`input_ids` must fit the context of 160 tokens, got 201",
        ),
        (
            lambda p: p.answer(["<|im|>a", "b"], ["b", "c"], tokenizer=Marked()),
            "`prompts` must be made by a chat template all or none, got special tokens in number 0 and none in",
        ),
        (
            lambda p: p.score({"input_ids": torch.ones(1, 3, dtype=torch.long), "labels": torch.full((1, 3), -100)}),
            "`texts` must have a token that counts, got none",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        call(plain())


class Marked(lm.Letters):
    all_special_tokens = ("<|im|>",)
