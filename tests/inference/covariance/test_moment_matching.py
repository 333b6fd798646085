"""Beliefs with the moments of draws, in every structure."""

import pytest
import torch

from bayes_kf.inference.covariance.moment_matching import moment_matched
from bayes_kf.inference.covariance.structure import STRUCTURES

G = torch.Generator().manual_seed(0)
N = 6
DRAWS = 2.0 + torch.randn(80, N, generator=G).double() @ torch.randn(N, N, generator=G).double()


def start(name, rank=3, sizes=(2, 4)):
    zeros = torch.zeros(N).double()
    return STRUCTURES[name].from_variance(zeros, zeros + 1, rank=rank, block_sizes=list(sizes))


@pytest.mark.parametrize("name", STRUCTURES)
def test_mean_and_marginal_variances_are_those_of_the_draws(name):
    belief = moment_matched(start(name), DRAWS)
    torch.testing.assert_close(belief.mean, DRAWS.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(belief.marginal_variance(), DRAWS.var(0), rtol=1e-9, atol=0.0)
    assert type(belief) is STRUCTURES[name]


def test_covariances_are_kept_as_far_as_the_structure_goes():
    cov = torch.cov(DRAWS.T)
    torch.testing.assert_close(moment_matched(start("full"), DRAWS).covariance_matrix(), cov, rtol=1e-12, atol=1e-12)
    blocks = moment_matched(start("block_diagonal"), DRAWS).covariance_matrix()
    torch.testing.assert_close(blocks[:2, :2], cov[:2, :2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(blocks[2:, 2:], cov[2:, 2:], rtol=1e-12, atol=1e-12)
    assert not blocks[:2, 2:].any()
    for rank in (N - 1, N, N + 3):
        whole = moment_matched(start("low_rank", rank), DRAWS)
        assert whole.factor.shape == (N, rank)
        torch.testing.assert_close(whole.covariance_matrix(), cov, rtol=1e-9, atol=1e-9)


def test_more_columns_are_nearer_to_the_covariance():
    """In Kullback-Leibler divergence from N(0, C)."""
    cov = torch.cov(DRAWS.T)

    def divergence(belief):
        ratio = torch.linalg.solve(belief.covariance_matrix(), cov)
        return 0.5 * float(ratio.trace() - N - torch.linalg.slogdet(ratio).logabsdet)

    beliefs = [moment_matched(start("diagonal"), DRAWS)]
    beliefs += [moment_matched(start("low_rank", rank), DRAWS) for rank in (1, 3, 5)]
    divergences = [divergence(belief) for belief in beliefs]
    assert divergences == sorted(divergences, reverse=True)


def test_a_low_rank_precision_is_recovered():
    """Draws from a belief of the structure: the moments of many draws are near its own."""
    mean, diagonal = torch.arange(N).double(), torch.rand(N, generator=G).double() + 0.5
    belief = STRUCTURES["low_rank"].from_precision(mean, diagonal, 3 * torch.randn(N, 2, generator=G).double())
    draws = mean + belief.root()(torch.randn(200_000, N, generator=G).double())
    cov = belief.covariance_matrix()
    actual = moment_matched(start("low_rank", N), draws).covariance_matrix()
    error = ((cov.square() + torch.outer(cov.diagonal(), cov.diagonal())) / 200_000).sqrt()
    assert ((actual - cov).abs() < 5 * error).all()


@pytest.mark.parametrize(("name", "needed"), [("full", 7), ("low_rank", 7), ("block_diagonal", 5), ("diagonal", 2)])
def test_too_few_draws_are_refused(name, needed):
    message = rf"`samples` must hold at least {needed} draws for a \w+ of this size, got {needed - 1}"
    with pytest.raises(ValueError, match=message):
        moment_matched(start(name), DRAWS[: needed - 1])
    moment_matched(start(name), DRAWS[:needed])


def test_degenerate_draws_are_refused():
    constant = DRAWS.clone()
    constant[:, 1] = 3.0
    with pytest.raises(ValueError, match="`samples` must vary in every number, got 1 without variance"):
        moment_matched(start("diagonal"), constant)
    with pytest.raises(ValueError, match="`samples` must have a positive definite covariance, got a singular one"):
        moment_matched(start("full"), torch.cat([DRAWS[:, :5], DRAWS[:, :1]], 1))
