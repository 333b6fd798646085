"""Tokens with labels of their own: rows, updates and predictions of a linear tagger, against dense matrices."""

import pytest
import torch
from scipy.linalg import hadamard
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForTokenClassification, LlamaConfig, LlamaForCausalLM

import bayes_kf as bkf
from bayes_kf.inference.predictive.token_predictions import at_places
from bayes_kf.models.batch import split_batch
from bayes_kf.models.language import LabelledTokens, SupervisedTokens, token_reading
from bayes_kf.models.likelihoods.tokens import COUNT, HITS, LOG_PROB

CLASSES, FEATURES = 4, 3


class Tagger(nn.Module):
    """Logits of every token's class that are linear in the parameters and depend on the token and the one before."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.features = nn.Embedding.from_pretrained(torch.randn(6, FEATURES, generator=generator).double())
        self.head = nn.Linear(FEATURES, CLASSES, bias=False).double()
        nn.init.normal_(self.head.weight, generator=generator)

    def mixed(self, input_ids):
        features = self.features(input_ids)
        return features + 0.5 * features.roll(1, 1)

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.head(self.mixed(input_ids))}


def batch(size=3, length=6, seed=0):
    """Sequences whose first token is special, with padding on the right of the last one."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, (size, length), generator=generator)
    labels, mask = torch.randint(CLASSES, (size, length), generator=generator), torch.ones_like(ids)
    mask[-1, -2:] = 0
    labels[:, 0], labels[mask == 0] = -100, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def dense(model, given):
    """Of all N labelled tokens: the Jacobian of the logits (N, C, n), the logits (N, C) and the labels (N,)."""
    chosen = given["labels"] >= 0
    features = model.mixed(given["input_ids"])[chosen]
    jacobian = torch.einsum("cd,nf->ncdf", torch.eye(CLASSES).double(), features).flatten(2)
    return jacobian, model.head(features).detach(), given["labels"][chosen]


def fisher(logits):
    probs = logits.softmax(-1)
    return torch.diag_embed(probs) - probs.unsqueeze(-1) * probs.unsqueeze(-2)


@pytest.fixture
def orthogonal_signs(monkeypatch):
    """Signs of 32 probes whose outer products average to the identity exactly: rows of a Hadamard matrix."""
    signs = torch.from_numpy(hadamard(32)).double()

    def of_probe(like, seed, probe, start):
        return signs[probe, : like.numel()].view(like.shape).to(like, copy=True)

    monkeypatch.setattr("bayes_kf.models.language.token_scores._signs", of_probe)


def filter_of(model, probes=32):
    settings = {"covariance": "full", "initial_variance": 0.05, "temperature": 1.0, "curvature_draws": probes}
    config = bkf.KalmanConfig(likelihood="tokens", curvature="sampled", damping=False, **settings)
    return bkf.KalmanFilter(LabelledTokens(model, num_probes=probes), config)


def test_statistics_are_those_of_each_tokens_own_label():
    model, given = Tagger(), batch()
    outputs = LabelledTokens(model).run(given)
    _, logits, labels = dense(model, given)
    sequence = (given["labels"] >= 0).nonzero()[:, 0]
    for number in range(3):
        own = sequence == number
        log_prob = logits[own].log_softmax(-1).gather(1, labels[own, None]).sum()
        torch.testing.assert_close(outputs[number, LOG_PROB], log_prob)
        assert outputs[number, HITS] == (logits[own].argmax(-1) == labels[own]).sum()
        assert outputs[number, COUNT] == own.sum()


def test_an_update_has_the_precision_of_all_labelled_tokens(orthogonal_signs):
    """Σ_t J_tᵀ F_t J_t over B·T tokens, and the gradient Σ_t J_tᵀ(e_y − π_t), against dense float64 matrices."""
    model, given = Tagger(), batch()
    kf = filter_of(model)
    start = kf.init()
    after, info = kf.update(start, *split_batch(given))
    J, logits, labels = dense(model, given)
    precision = torch.eye(J.shape[-1]).double() / 0.05 + torch.einsum("tvn,tvw,twk->nk", J, fisher(logits), J)
    torch.testing.assert_close(kf.posterior(after).covariance_matrix().inverse(), precision)
    probs, sequence = logits.softmax(-1), (given["labels"] >= 0).nonzero()[:, 0]
    residual = nn.functional.one_hot(labels, CLASSES) - probs
    for number, loss in enumerate(info.log_loss.tolist()):
        own = sequence == number
        of_labels = probs[own].gather(1, labels[own, None])
        assert loss == pytest.approx(-float(of_labels.log().sum()))
        gradient = torch.einsum("tv,tvn->n", residual[own], J[own])
        precision = precision + torch.outer(gradient, gradient) / float((1 / of_labels - 1).sum())
    gradient = torch.einsum("tv,tvn->n", residual, J)
    torch.testing.assert_close(after.belief.mean - start.belief.mean, torch.linalg.solve(precision, gradient))


def test_ignored_places_change_nothing():
    model, given = Tagger(), batch()
    kf = filter_of(model, probes=2)
    expected, _ = kf.update(kf.init(), *split_batch(given))
    other = dict(given, labels=torch.where(given["labels"] < 0, -1, given["labels"]))  # another negative number
    actual, _ = kf.update(kf.init(), *split_batch(other))
    assert torch.equal(actual.belief.mean, expected.belief.mean)
    ids = given["input_ids"].clone()
    ids[-1, -1] = 5 - ids[-1, -1]  # padding that no labelled token sees
    actual, _ = kf.update(kf.init(), *split_batch(dict(given, input_ids=ids)))
    assert torch.equal(actual.belief.mean, expected.belief.mean)


