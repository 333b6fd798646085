"""The contribution of each tensor to the variance of the outputs, against dense J and P."""

import dataclasses

import pytest
import torch
from oracles import dense_jacobian
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bayes_kf as bkf

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(24, 3, generator=G).double(), torch.randint(4, (24,), generator=G)


def network(outputs: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def by_hand(posterior: bkf.Posterior, model: nn.Module, x: torch.Tensor, centred: bool) -> dict[str, float]:
    posterior.apply_to(model)
    _, jacobian = dense_jacobian(model, lambda m: m(x))
    rows = jacobian - jacobian.mean(dim=1, keepdim=True) if centred else jacobian
    covariance = posterior.temperature * posterior.covariance_matrix()
    actual = {}
    for name, where in posterior.adapter.slices().items():
        part = rows[..., where] @ covariance[where] @ rows.mT
        actual[name] = part.diagonal(dim1=1, dim2=2).mean().item()
    return actual


@pytest.mark.parametrize("covariance", ["full", "diagonal_mixed", "low_rank", "block_diagonal"])
def test_contributions_of_tensors_are_those_of_dense_matrices(covariance):
    config = bkf.KalmanConfig(covariance=covariance)
    posterior = bkf.fit(network(), DataLoader(TensorDataset(X, Y), batch_size=4), config, progress=False)
    actual = posterior.output_variance(X[:8])
    assert actual == pytest.approx(by_hand(posterior, network(), X[:8], centred=True), rel=1e-6)
    assert set(actual) == set(posterior.variance)
    outputs = posterior.predict(X[:8], "linearized", num_samples=20_000).samples.log()  # but for a shift of all classes
    drawn = (outputs - outputs.mean(2, keepdim=True)).var(0).mean().item()
    assert sum(actual.values()) == pytest.approx(drawn, rel=0.03)
    assert posterior.output_variance((X, Y)) == actual  # a batch with targets, of which eight are looked at


def test_a_linear_regression_has_its_predictive_variance():
    targets = torch.randn(24, 2, generator=G).double()
    model = nn.Linear(3, 2, bias=False).double()
    config = bkf.KalmanConfig(likelihood="gaussian", covariance="full", initial_variance=1.0, temperature=1.0)
    config = dataclasses.replace(config, noise_variance=0.5)
    posterior = bkf.fit(model, DataLoader(TensorDataset(X, targets), batch_size=4), config, progress=False)
    predictive = posterior.predict(X[:8]).variance
    assert predictive is not None
    noise = predictive - posterior.config.noise_variance
    assert posterior.output_variance(X[:8])["weight"] == pytest.approx(noise.mean().item(), rel=1e-6)
    expected = by_hand(posterior, nn.Linear(3, 2, bias=False).double(), X[:8], centred=False)
    assert posterior.output_variance(X[:8]) == pytest.approx(expected, rel=1e-6)


def test_many_outputs_are_sampled_evenly():
    model = network(outputs=40)
    targets = torch.randint(40, (24,), generator=G)
    posterior = bkf.fit(model, DataLoader(TensorDataset(X, targets), batch_size=8), bkf.KalmanConfig(), progress=False)
    whole = by_hand(posterior, network(outputs=40), X[:8], centred=True)
    for name, value in posterior.output_variance(X[:8]).items():
        assert value == pytest.approx(whole[name], rel=0.6)


def test_contributions_of_tensors_that_compensate_each_other_add_up_to_the_variance():
    """Two weights on the same input, whose sum alone is known: each by itself has a hundred times the variance."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.Linear(1, 1, bias=False).double() for _ in range(2))

        def forward(self, x):
            return self.first(x) + self.second(x)

    x = torch.ones(50, 1).double()
    config = bkf.KalmanConfig(
        likelihood="gaussian", covariance="full", initial_variance=1.0, noise_variance=1.0, temperature=1.0
    )
    posterior = bkf.fit(Twice(), [(x, torch.zeros(50, 1).double())], config, progress=False)
    actual = posterior.output_variance(x[:2])
    whole = 1.0 / (1.0 / 2.0 + 50.0)  # of the sum, whose prior variance is 2
    assert actual == pytest.approx({"first.weight": whole / 2, "second.weight": whole / 2}, rel=1e-9)
    alone = sum(variance.item() for variance in posterior.variance.values())
    assert alone > 40 * whole
