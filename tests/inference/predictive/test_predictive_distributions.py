"""The closed forms of predictive distributions, against their definitions."""

import math

import pytest
import torch
from oracles import against_the_rest
from torch import nn

import bayes_kf as bkf
from bayes_kf.inference.covariance.gaussian_sampling import gaussian_draws
from bayes_kf.inference.predictive import predictive_distributions
from bayes_kf.models.likelihood import Categorical, Gaussian


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
def test_probit_of_each_class_against_the_rest(scale):
    """Also where one class has all but 1e-30 of the probability."""
    g = torch.Generator().manual_seed(0)
    outputs, root = scale * torch.randn(8, 6, generator=g).double(), torch.randn(8, 6, 6, generator=g).double()
    covariance = scale * root @ root.mT
    expected = against_the_rest(outputs, covariance)
    torch.testing.assert_close(probit_of(outputs, covariance), expected, rtol=1e-9, atol=1e-300)


def probit_of(outputs, covariance):
    return predictive_distributions.probit(Categorical(), outputs, covariance, None).probs


def test_probit_is_mackay_s_for_two_classes_and_close_to_draws_for_more():
    g = torch.Generator().manual_seed(0)
    outputs = 2.0 * torch.randn(20, 2, generator=g).double()
    root = torch.randn(20, 2, 2, generator=g).double()
    covariance = root @ root.mT
    apart = covariance[:, 0, 0] + covariance[:, 1, 1] - 2 * covariance[:, 0, 1]
    binary = ((outputs[:, 1] - outputs[:, 0]) / (1 + math.pi / 8 * apart).sqrt()).sigmoid()
    torch.testing.assert_close(probit_of(outputs, covariance)[:, 1], binary, rtol=1e-12, atol=1e-12)
    outputs = 2.0 * torch.randn(20, 5, generator=g).double()
    root = torch.randn(20, 5, 5, generator=g).double()
    covariance = root @ root.mT / 2
    draws = gaussian_draws(outputs, covariance, 40_000, torch.Generator().manual_seed(1))
    exact = draws.softmax(-1).mean(0)
    off, uncorrected = (0.5 * (p - exact).abs().sum(1) for p in (probit_of(outputs, covariance), outputs.softmax(-1)))
    assert float(off.mean()) < 0.5 * float(uncorrected.mean())
    assert float(off.mean()) < 0.06


def test_probit_ignores_a_common_shift_of_all_classes():
    g = torch.Generator().manual_seed(0)
    outputs, root = torch.randn(6, 4, generator=g).double(), torch.randn(6, 4, 4, generator=g).double()
    covariance = root @ root.mT
    expected = probit_of(outputs, covariance)
    torch.testing.assert_close(probit_of(outputs + 3.0, covariance + 50.0), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(expected.sum(1), torch.ones(6).double())


def test_probit_agrees_with_draws_although_one_direction_keeps_its_prior_variance():
    torch.manual_seed(0)
    x = torch.randn(1500, 2)
    y = torch.distributions.Categorical(logits=x @ torch.tensor([[2.0, -1.0], [0.0, 1.0]])).sample()
    config = bkf.KalmanConfig(covariance="full", initial_variance=4.0, temperature=1.0, bound_prior=False)
    batches = list(zip(x[:1000].split(10), y[:1000].split(10), strict=True))
    posterior = bkf.fit(nn.Linear(2, 2), batches, config, progress=False)
    by_draws, actual = (posterior.predict(x[1000:], m, num_samples=512).probs for m in ("linearized", "probit"))
    assert float((by_draws - actual).abs().max()) < 0.02


@pytest.mark.parametrize("variance", [1e-5, 1e-7])
def test_small_noise_beside_collinear_outputs_of_large_variance(variance):
    """In float32, whose rounding of J P Jᵀ is larger than the noise."""
    ones = torch.ones(1, 2, 2)
    family = Gaussian(torch.tensor(variance, dtype=torch.float64))
    actual = predictive_distributions.from_gaussian(family, torch.zeros(1, 2), 9.0 * ones, None, torch.zeros(1, 2))
    total = 9.0 * ones[0].double() + variance * torch.eye(2).double()
    expected = 0.5 * torch.logdet(2 * math.pi * math.e * total)
    assert float(actual.entropy) == pytest.approx(float(expected), abs=1e-3)
    rounded = 9.0 * ones - 1e-6 * torch.eye(2)  # as rounding may leave it
    assert bool(
        torch.isfinite(predictive_distributions.from_gaussian(family, torch.zeros(1, 2), rounded, None, None).entropy)
    )
