"""Fits of text: the default, the size of its covariance, saving, and batches that cannot be learned."""

import math

import language_models as lm
import pytest
import torch
from scipy.linalg import hadamard
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

import bayes_kf as bkf
from bayes_kf.inference.heldout import text_size
from bayes_kf.inference.heldout.heldout_examples import heldout_batches
from bayes_kf.models.batch import split_batch
from bayes_kf.models.language import NextToken, OptionTokens, SupervisedTokens
from bayes_kf.models.likelihoods.tokens import COUNT, LOG_PROB

SHIFT = 7  # of the letters of a text that the model has not seen


def batches(count, seed=0, size=4, length=24):
    """English with every letter replaced by another; the first four letters of a text are its prompt."""
    text, generator = lm.english(), torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        starts = torch.randint(len(text) - length, (size,), generator=generator)
        ids = torch.stack([text[s : s + length] for s in starts])
        ids = torch.where(ids > 0, (ids + SHIFT) % len(lm.LETTERS), ids)
        labels = ids.clone()
        labels[:, :4] = -100
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


def nats_a_token(posterior, given):
    reading = SupervisedTokens(posterior.adapter.model)
    outputs = torch.cat([reading.outputs(posterior.mean_vector, batch) for batch in given])
    return -float(outputs[:, LOG_PROB].sum() / outputs[:, COUNT].sum())


def test_the_default_fit_of_a_loaders_text(tmp_path):
    model, train, test = lm.lora(), batches(24), batches(6, seed=1)
    kf = bkf.KalmanFilter(model, bkf.KalmanConfig(likelihood="tokens", curvature="sampled"))
    start = nats_a_token(kf.posterior(kf.init()), test)
    posterior = bkf.fit(model, train, progress=False)
    assert posterior.config.likelihood == "tokens"
    assert posterior.state.examples == 96
    assert nats_a_token(posterior, test) < start - 1.0
    value, low, high = posterior.history["size"].tolist()
    assert low <= value <= high
    sampled = text_size.sampled_text_losses(posterior, heldout_batches(posterior, test)).sum() / (24 * 20)
    assert float(sampled) < nats_a_token(posterior, test) + 0.1  # drawn adapters still write
    posterior.save_pretrained(tmp_path)
    opened = bkf.Posterior.from_pretrained(tmp_path, lm.base())
    assert isinstance(opened.adapter, SupervisedTokens)
    assert torch.equal(opened.mean_vector, posterior.mean_vector)
    more = opened.kf.posterior(opened.kf.update(opened.state, *split_batch(test[0]))[0])
    assert nats_a_token(more, test[:1]) < nats_a_token(posterior, test[:1])


def test_a_stream_of_text_is_learned_in_one_pass():
    train, test = batches(40), batches(6, seed=1)
    posterior = bkf.fit(lm.lora(), iter(train), progress=False)
    losses = posterior.history["log_loss"]
    assert len(losses) == 160
    assert float(losses[-40:].mean()) < float(losses[:40].mean()) - 5.0
    assert nats_a_token(posterior, test) < float(losses[:40].mean()) / 20


class Stopped(Exception):
    """A stream that ends as a machine does."""


def test_a_resumed_text_fit_equals_an_uninterrupted_one(tmp_path):
    train = batches(12)
    whole = bkf.fit(lm.lora(), train, checkpoint=tmp_path / "whole", every=4, progress=False)

    def stopping(seen=0):
        for batch in train:
            if seen == 9:
                raise Stopped
            seen += 1
            yield batch

    with pytest.raises(Stopped):
        bkf.fit(lm.lora(), stopping(), checkpoint=tmp_path / "stopped", every=4, progress=False)
    resumed = bkf.fit(lm.lora(), train, checkpoint=tmp_path / "stopped", every=4, progress=False)
    assert resumed.state.examples == 48
    assert torch.equal(resumed.mean_vector, whole.mean_vector)
    assert torch.equal(resumed.state.belief.factor, whole.state.belief.factor)
    assert torch.equal(resumed.history["log_loss"], whole.history["log_loss"])


