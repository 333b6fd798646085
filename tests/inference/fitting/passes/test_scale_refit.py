"""σ² of Student-t noise at a fixed mean: SciPy's fixed point, and that of Gaussian noise if ν is large."""

import pytest
import scipy.stats
import torch
from torch import nn

import bayes_kf as bkf
from bayes_kf.inference.fitting.passes import noise_refit
from bayes_kf.inference.fitting.passes.scale_refit import refit_from_errors, refit_scale
from bayes_kf.models.likelihood import StudentT

G = torch.Generator().manual_seed(0)
X = torch.randn(300, 4, generator=G).double()
WEIGHT = torch.randn(4, 1, generator=G).double()
Y = X @ WEIGHT + StudentT(torch.tensor(0.04).double(), 4.0).sample(torch.zeros(300, 1).double(), G)
Y[::40] += 10.0
LOADER = list(zip(X.split(10), Y.split(10), strict=True))
SETTINGS = {"noise_variance": "estimated", "covariance": "full", "initial_variance": 1.0, "likelihood": "student_t"}


def fit(**settings):
    torch.manual_seed(0)
    return bkf.fit(nn.Linear(4, 1, bias=False).double(), LOADER, bkf.KalmanConfig(**(SETTINGS | settings)))


def test_it_is_the_maximum_of_the_likelihood_up_to_the_effective_parameters():
    posterior = fit()
    state = refit_scale(posterior.kf, posterior.state, LOADER)
    errors = (Y - X @ posterior.mean_vector.view(4, 1))[:, 0]
    _, _, scale = scipy.stats.t.fit(errors.numpy(), fdf=4.0, floc=0.0)
    gamma = noise_refit.effective_parameters(state)
    assert 3.9 < gamma < 4.0
    assert float(state.noise.variance) == pytest.approx(scale**2 * 300 / (300 - gamma), rel=0.02)
    torch.testing.assert_close(state.belief.mean, posterior.mean_vector)


def test_with_many_degrees_of_freedom_it_is_that_of_gaussian_noise():
    state = fit().state
    errors = Y - X @ state.belief.mean.view(4, 1)
    actual = refit_from_errors(state, errors, 1e9)
    expected = noise_refit.refit_from_residuals(state, errors.square().sum(0), 300)
    torch.testing.assert_close(actual.noise.variance, expected.noise.variance, rtol=1e-4, atol=0)


def test_mean_passes_end_near_the_truth_in_spite_of_outliers():
    posterior = fit(mean_passes=3)
    assert float((posterior.mean_vector - WEIGHT[:, 0]).norm()) < 0.06
    assert float(posterior.likelihood.noise_variance) ** 0.5 == pytest.approx(0.2, rel=0.2)


def test_it_is_left_alone_if_it_is_given():
    posterior = fit(noise_variance=0.3, mean_passes=1)
    assert float(posterior.likelihood.noise_variance) == pytest.approx(0.3)
    assert refit_scale(posterior.kf, posterior.state, LOADER) is posterior.state


def test_a_trained_adapter_needs_a_given_scale():
    with pytest.raises(
        ValueError, match=r"^`noise_variance` must be a number for `likelihood` 'student_t' with `start`"
    ):
        bkf.fit(nn.Linear(4, 1).double(), LOADER, bkf.KalmanConfig(**SETTINGS), start="trained")
