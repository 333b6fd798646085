"""Arguments of transformers' ``generate``, as a posterior takes them."""

import language_models as lm
import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import LogitsProcessor, LogitsProcessorList, MaxTimeCriteria, StoppingCriteriaList


class Seen(LogitsProcessor):
    """Keeps the scores that tokens are chosen from."""

    def __init__(self):
        self.scores = []

    def __call__(self, input_ids, scores):
        self.scores.append(scores.clone())
        return scores


def test_sampled_tokens_follow_the_average_of_the_adapters_at_a_temperature():
    """10,000 first tokens against p̄^(1/T) of whole forward passes, each share within five standard errors."""
    posterior, count = lm.posterior_around(lm.llama(), 0.05), 10_000
    ids = lm.prompt(posterior.adapter.model, 1, 4)
    arguments = {"do_sample": True, "temperature": 0.5, "top_k": 0, "num_return_sequences": count, "eos_token_id": -1}
    actual = posterior.generate({"input_ids": ids}, 1, num_samples=3, **arguments)
    draws = posterior.sample(3, torch.Generator().manual_seed(posterior.config.seed))
    given = {"input_ids": ids, "place": torch.tensor([3])}
    mean = torch.stack([posterior.adapter.outputs(draw, given).double().softmax(-1) for draw in draws]).mean(0)[0]
    expected = mean.square() / mean.square().sum()
    shares = actual.tokens.flatten().bincount(minlength=50) / count
    assert bool(((shares - expected).abs() < 5 * (expected / count).sqrt() + 1e-3).all())
    torch.testing.assert_close(actual.log_prob[:, 0], mean.log()[actual.tokens[:, 0]], rtol=1e-4, atol=1e-5)
    assert actual.tokens.shape == actual.entropy.shape == (count, 1)


def test_top_p_leaves_the_most_probable_tokens():
    posterior, seen = lm.posterior_around(lm.lora(), 1e-4), Seen()
    ids = lm.ids("The follow").unsqueeze(0)
    given = {"do_sample": True, "top_p": 0.3, "num_return_sequences": 20}
    actual = posterior.generate({"input_ids": ids}, 1, num_samples=2, logits_processor=[seen], **given)
    probs = seen.scores[0][0].softmax(-1).sort(descending=True)
    allowed = probs.indices[: int((probs.values.cumsum(0) < 0.3).sum()) + 1]
    assert set(actual.tokens.flatten().tolist()) <= set(allowed.tolist())


def test_several_texts_of_a_prompt_follow_each_other():
    posterior = lm.posterior_around(lm.lora(), 1e-4)
    ids = torch.stack([lm.ids("The following are"), lm.ids("Changed in version")[:17]])
    actual = posterior.generate({"input_ids": ids}, 8, num_samples=2, do_sample=True, num_return_sequences=3)
    assert actual.tokens.shape == actual.counted.shape == actual.log_prob.shape == (6, 8)
    assert actual.sequence_entropy.shape == (6,)
    first = posterior.score({"input_ids": torch.cat([ids.repeat_interleave(3, 0), actual.tokens], 1)}, num_samples=2)
    counted = actual.counted
    torch.testing.assert_close(first.log_prob[:, 17:][counted], actual.log_prob[counted].float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        first.epistemic[:, 17:][counted], actual.epistemic[counted].float(), rtol=1e-2, atol=1e-4
    )


def test_a_text_ends_at_a_string():
    posterior, ids = lm.posterior_around(lm.lora(), 1e-4), lm.ids("The following are ").unsqueeze(0)
    letters = lm.tokenizer()
    free = posterior.generate({"input_ids": ids}, 40, num_samples=2, eos_token_id=-1)
    text = letters.decode(free.tokens[0])
    stop = text[6:8]
    actual = posterior.generate(
        {"input_ids": ids.repeat(2, 1)}, 40, num_samples=2, stop_strings=[stop], tokenizer=letters, pad_token_id=9
    )
    length = text.index(stop) + 2
    assert letters.decode(actual.tokens[0, :length]) == text[:length]
    assert actual.counted.sum(1).tolist() == [length, length]
    with pytest.raises(ValueError, match="`tokenizer` must be given with `stop_strings`, got None"):
        posterior.generate({"input_ids": ids}, stop_strings=["x"])


def test_settings_and_criteria_of_transformers():
    posterior, ids = lm.posterior_around(lm.lora(), 1e-4), lm.ids("The following are ").unsqueeze(0)
    settings = GenerationConfig(max_new_tokens=5, repetition_penalty=1.7, eos_token_id=None)
    actual = posterior.generate({"input_ids": ids}, num_samples=2, generation_config=settings)
    plain = posterior.generate({"input_ids": ids}, 5, num_samples=2, repetition_penalty=1.7)
    assert actual.tokens.shape == (1, 5)
    assert torch.equal(actual.tokens, plain.tokens)
    at_once = StoppingCriteriaList([MaxTimeCriteria(0.0)])
    assert posterior.generate({"input_ids": ids}, 9, num_samples=2, stopping_criteria=at_once).counted.sum() == 1
    assert posterior.generate({"input_ids": ids}, num_samples=1, eos_token_id=-1).tokens.shape == (1, 32)
    processors = LogitsProcessorList([Seen()])
    posterior.generate({"input_ids": ids}, 3, num_samples=2, logits_processor=processors, eos_token_id=-1)
    assert len(processors[0].scores) == 3


def test_the_model_is_as_it_was():
    model = lm.lora()
    posterior, ids = lm.posterior_around(model, 1e-3), lm.ids("The ").unsqueeze(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base, state = type(model.get_base_model()), torch.get_rng_state()
    posterior.generate({"input_ids": ids}, 4, num_samples=2, do_sample=True)
    assert type(model.get_base_model()) is base
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("name", "value"), [("num_beams", 4), ("use_cache", False), ("return_dict_in_generate", True)])
def test_what_is_not_drawn_token_by_token_is_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .* for text by a posterior, got {value}"):
        lm.posterior_around(lm.lora(), 1e-3).generate({"input_ids": lm.ids("The ").unsqueeze(0)}, **{name: value})


def test_a_model_without_generate_is_refused():
    with pytest.raises(
        ValueError, match="`posterior` must be over a causal language model of transformers, got Linear"
    ):
        lm.posterior_around(torch.nn.Linear(3, 2), 1e-3).generate({"input_ids": torch.ones(1, 3, dtype=torch.long)})
