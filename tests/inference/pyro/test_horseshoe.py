"""The horseshoe distribution against quadrature of its mixture."""

import math

import pyro
import pytest
import torch
from pyro.infer import MCMC, NUTS
from scipy import integrate, special
from torch import Tensor

from bayes_kf.inference import Horseshoe

POINTS = [1e-6, 1e-3, 0.1, 0.5, 1.0, 1.4142135, 1.5, 3.0, 10.0, 100.0]


def mixture_density(value, scale):
    """∫ N(θ; 0, τ²λ²) 2/(π(1 + λ²)) dλ."""

    def integrand(local):
        width = scale * local
        normal = math.exp(-0.5 * (value / width) ** 2) / (math.sqrt(2 * math.pi) * width)
        return normal * 2 / math.pi / (1 + local**2)

    return integrate.quad(integrand, 0, math.inf, limit=500)[0]


@pytest.mark.parametrize("scale", [0.1, 0.7, 3.0])
def test_density_is_that_of_the_mixture(scale):
    value = torch.tensor(POINTS, dtype=torch.float64) * scale
    actual = Horseshoe(torch.zeros(()).double(), scale).log_prob(value)
    expected = torch.tensor([math.log(mixture_density(v, scale)) for v in value.tolist()]).to(value)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)  # of the quadrature
    u = 0.5 * (value / scale) ** 2
    closed = special.exp1(u[:-1].numpy()) * u[:-1].exp().numpy() / (scale * math.sqrt(2 * math.pi**3))
    torch.testing.assert_close(actual[:-1].exp(), torch.from_numpy(closed), rtol=1e-12, atol=0.0)


def test_tails_and_spike_stay_finite_in_single_precision():
    log_prob = Horseshoe(0.0, 1.0).log_prob(torch.tensor([1e-15, 1e-4, 1e4, 1e15]))
    assert torch.isfinite(log_prob).all()
    assert log_prob[2] == pytest.approx(math.log(2 / math.sqrt(2 * math.pi**3) / 1e8), rel=1e-5)  # K·2τ/θ²


def test_gradients_are_those_of_differences():
    value = torch.tensor(POINTS[1:], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: Horseshoe(torch.zeros_like(v), 0.7).log_prob(v), value, atol=1e-3)


def test_draws_have_the_mixture_s_quantiles():
    pyro.set_rng_seed(0)
    draws = Horseshoe(1.0, 0.5).expand([3]).to_event(1).sample(torch.Size([4000]))
    assert draws.shape == (4000, 3)
    inside = ((draws - 1.0).abs() < 0.5).double().mean()
    expected = 2 * integrate.quad(lambda v: mixture_density(v, 0.5), 1e-12, 0.5)[0]
    assert abs(float(inside) - expected) < 5 * (expected * (1 - expected) / 12_000) ** 0.5


def test_nuts_samples_it():
    pyro.set_rng_seed(0)

    def model() -> Tensor:
        value = pyro.sample("value", Horseshoe(0.0, 1.0))
        return pyro.sample("y", pyro.distributions.Normal(value, 0.5), obs=torch.tensor(2.0))

    sampler = MCMC(NUTS(model), num_samples=400, warmup_steps=200, disable_progbar=True)
    sampler.run()
    draws = sampler.get_samples()["value"]
    grid = torch.linspace(-3, 6, 20_002, dtype=torch.float64)
    weight = (Horseshoe(torch.zeros(()).double(), 1.0).log_prob(grid) - 0.5 * ((2 - grid) / 0.5) ** 2).exp()
    mean = float((grid * weight).sum() / weight.sum())
    variance = float(((grid - mean) ** 2 * weight).sum() / weight.sum())
    effective = float(sampler.diagnostics()["value"]["n_eff"].clamp_max(400))
    assert abs(float(draws.mean()) - mean) < 5 * (variance / effective) ** 0.5


def test_bad_scales_are_refused():
    with pytest.raises(ValueError, match="scale"):
        Horseshoe(0.0, torch.tensor(-1.0), validate_args=True)
