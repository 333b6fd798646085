"""Ordered classes: probabilities, score and Fisher information against their definitions, autograd and SciPy."""

import math

import pytest
import torch
from scipy.special import expit
from torch import nn
from torch.autograd.functional import jacobian

from bayes_kf.models.likelihood import Ordinal
from bayes_kf.models.likelihoods.ordinal import OrdinalHead

G = torch.Generator().manual_seed(0)
OUTPUTS = torch.randn(7, 4, generator=G).double()  # five classes
TARGETS = torch.tensor([0, 1, 2, 3, 4, 0, 2])
FAMILY = Ordinal()


def by_definition(outputs):
    """Differences of σ(γ_k), γ = η_0, η_0 + exp η_1, …, by SciPy."""
    logits = torch.cat([outputs[..., :1], outputs[..., 1:].exp()], -1).cumsum(-1)
    below = torch.as_tensor(expit(logits.numpy()))
    ends = torch.zeros_like(below[..., :1])
    return torch.cat([ends, below, ends + 1.0], -1).diff(dim=-1)


def test_probabilities_are_differences_of_cumulative_ones():
    probs = by_definition(OUTPUTS)
    torch.testing.assert_close(FAMILY.mean(OUTPUTS), probs, rtol=1e-12, atol=1e-14)
    expected = probs.gather(1, TARGETS[:, None]).squeeze(1).log()
    torch.testing.assert_close(FAMILY.log_prob(OUTPUTS, TARGETS), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(FAMILY.log_prob(OUTPUTS.expand(2, 7, 4), TARGETS), expected.expand(2, 7))
    torch.testing.assert_close(FAMILY.distribution(OUTPUTS).log_prob(TARGETS), expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(FAMILY.correct(OUTPUTS, TARGETS), (probs.argmax(1) == TARGETS).double())


def test_far_outputs_keep_their_digits():
    """Where σ(b) − σ(a) would cancel: both far in a tail, against the tail's exponential, and a gap of 1e-9."""
    far = torch.tensor([[40.0, 0.0, 0.0], [-45.0, 0.0, 0.0], [0.5, math.log(1e-9), 0.0]]).double()
    far[2, 1] = math.log(1e-9)
    between = FAMILY.log_prob(far, torch.tensor([1, 1, 1]))
    inside = math.log(1.0 - 1.0 / math.e)  # log(σ(41) − σ(40)), log(σ(−44) − σ(−45)) and log(σ(½ + 1e-9) − σ(½))
    expected = [-40.0 + inside, -44.0 + inside, math.log(1e-9 * expit(0.5) * expit(-0.5))]
    torch.testing.assert_close(between, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)
    assert torch.isfinite(FAMILY.residual(far, torch.tensor([1, 1, 1]))).all()
    tiny = torch.tensor([[0.0, -200.0, 1.0]])
    assert torch.isfinite(FAMILY.log_prob(tiny, torch.tensor([1]))).all()
    assert torch.isfinite(FAMILY.whiten(tiny.double(), torch.tensor([1]))[1]).all()


def test_the_score_is_autograd_s():
    for label in range(5):
        targets = torch.full((7,), label)
        gradient = jacobian(lambda eta: FAMILY.log_prob(eta, targets).sum(), OUTPUTS)  # noqa: B023
        torch.testing.assert_close(FAMILY.residual(OUTPUTS, targets), gradient, rtol=1e-10, atol=1e-12)


def test_whitening_gives_the_score_and_the_expected_information():
    """Σ_k π_k A_k A_kᵀ over the classes, with every label's own u; full rank K − 1."""
    probs = by_definition(OUTPUTS)
    scores = torch.stack([FAMILY.residual(OUTPUTS, torch.full((7,), label)) for label in range(5)], 1)
    information = torch.einsum("bk,bki,bkj->bij", probs, scores, scores)
    for label in range(5):
        factor, residual = FAMILY.whiten(OUTPUTS, torch.full((7,), label))
        assert factor.shape == (7, 4, 4)
        torch.testing.assert_close(factor.mT @ factor, information, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close((factor.mT @ residual.unsqueeze(-1)).squeeze(-1), scores[:, label])
    assert bool((torch.linalg.eigvalsh(information) > 0).all())


def test_the_information_is_the_curvature_on_average():
    """−E ∂² log p/∂η², whose classes autograd differentiates twice."""
    probs = by_definition(OUTPUTS[:1])[0]
    factor, _ = FAMILY.whiten(OUTPUTS[:1], TARGETS[:1])

    def of_class(label):
        return lambda eta: FAMILY.log_prob(eta[None], torch.tensor([label]))[0]

    hessians = [torch.autograd.functional.hessian(of_class(label), OUTPUTS[0]) for label in range(5)]
    expected = -sum(prob * hessian for prob, hessian in zip(probs, hessians, strict=True))
    torch.testing.assert_close(factor[0].mT @ factor[0], expected, rtol=1e-8, atol=1e-10)


def test_a_mixture_has_the_mean_probabilities_and_draws_have_them_too():
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    several = torch.stack([OUTPUTS, OUTPUTS.flip(0), 2.0 * OUTPUTS - 1.0])
    mixed = FAMILY.mean(FAMILY.mixture(several, weights.log()))
    torch.testing.assert_close(mixed, torch.einsum("g,gbk->bk", weights, FAMILY.mean(several)), rtol=1e-9, atol=1e-12)
    drawn = FAMILY.sample(OUTPUTS[:1].expand(40_000, 1, 4), torch.Generator().manual_seed(0))
    shares, probs = drawn.flatten().bincount(minlength=5) / 40_000, by_definition(OUTPUTS[:1])[0]
    assert bool(((shares - probs).abs() < 5.0 * (probs / 40_000).sqrt()).all())


def test_the_head_turns_a_score_into_cumulative_logits():
    head = OrdinalHead(nn.Linear(3, 1).double(), 4, frequencies=[2, 1, 4, 3])
    x = torch.randn(6, 3, generator=G).double()
    scores = head.model(x).detach()
    shares = torch.tensor([0.2, 0.3, 0.7]).double()
    torch.testing.assert_close(head.cutpoints(), shares.logit())
    below = FAMILY.mean(head(x).detach()).cumsum(1)[:, :-1]
    torch.testing.assert_close(below, (shares.logit() - scores).sigmoid())
    assert [name for name, tensor in head.named_parameters() if tensor.requires_grad] == [
        "model.weight",
        "model.bias",
        "ordered.bias",
    ]
    moved = head.ordered.bias.detach() + torch.tensor([1.0, 0.5, -0.5]).double()
    assert bool((head.cutpoints(moved).diff() > 0).all())


def test_malformed_ordered_classes_are_refused():
    with pytest.raises(ValueError, match="`likelihood` ordinal needs an output fewer than classes, at least 2, got 1"):
        FAMILY.check(torch.zeros(2, 1), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"`targets` must lie in 0\.\.4 for 4 outputs, got 0\.\.5"):
        FAMILY.check(OUTPUTS[:2], torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="`targets` must be integer class labels, got dtype"):
        FAMILY.check(OUTPUTS[:2], torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="`num_classes` must be a whole number >= 3, got 2"):
        OrdinalHead(nn.Linear(3, 1), 2)
    with pytest.raises(ValueError, match=r"`frequencies` must be 3 positive numbers, got \[1, 0, 2\]"):
        OrdinalHead(nn.Linear(3, 1), 3, [1, 0, 2])
    with pytest.raises(ValueError, match="`model` must return one score an example, got 2"):
        OrdinalHead(nn.Linear(3, 2), 3)(torch.zeros(1, 3))
