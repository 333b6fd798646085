"""S P S in every structure, against dense matrices."""

import pytest
import torch

from bayes_kf.inference.covariance.moment_matching import moment_matched
from bayes_kf.inference.covariance.rescaling import rescaled
from bayes_kf.inference.covariance.structure import STRUCTURES

G = torch.Generator().manual_seed(0)
N = 6
DRAWS = torch.randn(50, N, generator=G).double() @ torch.randn(N, N, generator=G).double()
SCALE = torch.rand(N, generator=G).double() + 0.3


def belief_of(name):
    start = STRUCTURES[name].from_variance(torch.zeros(N).double(), torch.ones(N).double(), rank=3, block_sizes=[2, 4])
    return moment_matched(start, DRAWS)


@pytest.mark.parametrize("name", STRUCTURES)
def test_it_multiplies_rows_and_columns(name):
    belief = belief_of(name)
    after = rescaled(belief, SCALE)
    expected = torch.outer(SCALE, SCALE) * belief.covariance_matrix()
    torch.testing.assert_close(after.covariance_matrix(), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(after.marginal_variance(), expected.diagonal(), rtol=1e-9, atol=0.0)
    torch.testing.assert_close(after.log_determinant(), torch.linalg.slogdet(expected).logabsdet, rtol=1e-9, atol=1e-9)
    root = after.root()(torch.eye(N).double())
    torch.testing.assert_close(root.T @ root, expected, rtol=1e-9, atol=1e-10)
    assert torch.equal(after.mean, belief.mean)
    assert type(after) is type(belief)


def test_another_structure_is_refused():
    with pytest.raises(ValueError, match="`belief` must have a covariance structure that can be rescaled, got object"):
        rescaled(object(), SCALE)
