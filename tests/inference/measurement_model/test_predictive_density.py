"""log E p(y | η) against adaptive quadrature, closed forms and many independent draws."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate

from bayes_kf.inference.filtering import prequential_temperature
from bayes_kf.inference.measurement_model import predictive_density
from bayes_kf.models.likelihood import Bernoulli, Categorical, Gaussian, Poisson

GENERATOR_SEED = 3


def by_quadrature(log_prob, mean, variance):
    """−log ∫ p(y | η) N(η; mean, variance) dη by SciPy, in pieces about the integrand's maximum."""
    sd = math.sqrt(variance)
    points = np.linspace(-60.0, 60.0, 120_001)
    values = log_prob(mean + sd * points) - 0.5 * points**2
    top, mode = values.max(), points[values.argmax()]
    reach = np.array([0.0, 0.1, 1.0, 10.0]) / (1.0 + sd)
    ends = np.concatenate([mode - reach, mode + reach, mode + np.array([-12.0, -1.0, 1.0, 12.0]), [-mean / sd]])
    ends = np.unique(ends.clip(mode - 12.0, mode + 12.0))
    total = sum(
        integrate.quad(lambda e: math.exp(log_prob(mean + sd * e) - 0.5 * e * e - top), a, b, limit=200)[0]
        for a, b in itertools.pairwise(ends)
    )
    return 0.5 * math.log(2 * math.pi) - top - math.log(total)


def log_sigmoid(odds):
    return -np.logaddexp(0.0, -odds)


@pytest.mark.parametrize(
    ("variance", "tolerance"), [(0.01, 1e-7), (1.0, 1e-7), (25.0, 1e-5), (400.0, 2e-3), (1e4, 5e-3)]
)
def test_one_output_is_integrated_exactly(variance, tolerance):
    """Means of ±30 and standard deviations of up to 100 logits."""
    means = torch.tensor([-30.0, -8.0, -1.0, 0.0, 2.0, 30.0]).double()
    covariance = torch.full((6, 1, 1), variance).double()
    actual = predictive_density.log_loss(Bernoulli(), means[:, None], covariance, torch.ones(6, 1), [1.0])[0]
    expected = [by_quadrature(log_sigmoid, m, variance) for m in means.tolist()]
    torch.testing.assert_close(actual, torch.tensor(expected).double(), rtol=0, atol=tolerance)
    both = torch.cat([torch.zeros(6, 1), means[:, None]], 1).double()  # two classes: the same log odds
    spread = torch.tensor([[0.5, 0.2], [0.2, 0.9]]).double() * variance
    odds_var = float(spread[0, 0] + spread[1, 1] - 2 * spread[0, 1])
    for label in (0, 1):
        actual = predictive_density.log_loss(
            Categorical(), both, spread.expand(6, 2, 2), torch.full((6,), label), [1.0]
        )[0]
        sign = 2 * label - 1
        expected = [by_quadrature(log_sigmoid, sign * m, odds_var) for m in means.tolist()]
        torch.testing.assert_close(actual, torch.tensor(expected).double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("variance", "count"), [(0.01, 3.0), (1.0, 0.0), (25.0, 30.0), (100.0, 1.0)])
def test_counts_are_integrated_exactly(variance, count):
    means = torch.tensor([-6.0, 0.0, 3.0]).double()

    def log_prob(eta):
        return count * eta - np.exp(np.minimum(eta, 700.0)) - math.lgamma(count + 1)

    actual = predictive_density.log_loss(
        Poisson(), means[:, None], torch.full((3, 1, 1), variance), torch.full((3, 1), count), [1.0]
    )[0]
    expected = [by_quadrature(log_prob, m, variance) for m in means.tolist()]
    torch.testing.assert_close(actual, torch.tensor(expected).double(), rtol=0, atol=1e-4)


def example(num_outputs, size=60, sd=3.0):
    """Beliefs of ``sd`` logits whose labels are drawn from themselves."""
    generator = torch.Generator().manual_seed(GENERATOR_SEED)
    root = sd * torch.randn(size, num_outputs, num_outputs, generator=generator) / num_outputs**0.5
    outputs = sd * torch.randn(size, num_outputs, generator=generator)
    true = outputs + (root @ torch.randn(size, num_outputs, 1, generator=generator)).squeeze(-1)
    labels = torch.multinomial(true.softmax(-1), 1, generator=generator)[:, 0]
    return outputs, root, labels, generator


