"""Text by the posterior predictive."""

import dataclasses
import functools
import inspect
import types

import language_models as lm
import pytest
import torch
from peft import PromptTuningConfig
from transformers import GPT2LMHeadModel

import bayes_kf as bkf
from bayes_kf.inference.predictive import generation
from bayes_kf.models.language import NextToken, next_token_examples

CACHE = "cache" if "cache" in inspect.signature(GPT2LMHeadModel.forward).parameters else "past_key_values"


def posterior_of(model, scale):
    """A belief around the model's present tensors."""
    config = bkf.KalmanConfig(covariance="diagonal", initial_variance=scale, bound_prior=False, temperature=1.0)
    kf = bkf.KalmanFilter(NextToken(model), config)
    return bkf.Posterior(kf, kf.init())


def prompt(model, count=3, length=9):
    torch.manual_seed(4)
    return torch.randint(1, model.config.vocab_size, (count, length))


@pytest.mark.parametrize("make", [lm.lora, lm.llama])
def test_without_uncertainty_it_is_the_models_own_greedy_text(make):
    model = make()
    ids = prompt(model)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # padded on the left
    found = posterior_of(model, 1e-12).generate({"input_ids": ids, "attention_mask": mask}, 12, num_samples=2)
    expected = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=0
    )[:, ids.shape[1] :]
    assert torch.equal(found.tokens[:, : expected.shape[1]], expected)
    assert float(found.mutual_information.max()) < 1e-4
    assert found.written.shape == found.tokens.shape


def test_uncertainty_is_that_of_the_drawn_adapters_read_one_by_one():
    """Against whole forward passes without a cache."""
    model = lm.llama()
    posterior, ids = posterior_of(model, 0.02), prompt(model)
    found = posterior.generate({"input_ids": ids}, 6, num_samples=4, eos_token_id=-1)
    draws = posterior.sample(4, torch.Generator().manual_seed(posterior.config.seed))
    for step in range(6):
        whole, spoken = torch.cat([ids, found.tokens[:, :step]], 1), []
        for draw in draws:
            inputs = {"input_ids": whole, "place": torch.full((len(ids),), whole.shape[1] - 1)}
            spoken.append(posterior.adapter.outputs(draw, inputs).double().softmax(-1))
        mean = torch.stack(spoken).mean(0)
        entropy = -(mean * mean.log()).sum(-1)
        agreed = torch.stack([-(p * p.log()).sum(-1) for p in spoken]).mean(0)
        assert torch.equal(found.tokens[:, step], mean.argmax(-1))
        torch.testing.assert_close(found.entropy[:, step], entropy, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.mutual_information[:, step], entropy - agreed, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found.log_prob[:, step], mean.max(-1).values.log(), rtol=1e-4, atol=1e-5)
    assert float(found.mutual_information.min()) > 1e-3
    torch.testing.assert_close(found.sequence_log_prob, found.log_prob.sum(1))
    torch.testing.assert_close(found.sequence_entropy, found.entropy.mean(1))
    torch.testing.assert_close(found.sequence_mutual_information, found.mutual_information.mean(1))


def test_a_softmax_temperature_divides_the_tokens_logits():
    model = lm.llama()
    posterior, ids = posterior_of(model, 0.02), prompt(model)
    kf = bkf.KalmanFilter(posterior.adapter, dataclasses.replace(posterior.config, softmax_temperature=0.5))
    found = bkf.Posterior(kf, posterior.state).generate({"input_ids": ids}, 5, num_samples=3)
    handle = model.register_forward_hook(lambda _module, _args, out: setattr(out, "logits", out.logits / 0.5))
    expected = posterior.generate({"input_ids": ids}, 5, num_samples=3)
    handle.remove()
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.entropy, expected.entropy)
    assert float((found.entropy - posterior.generate({"input_ids": ids}, 5, num_samples=3).entropy).abs().max()) > 0.01


def test_a_text_ends_and_nothing_is_counted_after_it():
    model = lm.lora()
    start = torch.stack([lm.ids("Changed in version 3.1"), lm.ids("The following are spec")])
    found = posterior_of(model, 1e-4).generate({"input_ids": start}, 60, num_samples=3, pad_token_id=7)
    ends = [row.tolist().index(lm.END) for row in found.tokens if lm.END in row.tolist()]
    assert ends  # some text ended
    for row, written, entropy in zip(found.tokens, found.written, found.entropy, strict=True):
        length = int(written.sum())
        assert bool(written[:length].all())
        assert not bool(written[length:].any())
        assert bool((row[length:] == 7).all())
        assert float(entropy[length:].abs().sum()) == 0.0
        assert lm.END not in row[: length - 1].tolist()


def test_draws_of_text_follow_the_seed():
    posterior, ids = posterior_of(lm.lora(), 1e-3), lm.ids("The ").unsqueeze(0)
    texts = [
        posterior.generate({"input_ids": ids}, 20, sample=True, generator=torch.Generator().manual_seed(seed)).tokens
        for seed in (0, 0, 1)
    ]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_a_phrase_that_was_learned_is_written():
    read = NextToken(lm.lora())
    text = lm.ids("the kalman filter; " * 60)[: 32 * 32].view(32, 32)
    config = bkf.KalmanConfig(curvature="sampled")
    posterior = bkf.fit(read, next_token_examples(text, text), config, progress=False)
    kf = bkf.KalmanFilter(read, config)
    before = bkf.Posterior(kf, kf.init(next(iter(next_token_examples(text, text))).inputs))
    start = {"input_ids": lm.ids("the kalman filter; the ka").unsqueeze(0)}
    learned, untaught = (p.generate(start, 15, num_samples=4) for p in (posterior, before))
    texts = ["".join(lm.LETTERS[token] for token in found.tokens[0].tolist()) for found in (learned, untaught)]
    assert texts[0] == "lman filter; the kalman filter;"[:15] != texts[1]
    assert float(learned.sequence_entropy) < float(untaught.sequence_entropy)


