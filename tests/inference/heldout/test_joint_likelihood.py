"""The joint likelihood of correlated outputs, against closed forms, scikit-learn and a dense Laplace approximation."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax
from scipy.stats import multivariate_normal
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.gaussian_process.kernels import RBF, ConstantKernel

from bayes_kf.inference.heldout.joint_likelihood import joint_log_likelihood
from bayes_kf.models.likelihood import Bernoulli, Categorical, Gaussian, Poisson


def covariance(size, rank, seed, scale=1.0):
    root = torch.randn(size, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scale * root @ root.mT / rank


def test_gaussian_targets_have_the_exact_joint_density():
    outputs, targets = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    cov, noise = covariance(8, 5, 0), torch.tensor([0.3, 0.7], dtype=torch.float64)
    actual = joint_log_likelihood(Gaussian(noise), outputs, cov, targets, [0.5, 2.0])
    for t, value in zip([0.5, 2.0], actual.tolist(), strict=True):
        total = t * cov.numpy() + np.diag(np.tile(noise.numpy(), 4))
        assert value == pytest.approx(
            multivariate_normal(outputs.numpy().ravel(), total).logpdf(targets.numpy().ravel())
        )


@pytest.mark.parametrize("variance", [0.5, 4.0, 100.0])
def test_yes_no_answers_agree_with_sklearns_gaussian_process(variance):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(25, 2))
    y = (x[:, 0] + 0.5 * rng.normal(size=25) > 0).astype(int)
    kernel = ConstantKernel(variance) * RBF(1.0)
    peer = GaussianProcessClassifier(kernel, optimizer=None, max_iter_predict=1000).fit(x, y)
    zeros, targets = torch.zeros(25, 1, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)[:, None]
    actual = joint_log_likelihood(Bernoulli(), zeros, torch.tensor(kernel(x)), targets, [1.0])
    assert float(actual) == pytest.approx(peer.log_marginal_likelihood_value_, abs=1e-6)


def dense_laplace(outputs, cov, targets):
    """The same approximation by a general optimizer and dense matrices, over weights a with g = C a."""
    number, classes = outputs.shape

    def loss(a):
        g = (cov @ a).reshape(number, classes)
        return -log_softmax(outputs + g, 1)[np.arange(number), targets].sum() + 0.5 * a @ cov @ a

    best = minimize(loss, np.zeros(len(cov)), method="BFGS", options={"gtol": 1e-9, "maxiter": 10_000})
    probs = np.exp(log_softmax(outputs + (cov @ best.x).reshape(number, classes), 1))
    fisher = np.zeros_like(cov)
    for k, p in enumerate(probs):
        where = slice(k * classes, (k + 1) * classes)
        fisher[where, where] = np.diag(p) - np.outer(p, p)
    return -loss(best.x) - 0.5 * np.linalg.slogdet(np.eye(len(cov)) + cov @ fisher)[1]


@pytest.mark.parametrize("rank", [3, 18])  # the covariance of 6 examples of 3 classes may be singular
def test_classes_agree_with_a_dense_laplace_approximation(rank):
    outputs = 2.0 * torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cov, targets = covariance(18, rank, 2, scale=3.0), torch.tensor([0, 1, 2, 0, 1, 1])
    temperatures = [0.1, 1.0, 10.0]
    actual = joint_log_likelihood(Categorical(), outputs, cov, targets, temperatures).tolist()
    expected = [dense_laplace(outputs.numpy(), t * cov.numpy(), targets.numpy()) for t in temperatures]
    assert actual == pytest.approx(expected, abs=1e-4)


def test_without_correlation_it_is_a_sum_over_examples():
    outputs, targets = torch.randn(5, 1, dtype=torch.float64), torch.tensor([[0.0], [2.0], [1.0], [5.0], [0.0]])
    variance = torch.rand(5, dtype=torch.float64)
    joint = joint_log_likelihood(Poisson(), outputs, torch.diag(variance), targets, [1.0])
    each = [
        joint_log_likelihood(Poisson(), outputs[k : k + 1], variance[k].view(1, 1), targets[k : k + 1], [1.0])
        for k in range(5)
    ]
    assert float(joint) == pytest.approx(float(torch.stack(each).sum()), abs=1e-5)


def test_small_covariances_give_the_likelihood_at_the_mean():
    outputs, targets = torch.randn(4, 3, dtype=torch.float64), torch.tensor([2, 0, 1, 1])
    actual = joint_log_likelihood(Categorical(), outputs, covariance(12, 12, 0), targets, [1e-9])
    assert float(actual) == pytest.approx(float(Categorical().log_prob(outputs, targets).sum()), abs=1e-6)
