"""On linear-Gaussian problems the posterior is known: 100 random ones, in batches, through the whole filter in float32.

The faults looked for are those of a library that scales its information with the learning rate or the batch: variances
off by a factor, means that depend on the split.
"""

import pytest
import torch
from oracles import linear_posterior
from torch import nn

import bayes_kf as bkf

SEEDS = range(100)


def problem(seed):
    """Random sizes, scales and splits: inputs, targets, noise variance, prior variance, model, batch size."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=g))  # noqa: E731
    features, examples, size = draw(1, 9), draw(5, 60), draw(1, 13)
    scale = 10 ** torch.empty(features).uniform_(-0.5, 0.5, generator=g)
    x = torch.randn(examples, features, generator=g) * scale
    noise_var, prior_var = (float(10 ** torch.empty(()).uniform_(-1, 1, generator=g)) for _ in range(2))
    truth = torch.randn(features, 1, generator=g) * prior_var**0.5
    y = x @ truth + noise_var**0.5 * torch.randn(examples, 1, generator=g)
    torch.manual_seed(seed)
    return x, y, noise_var, prior_var, nn.Linear(features, 1, bias=False), size


def fitted(seed, **settings):
    """The filter's posterior, and the exact mean and covariance in float64."""
    x, y, noise_var, prior_var, model, size = problem(seed)
    config = bkf.KalmanConfig(likelihood="gaussian", noise_variance=noise_var, initial_variance=prior_var, **settings)
    posterior = bkf.fit(model, list(zip(x.split(size), y.split(size), strict=True)), config, progress=False)
    start = model.weight[0].detach().double()
    prior = prior_var * torch.eye(len(start)).double()
    return posterior, *linear_posterior(x.double(), y[:, 0].double(), start, prior, noise_var)


@pytest.mark.parametrize(
    "settings",
    [{"covariance": "full"}, {"covariance": "low_rank", "rank": 8}, {"covariance": "block_diagonal"}],
    ids=["full", "low_rank", "block_diagonal"],
)
def test_exact_beliefs_are_exact(settings):
    """The one tensor is one block; with rank 8 and at most 8 features nothing is cut off."""
    for seed in SEEDS:
        posterior, mean, covariance = fitted(seed, **settings)
        sd = covariance.diagonal().sqrt()
        ratio = posterior.variance_vector.double() / covariance.diagonal()
        assert float(ratio.min()) > 0.95, f"seed {seed}: {ratio}"
        assert float(ratio.max()) < 1.05, f"seed {seed}: {ratio}"
        off = (posterior.mean_vector.double() - mean).abs() / sd
        assert float(off.max()) < 0.1, f"seed {seed}: {off} posterior sds"


def test_diagonal_beliefs_keep_their_bounds():
    """Information and mixed: 1/Λ_jj, never above the exact variance. Gain: between those and the prior's.

    Undamped: the information form's mean overshoots where features are correlated, and the guard would put less
    precision into its variance too.
    """
    forms = ("diagonal", "diagonal_information", "diagonal_mixed")
    for seed in SEEDS:
        actual = {form: fitted(seed, covariance=form, damping=False) for form in forms}
        _, _, covariance = actual["diagonal"]
        precision = torch.linalg.inv(covariance).diagonal()
        for form in ("diagonal_information", "diagonal_mixed"):
            variance = actual[form][0].variance_vector.double()
            torch.testing.assert_close(variance, 1.0 / precision, rtol=1e-4, atol=0.0)
            assert (variance <= covariance.diagonal() * (1 + 1e-4)).all()
        gain = actual["diagonal"][0].variance_vector.double()
        assert (gain >= (1.0 / precision) * (1 - 1e-4)).all()
        assert (gain <= problem(seed)[3]).all()


def test_diagonal_means_are_not_exact_but_no_worse_than_the_prior_s():
    """In prior sds, root mean square over the 100 problems: the gain and mixed forms' means against the exact one's."""
    for form in ("diagonal", "diagonal_mixed"):
        squares = []
        for seed in SEEDS:
            posterior, mean, _ = fitted(seed, covariance=form)
            squares.append(((posterior.mean_vector.double() - mean).square() / problem(seed)[3]).mean())
        assert float(torch.stack(squares).mean().sqrt()) < 0.5
