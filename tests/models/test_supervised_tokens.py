"""The learned tokens of sequences: rows of their Jacobian, and updates, against dense matrices."""

import language_models as lm
import pytest
import torch
from scipy.linalg import hadamard
from torch import nn

import bayes_kf as bkf
from bayes_kf.inference.linearization.linearizer import Linearizer
from bayes_kf.models.batch import Batch, split_batch
from bayes_kf.models.language import SupervisedTokens
from bayes_kf.models.likelihoods.tokens import COUNT, HITS, LOG_PROB, SPREAD, STATISTICS, UNCERTAINTY


class Bigram(nn.Module):
    """A language model whose logits are linear in its parameters: those of the next token depend on the last one."""

    def __init__(self, vocabulary=5, features=3):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.features = nn.Embedding.from_pretrained(torch.randn(vocabulary, features, generator=generator).double())
        self.head = nn.Linear(features, vocabulary, bias=False).double()
        nn.init.zeros_(self.head.weight)

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.head(self.features(input_ids))}


def batch(vocabulary=5, size=3, length=7, seed=0):
    """Sequences with a prompt of two tokens, and padding on the right of the last one."""
    ids = torch.randint(vocabulary, (size, length), generator=torch.Generator().manual_seed(seed))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[-1, -2:] = 0
    labels[:, :2] = -100
    labels[mask == 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def dense(model, given):
    """The Jacobian of all learned tokens' logits, (N, V, n), the labels (N,) and their sequences (N,), by autograd."""
    read = SupervisedTokens(model)
    parameters = [model.get_parameter(name) for name in read.names]
    logits = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
    logits = logits["logits"][:, :-1]
    following = given["labels"][:, 1:]
    places = (following >= 0).nonzero()
    rows, kept = [], logits[places[:, 0], places[:, 1]]
    for token in kept:
        for logit in token:
            gradients = torch.autograd.grad(logit, parameters, retain_graph=True, allow_unused=True)
            pairs = zip(gradients, parameters, strict=True)
            rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]))
    jacobian = torch.stack(rows).view(len(places), logits.shape[-1], -1)
    return jacobian, kept.detach(), following[places[:, 0], places[:, 1]], places[:, 0]


def fisher(logits):
    probs = logits.softmax(-1)
    return torch.diag_embed(probs) - probs.unsqueeze(-1) * probs.unsqueeze(-2)