def test_bad_arguments_are_named():
    posterior = posterior_of(lm.llama(), 1e-3)
    ids = torch.ones(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"`inputs` must be a mapping with `input_ids` of shape"):
        posterior.generate(ids)
    with pytest.raises(ValueError, match=r"`max_new_tokens` must be a whole number >= 1, got 0"):
        posterior.generate({"input_ids": ids}, 0)
    with pytest.raises(ValueError, match=r"`num_samples` must be a whole number >= 1, got 0"):
        posterior.generate({"input_ids": ids}, num_samples=0)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    with pytest.raises(ValueError, match=r"`inputs` must be padded on the left"):
        posterior.generate({"input_ids": ids, "attention_mask": mask})


@pytest.mark.parametrize("make", [lm.lora, lm.llama])
def test_a_shared_prompt_is_read_once_by_the_mean_adapter(make, monkeypatch):
    """Against the mean's cache, taken by hand, and each draw going on from it."""
    model = make()
    posterior, ids = posterior_of(model, 0.01), prompt(model)
    mask = torch.ones_like(ids)
    mask[2, :4] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    widths, run = [], type(model.base_model.model).forward

    @functools.wraps(run)
    def counted(self, *args, **kwargs):
        widths.append(kwargs["input_ids"].shape[1])
        return run(self, *args, **kwargs)

    monkeypatch.setattr(type(model.base_model.model), "forward", counted)
    found = posterior.generate(given, 5, num_samples=3, eos_token_id=-1, shared_prompt=True)
    assert widths == [8] + [1] * 15
    draws = posterior.sample(3, torch.Generator().manual_seed(posterior.config.seed))
    adapter, places = posterior.adapter, (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad(), adapter.eval_mode():
        caches = []
        for _ in draws:
            with adapter.substituted(adapter.tensors(posterior.mean_vector)):
                out = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=places[:, :-1])
            caches.append(getattr(out, CACHE))
        token, place = ids[:, -1:], places[:, -1:]
        for step in range(5):
            mask_now, spoken = torch.cat([mask, mask.new_ones(len(ids), step)], 1), []
            for draw, cache in zip(draws, caches, strict=True):
                with adapter.substituted(adapter.tensors(draw)):
                    extra = {CACHE: cache, "position_ids": place + step}
                    out = model(input_ids=token, attention_mask=mask_now, **extra)
                spoken.append(out.logits[:, -1].double().softmax(-1))
            mean = torch.stack(spoken).mean(0)
            token = mean.argmax(-1, keepdim=True)
            assert torch.equal(found.tokens[:, step], token.squeeze(-1))
            torch.testing.assert_close(found.entropy[:, step], -(mean * mean.log()).sum(-1), rtol=1e-5, atol=1e-6)
    apart = posterior.generate(given, 5, num_samples=3, eos_token_id=-1)
    assert float((apart.entropy - found.entropy).abs().max()) > 1e-4  # what sharing leaves out


@pytest.mark.parametrize(("name", "other"), [("cache", "past_key_values"), ("past_key_values", "cache")])
def test_a_models_own_name_of_its_cache_is_used(name, other):
    """transformers renamed it in 5.24; models of both kinds are read."""
    named = torch.nn.Identity()
    named.forward = {"cache": lambda input_ids, cache: None, "past_key_values": lambda past_key_values: None}[name]
    assert generation._cache_argument(named) == name
    out = types.SimpleNamespace(**{name: "kept", other: None})
    assert generation._kept(out) == "kept"
    assert generation._kept(types.SimpleNamespace(**{name: "kept"})) == "kept"
    assert generation._kept(types.SimpleNamespace()) is None


def test_a_shared_prompt_of_one_token_is_read_by_each_draw():
    posterior, ids = posterior_of(lm.lora(), 1e-3), torch.tensor([[5], [9]])
    shared, apart = (posterior.generate({"input_ids": ids}, 4, num_samples=2, shared_prompt=s) for s in (True, False))
    assert torch.equal(shared.tokens, apart.tokens)
    torch.testing.assert_close(shared.entropy, apart.entropy)


def test_any_of_several_tokens_ends_a_text():
    model = lm.llama()
    posterior, ids = posterior_of(model, 1e-12), prompt(model)
    free = posterior.generate({"input_ids": ids}, 8, num_samples=2, eos_token_id=-1)
    ends = [int(free.tokens[0, 2]), int(free.tokens[1, 4])]
    model.generation_config.eos_token_id = ends
    for found in (
        posterior.generate({"input_ids": ids}, 8, num_samples=2),
        posterior.generate({"input_ids": ids}, 8, num_samples=2, eos_token_id=ends),
    ):
        for text, written in zip(free.tokens, found.written, strict=True):
            places = torch.isin(text, torch.tensor(ends)).nonzero()
            length = int(places[0]) + 1 if len(places) else 8
            assert int(written.sum()) == min(length, written.numel())
    with pytest.raises(ValueError, match="`eos_token_id` must be a token's number or several, got 'end'"):
        posterior.generate({"input_ids": ids}, 8, num_samples=2, eos_token_id="end")


def test_virtual_tokens_are_refused():
    """With a cache, PEFT would put them in front of every new token, or drop the cache: other text, silently."""
    posterior = posterior_of(lm.with_prompt(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)), 1e-12)
    with pytest.raises(
        ValueError, match="`posterior` must be over weights to generate text, got an adapter of virtual"
    ):
        posterior.generate({"input_ids": torch.tensor([[3, 4]])}, 2)
