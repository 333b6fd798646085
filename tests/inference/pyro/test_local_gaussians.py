"""Local Gaussian terms: their moments against brute force, and exact posteriors of one number."""

import pyro.distributions as dist
import pytest
import torch

from bayes_kf.inference import Horseshoe
from bayes_kf.inference.covariance.diagonal import DiagonalGaussian
from bayes_kf.inference.covariance.full import FullGaussian
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.measurement_model.noise import NoiseState
from bayes_kf.inference.pyro.local_gaussians import _tilted_moments, prior_of, reevaluated
from bayes_kf.inference.pyro.site_priors import SitePrior

ONE = torch.ones(()).double()
STUDENTS = [0.5, 1.0, 3.0, 30.0, 1000.0]
CASES = [("Laplace", None), ("Horseshoe", None), *[("StudentT", df) for df in STUDENTS]]


def density_of(family, df, mean=0.0, scale=1.0):
    mean, scale = mean * ONE, scale * ONE
    if family == "StudentT":
        return dist.StudentT(df * ONE, mean, scale)
    return {"Laplace": dist.Laplace, "Horseshoe": Horseshoe, "Normal": dist.Normal}[family](mean, scale)


def site(family, df, size, mean=0.0, scale=1.0):
    full = [None if value is None else torch.full((size,), value).double() for value in (mean, scale, df)]
    return SitePrior("site", family, *full)


def brute_force(density, cavity_mean, cavity_prec, centre=0.0):
    """Moments of N(c, 1/τ) times a density, on a grid that is dense around the density's spike and at the cavity."""
    wide = torch.sinh(torch.linspace(-36, 36, 400_001, dtype=torch.float64)) * 1e-12
    near = cavity_mean + cavity_prec**-0.5 * torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    grid = torch.cat([wide + centre, near]).unique()
    grid = grid[grid != centre]
    log = density.log_prob(grid) - 0.5 * cavity_prec * (grid - cavity_mean) ** 2
    weight = (log - log.max()).exp()

    def integral(values):
        return torch.trapezoid(values, grid)

    total = integral(weight)
    mean = integral(weight * grid) / total
    return mean, integral(weight * (grid - mean) ** 2) / total


@pytest.mark.parametrize(("family", "df"), CASES)
def test_moments_of_cavity_and_prior(family, df):
    c = torch.tensor([0.0, 0.3, -2.0, 8.0, 60.0]).double()
    for precision in (1e-2, 1.0, 1e4):
        actual = _tilted_moments(site(family, df, 5), c, torch.full_like(c, precision))
        expected = [brute_force(density_of(family, df), float(value), precision) for value in c]
        mean, variance = (torch.stack(part) for part in zip(*expected, strict=True))
        torch.testing.assert_close(actual[0], mean, rtol=1e-5, atol=1e-6)  # of the grid
        torch.testing.assert_close(actual[1], variance, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("family", "df"), CASES)
def test_one_number_has_the_exact_posterior(family, df):
    prior = site(family, df, 1, mean=0.5, scale=0.4)
    for observed, precision in ((1.5, 3.0), (0.4, 50.0), (-6.0, 20.0)):
        start = prior_of([prior])
        belief = FullGaussian.from_variance(start.mean, start.variance)
        lam = 1 / start.variance[0] + precision
        mean = (start.mean[0] / start.variance[0] + precision * observed) / lam
        belief = FullGaussian(mean.view(1), (1 / lam).view(1, 1))
        state = FilterState(belief, start, NoiseState(), None, True, 1, 1)
        for _ in range(3):  # each call ends at a relative change of 1e-4
            state = reevaluated(state, [prior])
        exact_mean, exact_var = brute_force(density_of(family, df, 0.5, 0.4), observed, precision, 0.5)
        torch.testing.assert_close(state.belief.mean[0], exact_mean, rtol=1e-4, atol=1e-5)
        largest = torch.minimum(exact_var, ONE / precision)  # without a term of negative precision
        torch.testing.assert_close(state.belief.covariance[0, 0], largest, rtol=1e-3, atol=1e-8)


def test_moments_before_any_data():
    priors = [site("Normal", None, 1, 1.0, 2.0), site("Laplace", None, 1, 2.0, 0.5), site("StudentT", 4.0, 1, 0.0, 1.0)]
    priors += [site("StudentT", 1.0, 1, 0.0, 2.0), site("Horseshoe", None, 1, 0.0, 3.0)]
    start = prior_of(priors)
    assert start.mean.tolist() == [1.0, 2.0, 0.0, 0.0, 0.0]
    assert start.variance.tolist() == [4.0, 0.5, 2.0, 40.0, 90.0]


def test_numbers_without_data_and_normal_ones_keep_their_terms():
    priors = [site("Normal", None, 2), site("Horseshoe", None, 2), site("Laplace", None, 2)]
    start = prior_of(priors)
    state = FilterState(FullGaussian.from_variance(*start), start, NoiseState(), None, True, 1, 1)
    after = reevaluated(state, priors)
    assert torch.equal(after.belief.mean, start.mean)
    torch.testing.assert_close(after.belief.covariance.diagonal(), start.variance, rtol=1e-12, atol=0.0)
    assert reevaluated(state, [site("Normal", None, 6)]) is state


def test_terms_in_single_precision_are_those_in_double_precision():
    prior = site("Laplace", None, 4, scale=0.3)
    data = torch.tensor([1e-3, 1.0, 1e3, 1e5]).double()  # precision of an observation of 0.7
    results = []
    for dtype in (torch.float64, torch.float32):
        start = DiagonalGaussian(*(part.to(dtype) for part in prior_of([prior])))
        lam = 1 / start.variance + data.to(dtype)
        belief = DiagonalGaussian((0.7 * data).to(dtype) / lam, 1 / lam)
        state = FilterState(belief, start, NoiseState(), None, True, 1, 1)
        results.append(reevaluated(reevaluated(state, [prior]), [prior]).belief)
    double, single = results
    assert single.mean.dtype == torch.float32
    torch.testing.assert_close(single.mean.double(), double.mean, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(single.variance.double(), double.variance, rtol=1e-3, atol=0.0)