@pytest.mark.parametrize("columns", [2, 10**6])  # of the vocabulary at once: chunks of one token, and of all
def test_statistics_and_the_gradient_are_those_of_a_loop_over_tokens(columns, monkeypatch):
    monkeypatch.setattr("bayes_kf.models.language.token_scores.CHUNK", columns)
    model, given = lm.llama(), batch(50)
    read = SupervisedTokens(model)
    J, logits, labels, sequence = dense(model, given)
    linearized = Linearizer(read)(read.vector(), read.with_targets(Batch.of(*split_batch(given))))
    actual, rows = linearized.outputs, linearized.jacobian().dense()
    log_probs, probs = logits.log_softmax(-1), logits.softmax(-1)
    for number in range(3):
        own = sequence == number
        of_labels = log_probs[own, labels[own]]
        torch.testing.assert_close(actual[number, LOG_PROB], of_labels.sum(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(actual[number, UNCERTAINTY], (1 / of_labels.exp() - 1).sum(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            actual[number, SPREAD], (1 - probs[own].square().sum(-1)).sum(), rtol=1e-5, atol=1e-5
        )
        assert actual[number, HITS] == (logits[own].argmax(-1) == labels[own]).sum()
        assert actual[number, COUNT] == own.sum()
        residual = nn.functional.one_hot(labels[own], 50) - probs[own]
        torch.testing.assert_close(
            rows[number, LOG_PROB], torch.einsum("tv,tvn->n", residual, J[own]), rtol=1e-4, atol=1e-4
        )
        assert not rows[number, 1:STATISTICS].any()
    assert read.linearized_by == dict.fromkeys(read.names, "hooks")


@pytest.fixture
def orthogonal_signs(monkeypatch):
    """Signs of 32 probes whose outer products average to the identity exactly: rows of a Hadamard matrix."""
    signs = torch.from_numpy(hadamard(32)).double()

    def of_probe(like, seed, probe, start):
        return signs[probe, start * 5 :][: like.numel()].view(like.shape).to(like, copy=True)

    monkeypatch.setattr("bayes_kf.models.language.token_scores._signs", of_probe)


def test_orthogonal_probes_give_the_fisher_information_of_all_tokens_exactly(orthogonal_signs):
    model, given = Bigram(), batch()
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    J, logits, _, _ = dense(model, given)
    read = SupervisedTokens(model, num_probes=32)
    rows = Linearizer(read)(read.vector(), read.with_targets(Batch.of(*split_batch(given)))).jacobian().dense()
    probes = rows[:, STATISTICS:].flatten(0, 1)
    torch.testing.assert_close(probes.mT @ probes / 32, torch.einsum("tvn,tvw,twk->nk", J, fisher(logits), J))


def test_random_probes_average_to_the_fisher_information():
    """Signs of different sequences, tokens, probes and seeds are independent: four standard errors, every element."""
    model, given = Bigram(), batch()
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    J, logits, _, _ = dense(model, given)
    expected = torch.einsum("tvn,tvw,twk->nk", J, fisher(logits), J)
    read, draws = SupervisedTokens(model, num_probes=2), []
    linearize, theta = Linearizer(read), read.vector()
    for seed in range(0, 900, 3):
        rows = linearize(theta, read.with_targets(Batch.of(*split_batch(given)), seed)).jacobian().dense()
        sums = rows[:, STATISTICS:].sum(0)  # over the sequences: cross terms average to 0
        draws += [torch.outer(probe, probe) for probe in sums]
    draws = torch.stack(draws)
    error = (draws.mean(0) - expected).abs()
    assert bool((error <= 4.0 * draws.std(0) / len(draws) ** 0.5 + 1e-12).all())
    assert float(error.norm() / expected.norm()) < 0.2


def test_an_update_of_a_linear_model_has_the_precision_of_its_tokens_one_by_one(orthogonal_signs):
    """And the step of that precision, with that of the sum of whitened tokens added along each gradient."""
    model, given = Bigram(), batch(size=4)
    read = SupervisedTokens(model, num_probes=32)
    settings = {"covariance": "full", "initial_variance": 0.05, "temperature": 1.0, "curvature_draws": 32}
    config = bkf.KalmanConfig(likelihood="tokens", curvature="sampled", damping=False, **settings)
    kf = bkf.KalmanFilter(read, config)
    after, info = kf.update(kf.init(), *split_batch(given))
    J, logits, labels, sequence = dense(model, given)
    start = torch.eye(kf.adapter.num_parameters).double() / 0.05
    precision = start + torch.einsum("tvn,tvw,twk->nk", J, fisher(logits), J)
    torch.testing.assert_close(kf.posterior(after).covariance_matrix().inverse(), precision)
    probs = logits.softmax(-1)
    residual = nn.functional.one_hot(labels, 5) - probs
    for number, loss in enumerate(info.log_loss.tolist()):
        own = sequence == number
        of_labels = probs[own].gather(1, labels[own, None])
        assert loss == pytest.approx(-float(of_labels.log().sum()))
        gradient = torch.einsum("tv,tvn->n", residual[own], J[own])
        precision = precision + torch.outer(gradient, gradient) / float((1 / of_labels - 1).sum())
    gradient = torch.einsum("tv,tvn->n", residual, J)
    torch.testing.assert_close(after.belief.mean - read.vector(), torch.linalg.solve(precision, gradient))