def test_readings_of_a_posterior_over_text():
    posterior = bkf.fit(lm.lora(), iter(batches(4)), progress=False)
    ids = batches(1, seed=2)[0]["input_ids"]
    options = posterior.with_adapter(OptionTokens(posterior.adapter.model, [3, 4]))
    assert options.config.likelihood == "categorical"
    assert options.predict({"input_ids": ids}).probs.shape == (4, 2)
    assert options.with_adapter(SupervisedTokens(posterior.adapter.model)).config == posterior.config
    assert posterior.generate({"input_ids": ids[:, :5]}, max_new_tokens=3).tokens.shape == (4, 3)
    with pytest.raises(ValueError, match="`predict` needs a reading of the next token or of options"):
        posterior.predict({"input_ids": ids})


class Bigram(nn.Module):
    """Logits of the next token that are linear in the parameters."""

    def __init__(self):
        super().__init__()
        features = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
        self.features, self.head = nn.Embedding.from_pretrained(features), nn.Linear(3, 4, bias=False).double()
        nn.init.normal_(self.head.weight, generator=torch.Generator().manual_seed(1))

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.head(self.features(input_ids))}


def test_the_joint_likelihood_is_laplaces_of_all_tokens(monkeypatch):
    """With orthogonal signs in place of random ones, against dense matrices."""
    signs = torch.from_numpy(hadamard(32)).double()
    monkeypatch.setattr(text_size, "PROBES", 32)
    monkeypatch.setattr(
        "bayes_kf.models.language.token_scores._signs",
        lambda like, seed, probe, start: signs[probe, : like.numel()].view(like.shape).to(like, copy=True),
    )
    model, ids = Bigram(), torch.randint(4, (3, 8), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[:, :2] = -100
    kf = bkf.KalmanFilter(
        model,
        bkf.KalmanConfig(
            likelihood="tokens", curvature="sampled", covariance="full", initial_variance=0.3, temperature=1.0
        ),
    )
    given = {"input_ids": ids, "labels": labels}
    posterior = kf.posterior(kf.update(kf.init(), *split_batch(given))[0])
    actual = text_size.joint_log_likelihoods([posterior], heldout_batches(posterior, [given]))
    P, head = posterior.covariance_matrix(), posterior.mean["head.weight"].requires_grad_()
    logits = model.features(ids[:, 1:-1]).flatten(0, 1) @ head.mT
    log_prob = logits.log_softmax(-1).gather(1, ids[:, 2:].reshape(-1, 1)).sum()
    (gradient,) = torch.autograd.grad(log_prob, head)
    probs = logits.softmax(-1).detach()
    blocks = torch.diag_embed(probs) - probs.unsqueeze(-1) * probs.unsqueeze(-2)
    x = model.features(ids[:, 1:-1]).flatten(0, 1)
    F = torch.einsum("tvw,ti,tj->viwj", blocks, x, x).reshape(12, 12)
    g = gradient.flatten()
    expected = log_prob + 0.5 * g @ torch.linalg.solve(P.inverse() + F, g) - 0.5 * torch.logdet(torch.eye(12) + F @ P)
    assert float(actual[0]) == pytest.approx(expected.item(), rel=1e-6)


def test_bad_batches_of_text():
    model, train = lm.lora(), batches(8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hidden = [batch | {"labels": torch.full_like(batch["labels"], -100)} for batch in train]
    with pytest.raises(ValueError, match=r"`labels` must have a token to learn, got −100 everywhere"):
        bkf.fit(model, iter(hidden), progress=False)
    beyond = [batch | {"labels": batch["labels"] + len(lm.LETTERS)} for batch in train]
    with pytest.raises(ValueError, match=f"`labels` must be below the model's {len(lm.LETTERS)} logits, got"):
        bkf.fit(model, iter(beyond), progress=False)
    with pytest.raises(ValueError, match="the tokens of a language model need `likelihood` 'tokens'"):
        bkf.fit(NextToken(model), [({"input_ids": b["input_ids"], "place": torch.zeros(4).long()}, b["labels"])
                                   for b in train], bkf.KalmanConfig(curvature="sampled"), progress=False)  # fmt: skip
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    classifier = BertForSequenceClassification(BertConfig(vocab_size=len(lm.LETTERS), **small))
    with pytest.raises(
        ValueError, match=r"`model` must return logits of shape \(sequences, tokens, classes\) .*, got \(\d+, 2\)"
    ):
        bkf.fit(classifier, train, progress=False)
    translator = T5ForConditionalGeneration(
        T5Config(vocab_size=len(lm.LETTERS), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match=r"`model` must be a causal language model, or one .*, got T5ForConditional"):
        bkf.fit(translator, train, progress=False)
    with pytest.raises(ValueError, match="`curvature` must be 'sampled' for `likelihood` 'tokens', got 'exact'"):
        bkf.KalmanConfig(likelihood="tokens")
    config = bkf.KalmanConfig(likelihood="tokens", curvature="sampled", curvature_draws=2)
    with pytest.raises(ValueError, match="`num_probes` must be the 2 `curvature_draws` of the config, got 1"):
        bkf.KalmanFilter(SupervisedTokens(model), config)
    with pytest.raises(
        ValueError, match="`model` must be a module, SupervisedTokens or LabelledTokens for `likelihood` 'tokens'"
    ):
        bkf.KalmanFilter(NextToken(model), config)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_head_is_applied_at_the_places_that_are_read():
    model, columns = lm.llama(), []
    model.get_base_model().lm_head.register_forward_hook(lambda module, inputs, output: columns.append(output.shape[1]))
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[:, 6:] = ids[:, 6:]
    reading = SupervisedTokens(model)
    part = reading.outputs(reading.vector(), {"input_ids": ids, "labels": labels})[:, LOG_PROB]
    with torch.no_grad():
        log_probs = model(ids).logits.log_softmax(-1)[:, 5:8].gather(-1, ids[:, 6:, None]).sum((1, 2))
    torch.testing.assert_close(part, log_probs)
    OptionTokens(model, [1, 2]).outputs(reading.vector(), {"input_ids": ids})
    assert columns == [3, 9, 1]


def test_the_sign_of_a_probe_depends_on_the_sequence():
    """Probes of the same text with other seeds differ; with the same seed they are equal."""
    model, (given,) = lm.lora(), batches(1, size=2)
    reading = SupervisedTokens(model)
    kf = bkf.KalmanFilter(model, bkf.KalmanConfig(likelihood="tokens", curvature="sampled", temperature=1.0))
    start = kf.init(given)
    first, _ = kf.update(start, *split_batch(given))
    again, _ = kf.update(start, *split_batch(given))
    later, _ = kf.update(start._replace(examples=10), *split_batch(given))
    assert torch.equal(first.belief.mean, again.belief.mean)
    assert not torch.equal(kf.marginal_variance(first), kf.marginal_variance(later))
    assert math.isfinite(nats_a_token(kf.posterior(first), [given]))
    assert reading.num_probes == 1


def test_a_sequence_without_learned_tokens_changes_nothing():
    (given,) = batches(1, size=3)
    given["labels"][2] = -100
    kf = bkf.KalmanFilter(lm.lora(), bkf.KalmanConfig(likelihood="tokens", curvature="sampled", temperature=1.0))
    start = kf.init({name: values[:2] for name, values in given.items()})
    with_it, info = kf.update(start, *split_batch(given))
    without, _ = kf.update(start, *split_batch({name: values[:2] for name, values in given.items()}))
    torch.testing.assert_close(with_it.belief.mean, without.belief.mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(kf.marginal_variance(with_it), kf.marginal_variance(without), rtol=1e-4, atol=1e-8)
    assert info.log_loss[2] == 0.0
