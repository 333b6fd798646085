"""Whatever comes in, a belief stays positive and finite, or the update is refused and the state before it kept."""

import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import bayes_kf as bkf

STRUCTURES = (
    "low_rank", "diagonal", "diagonal_information", "diagonal_mixed", "block_diagonal", "full"
)  # fmt: skip
NOISES = ("exponential_family", "ema_taylor", "ema_residual", "identity", "decaying")
LIKELIHOODS = ("categorical", "bernoulli", "gaussian", "poisson")


@st.composite
def cases(draw):
    likelihood = draw(st.sampled_from(LIKELIHOODS))
    noise = draw(st.sampled_from(NOISES))
    scale = draw(st.floats(-12, 12))
    return {
        "config": {
            "likelihood": likelihood,
            "covariance": draw(st.sampled_from(STRUCTURES)),
            "noise": noise,
            "rank": draw(st.integers(1, 4)),
            "forgetting": draw(st.sampled_from([1.0, 0.99, 0.5])),
            "drift_variance": draw(st.sampled_from([0.0, 1e-6, 1.0, 1e6])),
            "prior_pull": draw(st.sampled_from([0.0, 0.1, 0.99])),
            "gate_quantile": draw(st.sampled_from([None, 0.9])),
            "damping": draw(st.booleans()),
            "initial_variance": draw(st.sampled_from([None, 1e-12, 1e-3, 1.0, 1e6, 1e12])),
            "bound_prior": draw(st.booleans()),
        },
        "outputs": draw(st.integers(2, 5)) if likelihood == "categorical" else draw(st.integers(1, 3)),
        "double": draw(st.booleans()),
        "scale": 10.0**scale,
        "kind": draw(st.sampled_from(["random", "constant", "duplicated", "zero", "sparse"])),
        "labels": draw(st.sampled_from(["random", "same"])),
        "weights": 10.0 ** draw(st.floats(-3, 3)),
        "sizes": draw(st.lists(st.integers(1, 5), min_size=2, max_size=6)),
        "seed": draw(st.integers(0, 10**6)),
    }


def batches(case, dtype):
    generator = torch.Generator().manual_seed(case["seed"])
    for size in case["sizes"]:
        x = torch.randn(size, 3, generator=generator, dtype=dtype)
        if case["kind"] == "constant":
            x = torch.ones_like(x)
        elif case["kind"] == "duplicated":
            x = x[:1].expand(size, 3)
        elif case["kind"] == "zero":
            x = torch.zeros_like(x)
        elif case["kind"] == "sparse":
            x = x * (torch.rand(size, 3, generator=generator) < 0.3)
        shape, likelihood = (size, case["outputs"]), case["config"]["likelihood"]
        if likelihood == "categorical":
            y = torch.randint(case["outputs"], (size,), generator=generator)
            y = torch.zeros_like(y) if case["labels"] == "same" else y
        elif likelihood == "gaussian":
            y = case["scale"] * torch.randn(shape, generator=generator, dtype=dtype)
        else:
            y = torch.randint(2, shape, generator=generator).to(dtype)
            y = torch.zeros_like(y) if case["labels"] == "same" else y
        yield case["scale"] * x, y


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_a_belief_stays_positive_and_finite_or_as_it_was(case):
    dtype = torch.float64 if case["double"] else torch.float32
    torch.manual_seed(case["seed"])
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, case["outputs"])).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(case["weights"])
    kf = bkf.KalmanFilter(model, bkf.KalmanConfig(**case["config"]))
    data = list(batches(case, dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a prior that is narrowed says so
        state = kf.init(data[0][0])
        for x, y in data:
            before = [tensor.clone() for tensor in state.belief]
            refused = None
            try:
                after, info = kf.update(state, x, y)
            except bkf.DivergenceError as error:
                refused = error
            assert all(torch.equal(a, b) for a, b in zip(state.belief, before, strict=True))
            if refused is not None:
                assert refused.state is state
                assert refused.cause
                continue
            variance = kf.marginal_variance(after)
            assert bool(torch.isfinite(after.belief.mean).all())
            assert bool(torch.isfinite(variance).all())
            assert bool((variance > 0).all())
            assert not bool(torch.isnan(info.log_loss).any())  # exp(100) is infinite in float32, and so is its loss
            assert 0.0 <= info.damping <= 1.0
            assert info.damping > 0 or info.step_norm == 0  # a step that was not taken
            state = after
        actual = bkf.Posterior(kf, state).predict(data[0][0], method="mean")
        assert actual.mean.shape[0] == len(data[0][1])


@pytest.mark.parametrize("covariance", STRUCTURES)
def test_a_confident_model_that_is_never_wrong_keeps_its_belief(covariance):
    """Nothing is learned where nothing is uncertain, three hundred times."""
    model = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[60.0, 0.0], [-60.0, 0.0]]))
    kf = bkf.KalmanFilter(model, bkf.KalmanConfig(covariance=covariance, initial_variance=1e-4))
    state = kf.init()
    start = kf.marginal_variance(state)
    for _ in range(300):
        state, _ = kf.update(state, torch.tensor([[1.0, 0.0]]).double(), torch.tensor([0]))
    torch.testing.assert_close(kf.marginal_variance(state), start, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(state.belief.mean, kf.adapter.vector(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("curvature", ["sampled", "truncated"])
def test_ten_thousand_classes(curvature):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 10_000))
    kf = bkf.KalmanFilter(model, bkf.KalmanConfig(covariance="diagonal", curvature=curvature, curvature_classes=20))
    x, y = torch.randn(4, 6), torch.tensor([0, 9_999, 5, 5])
    state = kf.init(x)
    losses = []
    for _ in range(6):
        state, info = kf.update(state, x, y)
        losses.append(float(info.log_loss.mean()))
        variance = kf.marginal_variance(state)
        assert bool((variance > 0).all())
        assert bool(torch.isfinite(variance).all())
    assert losses[-1] < 0.5 * losses[0]
    prediction = bkf.Posterior(kf, state).predict(x)  # by draws: the covariance of the outputs would be 400 MB each
    torch.testing.assert_close(prediction.probs.sum(-1), torch.ones(4))
    assert prediction.probs.argmax(-1).tolist() == y.tolist()


def test_all_of_very_many_classes_are_warned_of():
    model = nn.Linear(3, 600)
    with pytest.warns(UserWarning, match=r"`curvature` 'exact' uses all 600 classes of every example"):
        bkf.KalmanFilter(model, bkf.KalmanConfig()).init(torch.randn(2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bkf.KalmanFilter(model, bkf.KalmanConfig(curvature="truncated")).init(torch.randn(2, 3))
        bkf.KalmanFilter(nn.Linear(3, 500), bkf.KalmanConfig()).init(torch.randn(2, 3))
