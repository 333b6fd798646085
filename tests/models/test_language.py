"""Causal language models as classifiers."""

import functools
import math

import language_models as lm
import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from torch import nn

import bayes_kf as bkf
from bayes_kf.inference.linearization.linearizer import Linearizer
from bayes_kf.models.batched_forward import outputs_of_draws
from bayes_kf.models.language import NextToken, OptionTexts, OptionTokens, next_token_examples, option_examples

YES, NO = (lm.LETTERS.index(letter) for letter in "yn")


def prompts(count=12, seed=0, length=20):
    text, generator = lm.english(), torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - length, (count,), generator=generator)
    return torch.stack([text[s : s + length] for s in starts])


def test_the_model_is_not_random():
    ids = prompts(64, length=60)
    assert float(lm.base()(ids, labels=ids).loss.detach()) < 0.6 * math.log(len(lm.LETTERS))


def test_options_are_the_logits_of_the_last_token_given_on_either_side_of_padding():
    model, tokens = lm.llama(), torch.tensor([[5, 6, 7, 8], [9, 3, 0, 0], [0, 0, 4, 2]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]])
    read = OptionTokens(model, [3, 7, 11])
    actual = read.outputs(read.vector(), {"input_ids": tokens, "attention_mask": mask})
    with torch.no_grad():
        for row, (some, attended) in enumerate(zip(tokens, mask, strict=True)):
            alone = model(some[attended.bool()].unsqueeze(0)).logits[0, -1, [3, 7, 11]]
            torch.testing.assert_close(actual[row], alone, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        without = read.run({"input_ids": tokens[:1]})
    torch.testing.assert_close(without[0], actual[0])


def test_texts_are_scored_as_a_loop_over_tokens_scores_them():
    model, tokenizer = lm.lora(), lm.Letters()
    given, options = ["The value of ", "An int"], [["x", "the list", "it is"], ["eger", "o", "ernal"]]
    for per_token in (False, True):
        read = OptionTexts(model, per_token)
        actual = read.outputs(read.vector(), option_examples(tokenizer, given, options))
        for row, (prompt, some) in enumerate(zip(given, options, strict=True)):
            for column, text in enumerate(some):
                before, own, total = lm.ids(prompt), lm.ids(text), 0.0
                for number, token in enumerate(own):
                    whole = torch.cat([before, own[:number]]).unsqueeze(0)
                    with torch.no_grad():
                        total += float(model(whole).logits[0, -1].log_softmax(-1)[token])
                expected = total / len(own) if per_token else total
                assert float(actual[row, column]) == pytest.approx(expected, rel=1e-4)


def test_next_tokens_are_those_of_the_sequence():
    model, tokens = lm.lora(), prompts(3)
    labels = tokens.clone()
    labels[:, :5] = -100  # a prompt
    labels[1, 12:] = -100
    read, seen = NextToken(model), 0
    with torch.no_grad():
        expected = model(tokens).logits.log_softmax(-1)
    for number, batch in enumerate(next_token_examples(tokens, labels)):
        outputs = read.outputs(read.vector(), batch.inputs).log_softmax(-1)
        places = batch.inputs["place"]
        torch.testing.assert_close(outputs, expected[number, places], rtol=1e-4, atol=1e-4)
        assert torch.equal(batch.targets, tokens[number, places + 1])
        assert int(places.min()) == 4
        seen += len(places)
    assert seen == 15 + 7 + 15
    assert not list(next_token_examples(tokens, torch.full_like(tokens, -100)))


VIRTUAL = {
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # PEFT's prefix tuning
@pytest.mark.parametrize("kind", VIRTUAL)
def test_virtual_tokens_are_not_positions_of_the_text(kind):
    """Each text by itself, without padding, through PEFT's own forward pass; the last logits are those of its end."""
    model = lm.with_prompt(VIRTUAL[kind])
    tokens = torch.tensor([[5, 6, 7, 8, 9], [9, 3, 4, 0, 0], [0, 0, 4, 2, 7]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    with torch.no_grad():
        alone = [model(input_ids=row[own.bool()][None]).logits[0] for row, own in zip(tokens, mask, strict=True)]
    given = {"input_ids": tokens, "attention_mask": mask}
    read, close = OptionTokens(model, [3, 7, 11]), {"rtol": 1e-4, "atol": 1e-4}
    expected = torch.stack([logits[-1, [3, 7, 11]] for logits in alone])
    assert expected.std() > 0.5
    torch.testing.assert_close(read.outputs(read.vector(), given), expected, **close)
    read, place = NextToken(model), torch.tensor([2, 1, 3])
    expected = torch.stack([alone[0][2 - 5], alone[1][1 - 3], alone[2][1 - 3]])  # from the end of each text
    torch.testing.assert_close(read.outputs(read.vector(), given | {"place": place}), expected, **close)
    texts = {name: values.unsqueeze(0) for name, values in given.items()}  # three options of one example
    scored = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 1]])
    own = [logits[-len(ids) :].log_softmax(-1) for logits, ids in zip(alone, (tokens[0], *[[0] * 3] * 2), strict=True)]
    total = [own[0][2, 8] + own[0][3, 9], own[1][0, 3] + own[1][1, 4], own[2][1, 7]]
    read = OptionTexts(model)
    actual = read.outputs(read.vector(), texts | {"scored": scored.unsqueeze(0)})
    torch.testing.assert_close(actual[0], torch.stack(total), **close)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # PEFT's prefix tuning
@pytest.mark.parametrize("kind", VIRTUAL)
def test_jacobians_of_virtual_tokens_are_those_of_autograd(kind):
    read, tokens = OptionTokens(lm.with_prompt(VIRTUAL[kind]), [3, 7, 11]), torch.tensor([[0, 6, 7], [9, 3, 4]])
    inputs, vector = {"input_ids": tokens, "attention_mask": (tokens > 0).long()}, read.vector()
    actual = Linearizer(read)(vector, inputs).jacobian().dense()
    exact = torch.autograd.functional.jacobian(lambda v: read.call(read.unflatten(v), inputs), vector)
    torch.testing.assert_close(actual, exact.flatten(2), rtol=1e-3, atol=1e-4)


def inputs_of(kind):
    if kind is OptionTokens:
        return OptionTokens(lm.llama(), [3, 7, 11]), {"input_ids": torch.randint(1, 50, (3, 6))}
    if kind is NextToken:
        return NextToken(lm.llama()), {"input_ids": torch.randint(1, 50, (3, 6)), "place": torch.tensor([2, 5, 0])}
    tokens = torch.randint(1, 50, (2, 3, 6))
    return OptionTexts(lm.llama()), {"input_ids": tokens, "scored": torch.arange(6).expand(2, 3, 6) > 3}


@pytest.mark.parametrize("kind", [OptionTokens, NextToken, OptionTexts])
def test_jacobians_are_those_of_autograd(kind):
    torch.manual_seed(2)
    read, inputs = inputs_of(kind)
    vector = read.vector()
    actual = Linearizer(read)(vector, inputs).jacobian().dense()
    exact = torch.autograd.functional.jacobian(lambda v: read.call(read.unflatten(v), inputs), vector)
    torch.testing.assert_close(actual, exact.flatten(2), rtol=1e-3, atol=1e-4)
    if kind is not OptionTexts:
        assert set(read.linearized_by.values()) == {"hooks"}


def questions(count, seed):
    """Prompts, and whether their last letter is a vowel."""
    tokens = prompts(count, seed, 16)
    vowels = torch.tensor([lm.LETTERS.index(letter) for letter in "aeiou"])
    kinds = torch.isin(tokens[:, -1], vowels).long()
    return {"input_ids": tokens}, 1 - kinds  # option 0: yes


def test_a_choice_is_fitted_saved_and_loaded(tmp_path):
    read = OptionTokens(lm.lora(), [YES, NO])
    inputs, targets = questions(240, 3)
    batches = [({"input_ids": x}, y) for x, y in zip(inputs["input_ids"].split(4), targets.split(4), strict=True)]
    posterior = bkf.fit(read, iter(batches), bkf.KalmanConfig(), progress=False)
    held, labels = questions(200, 4)
    learned = posterior.predict(held, targets=labels)
    common = float(labels.double().mean())
    common = max(common, 1.0 - common)
    accuracy = float((learned.probs.argmax(1) == labels).double().mean())
    assert accuracy > common + 0.1
    posterior.save_pretrained(tmp_path / "posterior")
    loaded = bkf.Posterior.from_pretrained(tmp_path / "posterior", lm.base())
    again = loaded.with_adapter(OptionTokens(loaded.adapter.model, [YES, NO])).predict(held, targets=labels)
    assert torch.equal(again.probs, learned.probs)
    report = bkf.evaluate(posterior, [(held, labels)], num_simulations=100)
    assert report.scores["accuracy"] == pytest.approx(accuracy)


def test_next_tokens_are_fitted_with_a_whole_vocabulary():
    read = NextToken(lm.lora())
    text = lm.ids("the kalman filter; " * 12)
    tokens = text[: 6 * 32].view(6, 32)
    posterior = bkf.fit(
        read, next_token_examples(tokens, tokens), bkf.KalmanConfig(curvature="sampled"), progress=False
    )
    before = torch.cat([read.outputs(read.vector(), b.inputs) for b in next_token_examples(tokens[:1], tokens[:1])])
    after = torch.cat(
        [read.outputs(posterior.mean_vector, b.inputs) for b in next_token_examples(tokens[:1], tokens[:1])]
    )
    losses = [nn.functional.cross_entropy(outputs, tokens[0, 1:]) for outputs in (before, after)]
    assert losses[1] < losses[0] - 0.5
    online = posterior.history["log_loss"]
    assert online[-31:].mean() < online[:31].mean() - 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptionTokens(lm.llama(), [3]), r"`options` must be at least two different token ids, got \[3\]"),
        (lambda: OptionTokens(lm.llama(), [3, 3]), r"`options` must be at least two different token ids"),
        (
            lambda: OptionTokens(lm.llama(), [3, 50]).run({"input_ids": torch.ones(1, 2, dtype=torch.int64)}),
            r"`options` must be below the vocabulary's 50, got 50",
        ),
        (lambda: NextToken(lm.llama()).run({"input_ids": torch.ones(1, 2)}), r"mapping with input_ids, place, got inp"),
        (lambda: NextToken(lm.llama()).run(torch.ones(1, 2)), r"mapping with input_ids, place, got Tensor"),
        (
            lambda: OptionTexts(lm.llama()).run({"input_ids": torch.ones(1, 2), "scored": torch.ones(1, 2)}),
            r"of one shape \(examples, options, tokens\), got \(1, 2\)",
        ),
        (lambda: option_examples(lm.Letters(), ["a"], [["b"], ["c"]]), r"`options` must hold the same number of texts"),
        (lambda: option_examples(lm.Letters(), ["a"], [["b", ""]]), r"`options` must hold texts with tokens, got ''"),
        (lambda: option_examples(lm.Letters(), [""], [["b"]]), r"`prompts` must hold texts with tokens, got ''"),
        (
            lambda: OptionTexts(lm.llama()).run(
                {
                    "input_ids": torch.ones(1, 2, 3, dtype=torch.int64),
                    "scored": torch.tensor([[[False, True, True], [False, False, True]]]),
                    "attention_mask": torch.tensor([[[0, 1, 1], [1, 1, 1]]]),
                }
            ),
            r"`inputs` must have a token before every one that is `scored`",
        ),
        (
            lambda: next(next_token_examples(torch.ones(1, 3), torch.ones(1, 2))),
            r"`input_ids` and `labels` must be of one shape \(sequences, tokens\), got \(1, 3\) and \(1, 2\)",
        ),
    ],
)
def test_invalid_inputs_and_settings_raise(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize("make", [lm.lora, lm.llama])
def test_padding_on_either_side_changes_nothing(make):
    """GPT-2 has absolute positions, which padding on the left would shift."""
    model = make()
    read = OptionTokens(model, options=[3, 7, 11])
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 50, (2, 5), generator=g)
    plain = read.outputs(read.vector(), {"input_ids": ids})
    nothing = torch.zeros(2, 4, dtype=torch.long)
    for sides in ((nothing, ids), (ids, nothing)):
        padded = torch.cat(sides, 1)
        mask = torch.cat([torch.ones_like(t) if t is ids else t for t in sides], 1)
        actual = read.outputs(read.vector(), {"input_ids": padded, "attention_mask": mask})
        torch.testing.assert_close(actual, plain, rtol=1e-4, atol=1e-5)


