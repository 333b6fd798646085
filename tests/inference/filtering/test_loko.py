"""`KalmanConfig.loko()` is the paper's Algorithm 1 to the letter."""

import math

import pytest
import torch
from oracles import dense_jacobian, naive_loko
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call

from bayes_kf.inference import KalmanConfig, KalmanFilter


def lora_mlp():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    return get_peft_model(base, LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]))


@pytest.mark.parametrize("upper", [0.2, 2.0])
def test_replays_algorithm_1_over_50_steps(upper):
    model = lora_mlp().double()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    sizes = [model.get_parameter(name).numel() for name in names]

    def with_theta(theta, function):
        parts = theta.split(sizes)
        tensors = {
            n: p.view_as(model.get_parameter(n)).detach().requires_grad_(True)
            for n, p in zip(names, parts, strict=True)
        }
        return function(tensors)

    def outputs_of(theta, x):
        return with_theta(theta, lambda t: functional_call(model, t, (x[None],))[0].detach())

    def jacobian_of(theta, x):
        def rows(tensors):
            eta = functional_call(model, tensors, (x[None],))[0]
            return torch.stack(
                [
                    torch.cat(
                        [g.reshape(-1) for g in torch.autograd.grad(v, list(tensors.values()), retain_graph=True)]
                    )
                    for v in eta
                ]
            )

        return with_theta(theta, rows)

    g = torch.Generator().manual_seed(1)
    stream = [(torch.randn(6, generator=g).double(), torch.randint(4, (), generator=g)) for _ in range(50)]
    kf = KalmanFilter(model, KalmanConfig.loko(initial_variance=upper, seed=3))
    state = kf.init()
    draws = torch.rand(kf.adapter.num_parameters, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.equal(state.prior.variance, upper * (1 - draws))  # Uniform(0, c]
    replay = naive_loko(jacobian_of, outputs_of, kf.adapter.vector(), state.prior.variance, stream)
    for (x, y), (theta, p) in zip(stream, replay, strict=True):
        state, info = kf.update(state, x[None], y[None])
        torch.testing.assert_close(state.belief.mean, theta, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(state.belief.variance, p, rtol=1e-10, atol=1e-10)
        assert (info.damping, info.jitter) == (1.0, 0.0)


@pytest.mark.parametrize("noise", ["identity", "decaying", "exponential_family"])
def test_replays_the_literature_s_noises_over_50_steps(noise):
    """The other rows of the paper's Table 5: R = I, e^(−k/50) I and diag(π) − ππᵀ, singular as it stands."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    g = torch.Generator().manual_seed(1)
    kf = KalmanFilter(model, KalmanConfig.loko(noise=noise, seed=3))
    state = kf.init()
    theta, p = kf.adapter.vector(), state.prior.variance
    for k in range(50):
        x, y = torch.randn(1, 3, generator=g).double(), torch.randint(3, (1,), generator=g)
        nn.utils.vector_to_parameters(theta, model.parameters())
        eta, jacobian = dense_jacobian(model, lambda m, x=x: m(x))
        prob = eta[0].softmax(-1)
        own = torch.diag(prob) - torch.outer(prob, prob)
        fixed = torch.eye(3).double() * (math.exp(-k / 50) if noise == "decaying" else 1.0)
        h, e = own @ jacobian[0], nn.functional.one_hot(y[0], 3).double() - prob
        s = h @ (p[:, None] * h.T) + (own if noise == "exponential_family" else fixed)
        gain = p[:, None] * h.T @ torch.linalg.pinv(s, hermitian=True)  # S and H are orthogonal to (1, 1, 1)
        state, info = kf.update(state, x, y)
        theta, p = theta + gain @ e, p - torch.einsum("ij,ji,i->i", gain, h, p)
        torch.testing.assert_close(state.belief.mean, theta, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(state.belief.variance, p, rtol=1e-8, atol=1e-10)
        assert (info.damping, info.jitter) == (1.0, 0.0)


def test_setting_is_the_paper_s():
    config = KalmanConfig.loko()
    assert (config.covariance, config.noise, config.beta) == ("diagonal", "ema_taylor", 0.95)
    assert (config.initial_variance, config.initial_rule) == (0.2, "uniform")
    assert (config.damping, config.expansion, config.temperature) == (False, "mean", 1.0)
    assert (config.forgetting, config.drift_variance, config.gate_quantile) == (1.0, 0.0, None)


def test_jacobian_oracle_agrees_with_itself():
    model = lora_mlp().double()
    x = torch.randn(2, 6).double()
    _, jacobian = dense_jacobian(model, lambda m: m(x))
    assert jacobian.shape == (2, 4, 6 * 2 + 2 * 8 + 8 * 4 + 4)
