"""The expansion point against a general-purpose optimizer, and what conditioning on it does."""

import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from bayes_kf.inference import KalmanConfig, KalmanFilter
from bayes_kf.inference.measurement_model.mode_expansion import expand_at_mode
from bayes_kf.models.likelihood import Bernoulli, Categorical, Gaussian, Poisson

CASES = {
    "categorical": (Categorical(), torch.tensor([2, 0])),
    "bernoulli": (Bernoulli(), torch.tensor([[1.0, 0, 1], [0, 0, 1]]).double()),
    "poisson": (Poisson(), torch.tensor([[4.0, 0, 1], [2, 7, 1]]).double()),
}


def problem(scale, seed=0):
    g = torch.Generator().manual_seed(seed)
    outputs = 3 * torch.randn(2, 3, generator=g).double()
    root = torch.randn(6, 6, generator=g).double()
    return outputs, scale * root @ root.T


@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("name", CASES)
def test_gradient_and_fisher_are_those_at_the_mode(name, scale):
    family, targets = CASES[name]
    outputs, cov = problem(scale)
    inverse = torch.linalg.inv(cov)

    def negative(flat):
        eta = torch.tensor(flat, dtype=torch.float64).view(2, 3).requires_grad_(True)
        step = (eta - outputs).reshape(-1)
        value = -family.log_prob(eta, targets).sum() + 0.5 * step @ inverse @ step
        (gradient,) = torch.autograd.grad(value, eta)
        return float(value.detach()), gradient.reshape(-1).numpy()

    actual = minimize(
        negative, outputs.reshape(-1).numpy(), jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 2000}
    )
    mode = torch.tensor(actual.x).view(2, 3)
    factor, residual, _ = expand_at_mode(family, outputs, targets, cov)
    torch.testing.assert_close(factor.mT @ factor, family.variance(mode), rtol=1e-4, atol=1e-5)
    gradient = (factor.mT @ residual.unsqueeze(-1)).squeeze(-1)
    expected = family.residual(mode, targets) + (family.variance(mode) @ (mode - outputs).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_gaussian_likelihood_needs_no_mode():
    outputs, cov = problem(1.0)
    family, targets = Gaussian(torch.tensor(0.5).double()), torch.zeros(2, 3).double()
    factor, residual, _ = expand_at_mode(family, outputs, targets, cov)
    plain_factor, plain_residual = family.whiten(outputs, targets)
    torch.testing.assert_close(factor, plain_factor)
    torch.testing.assert_close(residual, plain_residual, rtol=1e-9, atol=1e-9)


def test_a_confident_surprise_is_taken_to_the_map_not_past_it():
    """Logistic regression on one example: the filtered mean is the MAP; the plain filter overshoots it."""
    model = nn.Linear(2, 2, bias=False).double()
    nn.init.constant_(model.weight, 0.0)
    model.weight.data[0, 0] = 8.0  # says class 0 with certainty
    x, y = torch.tensor([[1.0, 0.5]]).double(), torch.tensor([1])
    margins = {}
    for expansion in ("mode", "mean"):
        kf = KalmanFilter(
            model, KalmanConfig(initial_variance=4.0, expansion=expansion, damping=False, covariance="full")
        )
        state, _ = kf.update(kf.init(), x, y)
        outputs = kf.adapter.outputs(state.belief.mean, x)[0]
        margins[expansion] = float(outputs[1] - outputs[0])
    spread = 2 * 4.0 * float(x.square().sum())  # prior variance of the margin
    grid = torch.linspace(-10, 10, 200_001).double()
    objective = nn.functional.logsigmoid(grid) - 0.5 * (grid + 8.0) ** 2 / spread
    assert margins["mode"] == pytest.approx(float(grid[objective.argmax()]), abs=1e-3)
    assert margins["mean"] > margins["mode"] + 1.0