@pytest.mark.parametrize("num_outputs", [3, 10])
def test_classes_are_priced_without_bias(num_outputs):
    """The mean over examples, where 32 draws were too high by .01 to .04 and hot temperatures the most."""
    outputs, root, labels, generator = example(num_outputs)
    actual = predictive_density.log_loss(Categorical(), outputs, root @ root.mT, labels, prequential_temperature.GRID)
    count = 15_000
    noise = torch.randn(count, num_outputs, generator=generator)
    spread = torch.einsum("bij,sj->sbi", root, noise)
    for row, heat in zip(actual, prequential_temperature.GRID, strict=True):
        probs = Categorical().log_prob(outputs + heat**0.5 * spread, labels).double().exp()
        expected, error = -probs.mean(0).log(), probs.std(0) / probs.mean(0) / count**0.5
        assert abs(float((row - expected).mean())) < 2e-3 + 4.0 * float(error.mean())
        assert float((row - expected).square().mean().sqrt()) < 0.05 + 2.0 * float(error.square().mean().sqrt())


def test_no_price_depends_on_how_a_batch_was_cut():
    outputs, root, labels, _ = example(5, size=11)
    whole = predictive_density.log_loss(
        Categorical(), outputs, root @ root.mT, labels, prequential_temperature.GRID, 100
    )
    parts = [
        predictive_density.log_loss(
            Categorical(), outputs[a:b], (root @ root.mT)[a:b], labels[a:b], prequential_temperature.GRID, 100 + a
        )
        for a, b in ((0, 1), (1, 7), (7, 11))
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_outputs", [4, 50])
def test_alike_and_independent_outputs_make_a_density(num_outputs):
    """Probabilities of all labels add up to one."""
    outputs = torch.linspace(-3.0, 3.0, num_outputs).expand(num_outputs, -1)
    labels, variance = torch.arange(num_outputs), torch.full((num_outputs,), 4.0)
    losses = predictive_density.isotropic_log_loss(
        Categorical(), outputs, variance, labels, prequential_temperature.GRID
    )
    torch.testing.assert_close(
        (-losses).exp().sum(1), torch.ones(len(prequential_temperature.GRID)).double(), rtol=0, atol=0.02
    )
    direct = predictive_density.log_loss(
        Categorical(),
        outputs,
        4.0 * torch.eye(num_outputs).expand(num_outputs, -1, -1),
        labels,
        prequential_temperature.GRID,
    )
    torch.testing.assert_close(losses, direct, rtol=0, atol=1e-4)


def test_several_answers_are_priced_together():
    """Of answers that vary together the joint probability, as predictions have it; of independent ones the product."""
    outputs, targets = torch.tensor([[1.0, -2.0]]), torch.tensor([[1.0, 0.0]])
    each = [
        predictive_density.log_loss(
            Bernoulli(),
            outputs[:, j : j + 1],
            torch.full((1, 1, 1), 4.0),
            targets[:, j : j + 1],
            prequential_temperature.GRID,
        )
        for j in range(2)
    ]
    actual = predictive_density.log_loss(
        Bernoulli(), outputs, 4.0 * torch.eye(2)[None], targets, prequential_temperature.GRID
    )
    torch.testing.assert_close(actual, sum(each), rtol=0, atol=0.01)
    together = predictive_density.log_loss(Bernoulli(), outputs, torch.full((1, 2, 2), 4.0), targets, [1.0])
    shift = torch.linspace(-20.0, 20.0, 40_001).double()
    density = (-0.125 * shift.square()).exp() / (8 * math.pi) ** 0.5
    joint = (density * (1.0 + shift).sigmoid() * (2.0 - shift).sigmoid()).sum() * 1e-3
    assert float(together) == pytest.approx(-math.log(float(joint)), abs=0.01)


def test_gaussian_targets_have_a_closed_form():
    family = Gaussian(torch.tensor([0.5, 2.0]))
    outputs, root = torch.randn(3, 2).double(), torch.randn(3, 2, 2).double()
    targets, cov = torch.randn(3, 2).double(), root @ root.mT
    actual = predictive_density.log_loss(family, outputs, cov, targets, (0.1, 1.0))
    for row, heat in zip(actual, (0.1, 1.0), strict=True):
        total = heat * cov + torch.diag(family.noise_variance.double())
        expected = -torch.distributions.MultivariateNormal(outputs, total).log_prob(targets)
        torch.testing.assert_close(row, expected)