def test_predictions_are_of_every_labelled_token():
    """By "linearized" against moments of the dense Gaussian; of the mean exactly; without labels of all tokens."""
    model, given = Tagger(), batch(seed=1)
    kf = filter_of(model, probes=2)
    posterior = kf.posterior(kf.update(kf.init(), *split_batch(batch()))[0])
    inputs, targets = split_batch(given)
    J, _, labels = dense(model, given)
    logits = (J @ posterior.mean_vector).double()
    at_mean = posterior.predict(inputs, method="mean", targets=targets)
    torch.testing.assert_close(at_mean.probs, logits.softmax(-1))
    torch.testing.assert_close(at_mean.log_prob, logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1))
    linearized = posterior.predict(inputs, num_samples=4000, targets=targets)
    sampled = posterior.predict(inputs, method="sampled", num_samples=4000)
    root = torch.linalg.cholesky(J @ posterior.covariance_matrix() @ J.mT + 1e-12 * torch.eye(CLASSES))
    normal = torch.randn(len(labels), CLASSES, 40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = (logits.unsqueeze(-1) + root @ normal).softmax(1).mean(-1)
    for prediction in (linearized, sampled):
        error = prediction.samples.std(0) * (1 / 4000 + 1 / 40_000) ** 0.5
        assert bool(((prediction.probs - expected).abs() <= 5.0 * error).all())
        torch.testing.assert_close(prediction.entropy, prediction.aleatoric + prediction.epistemic)
    expected_log = linearized.probs.gather(1, labels[:, None]).log().squeeze(1)
    torch.testing.assert_close(linearized.log_prob, expected_log)
    unlabelled = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    everywhere = posterior.predict(unlabelled, method="mean")
    placed = at_places(everywhere.probs, unlabelled, None)
    assert everywhere.probs.shape == (int(given["attention_mask"].sum()), CLASSES)
    torch.testing.assert_close(placed[given["labels"] >= 0], at_mean.probs)
    assert not placed[given["attention_mask"] == 0].any()


def test_predictions_of_a_loader_and_the_report_are_over_labelled_tokens():
    model, batches = Tagger(), [batch(seed=n, size=4, length=5 + n % 2) for n in range(6)]
    batches[2]["labels"][:] = -100  # a batch without any labelled token
    kf = filter_of(model, probes=2)
    posterior = kf.posterior(kf.update(kf.init(), *split_batch(batch()))[0])
    prediction = posterior.predict_loader(batches)
    labels = torch.cat([one["labels"][one["labels"] >= 0] for one in batches])
    assert torch.equal(prediction.targets, labels)
    assert prediction.probs.shape == (len(labels), CLASSES)
    report = bkf.evaluate(posterior, batches, num_simulations=39)
    assert report.scores["accuracy"] == pytest.approx(float((prediction.probs.argmax(1) == labels).double().mean()))
    assert report.scores["nll"] == pytest.approx(-float(prediction.log_prob.double().mean()), rel=1e-5)
    mixture = bkf.MixturePosterior((posterior, posterior), (0.5, 0.5), posterior.history)
    for method in ("linearized", "sampled"):
        assert mixture.predict_loader(batches, method=method).probs.shape == prediction.probs.shape


def test_the_contributions_of_tensors_are_of_the_variance_of_the_logits(orthogonal_signs, monkeypatch):
    monkeypatch.setattr("bayes_kf.inference.predictive.output_variance.PROBES", 32)
    model, given = Tagger(), batch()
    kf = filter_of(model)
    posterior = kf.posterior(kf.init())
    J, logits, _ = dense(model, given)
    F = fisher(logits)
    expected = torch.einsum("tvw,twn,tvn->", F, J, J) * 0.05 / F.diagonal(dim1=1, dim2=2).sum()
    assert posterior.output_variance(given)["head.weight"] == pytest.approx(float(expected))


def test_the_reading_of_a_model_of_transformers():
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertConfig(vocab_size=10, num_labels=3, **small)
    assert isinstance(token_reading(BertForTokenClassification(bert)), LabelledTokens)
    assert isinstance(token_reading(BertForMaskedLM(bert)), LabelledTokens)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=10, num_key_value_heads=2, **small))
    assert isinstance(token_reading(llama, 3), SupervisedTokens)
    assert token_reading(llama, 3).with_probes(2).num_probes == 2
    assert isinstance(token_reading(Tagger()), SupervisedTokens)  # nothing is known of it


def test_what_cannot_be_predicted_or_learned():
    model, given = Tagger(), batch()
    kf = filter_of(model, probes=2)
    posterior = kf.posterior(kf.init())
    with pytest.raises(ValueError, match="`method` must be 'linearized', 'sampled' or 'mean' for labels of tokens"):
        posterior.predict(given, method="probit")
    with pytest.raises(ValueError, match="`labels` must be below the model's 4 logits, got 4"):
        posterior.predict(dict(given, labels=given["labels"] + 1), method="mean")
    with pytest.raises(ValueError, match="`labels` must be below the model's 4 logits, got 4"):
        kf.update(kf.init(), *split_batch(dict(given, labels=torch.where(given["labels"] == 3, 4, given["labels"]))))
    with pytest.raises(ValueError, match=r"`labels` must be of the shape .* of `input_ids`, \(3, 6\), got \(3, 5\)"):
        kf.update(kf.init(), given | {"labels": None}, given["labels"][:, :5])
    with pytest.raises(ValueError, match="`inputs` must be a mapping with input_ids"):
        posterior.predict(torch.zeros(2, 3))