def test_the_callers_autocast_applies():
    model = lm.lora()
    read = OptionTokens(model, options=[3, 7, 11])
    ids = {"input_ids": torch.randint(1, 50, (2, 5), generator=torch.Generator().manual_seed(0))}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert read.run(ids).dtype == torch.bfloat16
    assert read.run(ids).dtype == torch.float32


@pytest.mark.parametrize("make", [lm.lora, lm.llama])
def test_options_of_a_prompt_share_what_they_begin_with(make, monkeypatch):
    """Against the same texts read whole, which gradients ask for; prompts of several lengths, options too."""
    read = OptionTexts(make())
    torch.manual_seed(0)
    ids = torch.randint(1, 50, (3, 1, 14)).repeat(1, 4, 1)
    scored, mask = torch.zeros(3, 4, 14, dtype=torch.bool), torch.ones(3, 4, 14, dtype=torch.long)
    for row in range(3):
        for option in range(4):
            start = 8 + row
            ids[row, option, start:] = torch.randint(1, 50, (14 - start,))
            end = start + 1 + option % 3
            scored[row, option, start:end], mask[row, option, end:] = True, 0
    inputs = {"input_ids": ids, "scored": scored, "attention_mask": mask}
    vector, widths = read.vector(), []
    base = type(read.model.get_base_model())
    forward = base.forward

    @functools.wraps(forward)
    def counted(self, *args, **kwargs):
        widths.append(tuple(kwargs["input_ids"].shape))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(base, "forward", counted)
    shared = read.outputs(vector, inputs)
    assert widths == [(3, 7), (12, 7)]
    whole = read.call(read.tensors(vector), inputs)
    assert widths[2:] == [(12, 14)]
    torch.testing.assert_close(shared, whole.detach(), rtol=1e-4, atol=1e-4)
    draws = vector + 0.05 * torch.randn(3, len(vector))
    apart = torch.stack([read.call(read.tensors(draw), inputs).detach() for draw in draws])
    torch.testing.assert_close(outputs_of_draws(read, draws, inputs), apart, rtol=1e-4, atol=1e-4)
