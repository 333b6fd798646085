"""Several passes: Gauss-Newton from the prior each time, against closed forms and a mode found by another optimizer."""

import pytest
import torch
from oracles import dense_jacobian, linear_posterior
from scipy.optimize import minimize
from torch import nn

import bayes_kf as bkf
from bayes_kf.inference.fitting.passes import mean_pass
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.likelihood import LIKELIHOODS


def batches_of(x, y, size=4):
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


@pytest.mark.parametrize("passes", [1, 2, 5])
@pytest.mark.parametrize("covariance", ["full", "low_rank", "block_diagonal"])
def test_a_linear_model_has_its_exact_posterior_after_any_number_of_passes(passes, covariance):
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 1, bias=False).double(), torch.randn(18, 5).double(), torch.randn(18, 1).double()
    config = bkf.KalmanConfig(
        likelihood="gaussian", noise_variance=0.3, covariance=covariance, rank=5, initial_variance=0.7, passes=passes
    )
    posterior = bkf.fit(model, batches_of(x, y), config, progress=False)
    mean, matrix = linear_posterior(x, y[:, 0], model.weight.detach()[0], 0.7 * torch.eye(5).double(), 0.3)
    torch.testing.assert_close(posterior.mean_vector, mean, rtol=1e-9, atol=1e-9)
    actual = posterior.state.belief.covariance_matrix()
    torch.testing.assert_close(actual, matrix, rtol=1e-9, atol=1e-9)
    assert len(posterior.history["log_loss"]) == 18


def small(likelihood, seed=0):
    torch.manual_seed(seed)
    outputs = 3 if likelihood == "categorical" else 1
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, outputs)).double()
    x = torch.randn(30, 2).double()
    y = {
        "categorical": lambda: (x @ torch.randn(2, 3).double()).argmax(1),
        "bernoulli": lambda: (x[:, :1] * x[:, 1:] > 0).double(),
        "poisson": lambda: torch.poisson((x[:, :1]).exp()),
        "gaussian": lambda: x[:, :1].sin() + 0.1 * torch.randn(30, 1).double(),
    }[likelihood]()
    return model, x, y


def mode_by_lbfgs(model, x, y, family, variance, start):
    """θ that minimizes −log p(y | θ) + ½ ‖θ − θ₀‖²/p₀, and the inverse of its Gauss-Newton matrix."""
    prior = torch.nn.utils.parameters_to_vector(model.parameters()).detach()

    def objective(numbers):
        theta = torch.tensor(numbers, requires_grad=True)
        sizes = [p.numel() for p in model.parameters()]
        shaped = [t.view(p.shape) for t, p in zip(theta.split(sizes), model.parameters(), strict=True)]
        names = [name for name, _ in model.named_parameters()]
        outputs = torch.func.functional_call(model, dict(zip(names, shaped, strict=True)), (x,))
        loss = -family.log_prob(outputs, y).sum() + 0.5 * (theta - prior).square().sum() / variance
        loss.backward()
        return float(loss.detach()), theta.grad.numpy()

    options = {"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-9}
    actual = minimize(objective, start.numpy(), jac=True, method="L-BFGS-B", options=options)
    mode = torch.tensor(actual.x)
    torch.nn.utils.vector_to_parameters(mode, model.parameters())
    outputs, jacobian = dense_jacobian(model, lambda m: m(x))
    torch.nn.utils.vector_to_parameters(prior, model.parameters())
    rows = jacobian.flatten(0, 1)
    precision = rows.T @ torch.block_diag(*family.variance(outputs)) @ rows + torch.eye(len(prior)) / variance
    return mode, torch.linalg.inv(precision), actual.fun


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "poisson"])
def test_passes_converge_to_the_mode_and_its_gauss_newton_covariance(likelihood):
    model, x, y = small(likelihood)
    config = bkf.KalmanConfig(
        likelihood=likelihood, covariance="full", initial_variance=0.3, bound_prior=False, passes=40
    )
    posterior = bkf.fit(model, batches_of(x, y, 7), config, progress=False)
    mode, covariance, least = mode_by_lbfgs(model, x, y, LIKELIHOODS[likelihood](), 0.3, posterior.mean_vector)
    torch.testing.assert_close(posterior.mean_vector, mode, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(posterior.state.belief.covariance, covariance, rtol=1e-3, atol=1e-5)
    objective = posterior.history["objective"]
    assert len(objective) == 39
    assert (objective.diff() <= 1e-8 * objective[:-1].abs()).all()
    assert float(objective[-1]) == pytest.approx(least, rel=1e-7)
    assert float(objective[0]) > float(objective[-1])


def test_the_first_pass_equals_a_single_one_and_later_passes_do_not_depend_on_the_order():
    model, x, y = small("categorical")
    setting = {"covariance": "full", "initial_variance": 0.3, "bound_prior": False}
    single = bkf.fit(model, batches_of(x, y), bkf.KalmanConfig(**setting), progress=False)
    at = single.mean_vector
    actual, scores = [], []
    for order in (torch.arange(30), torch.arange(29, -1, -1)):
        state = single.kf.restart(single.state)
        assert (state.temperature_scores.updates, float(state.temperature_scores.total.abs().max())) == (0, 0.0)
        for inputs, targets in batches_of(x[order], y[order]):
            state, info = single.kf.update(state, inputs, targets, at=at)
            assert info.damping == 1.0
        assert (state.step, state.examples) == (8, 30)
        scores.append(state.temperature_scores)
        actual.append((state.belief.mean, state.belief.covariance))
    torch.testing.assert_close(actual[0], actual[1], rtol=1e-9, atol=1e-11)
    double = bkf.fit(model, batches_of(x, y), bkf.KalmanConfig(**setting, passes=2), progress=False)
    torch.testing.assert_close(double.mean_vector, actual[0][0], rtol=1e-9, atol=1e-11)
    assert torch.equal(double.history["log_loss"], single.history["log_loss"])
    assert torch.equal(
        double.state.temperature_scores.total, scores[0].total
    )  # those of the last pass's own predictions
    assert not torch.allclose(double.state.temperature_scores.total, single.state.temperature_scores.total, rtol=1e-3)


def test_no_pass_increases_the_objective():
    """With a wide prior the full step overshoots; it is halved."""
    model, x, y = small("categorical", seed=3)
    config = bkf.KalmanConfig(covariance="full", initial_variance=300.0, bound_prior=False, passes=12)
    objective = bkf.fit(model, batches_of(x, y), config, progress=False).history["objective"]
    assert len(objective) == 11
    assert (objective.diff() <= 1e-8 * objective[:-1].abs()).all()
    assert float(objective[-1]) < 0.9 * float(objective[0])


def test_arguments_that_exclude_several_passes_raise():
    model, x, y = small("categorical")
    config = bkf.KalmanConfig(passes=2)
    with pytest.raises(ValueError, match=r"`passes` must be 1 with `start` 'trained', which holds the mean, got 2\."):
        bkf.fit(model, batches_of(x, y), config, start="trained", progress=False)
    with pytest.raises(
        ValueError, match=r"`loader` must allow a new iteration in each of 2 passes, got list_iterator\."
    ):
        bkf.fit(model, iter(batches_of(x, y)), config, progress=False)
    with pytest.raises(ValueError, match=r"`passes` must be a whole number >= 1, got 0\."):
        bkf.KalmanConfig(passes=0)


@pytest.mark.parametrize("passes", [2, 4])
def test_after_several_passes_the_belief_is_that_under_the_estimated_noise(passes):
    """The data of a later pass are already fitted: their residuals say σ² once what they determine is counted."""
    torch.manual_seed(1)
    model, x = nn.Linear(5, 1, bias=False).double(), torch.randn(60, 5).double()
    y = x @ torch.randn(5, 1).double() + 0.5 * torch.randn(60, 1).double()
    config = bkf.KalmanConfig(
        likelihood="gaussian", noise_variance="estimated", covariance="full", initial_variance=1.0, passes=passes
    )
    posterior = bkf.fit(model, batches_of(x, y, 1), config, progress=False)
    variance = float(posterior.state.noise.variance)
    assert variance > 0.1
    mean, covariance = linear_posterior(x, y[:, 0], model.weight.detach()[0], torch.eye(5).double(), variance)
    torch.testing.assert_close(posterior.mean_vector, mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(posterior.state.belief.covariance, covariance, rtol=1e-9, atol=1e-9)


class Once:
    """Iterable that hands out one iterator, as some streams do."""

    def __init__(self, batches):
        self.batches = iter(batches)

    def __iter__(self):
        return self.batches


def test_a_loader_that_can_be_iterated_once_raises():
    model, x, y = small("categorical")
    with pytest.raises(ValueError, match=r"`loader` must yield the same 30 examples in every pass, got 0 in a later"):
        bkf.fit(model, Once(batches_of(x, y)), bkf.KalmanConfig(passes=2), progress=False)


def test_a_pass_that_diverges_leaves_the_one_before(monkeypatch):
    model, x, y = small("categorical")
    single = bkf.fit(model, batches_of(x, y), bkf.KalmanConfig(), progress=False)
    update = bkf.KalmanFilter.update

    def failing(self, state, *args, at=None, **kwargs):
        if at is not None and state.step == 2:
            raise bkf.DivergenceError(state.step, "a test", state)
        return update(self, state, *args, at=at, **kwargs)

    monkeypatch.setattr(bkf.KalmanFilter, "update", failing)
    with pytest.raises(bkf.DivergenceError) as caught:
        bkf.fit(model, batches_of(x, y), bkf.KalmanConfig(passes=2), progress=False)
    assert torch.equal(caught.value.posterior.mean_vector, single.mean_vector)
    assert caught.value.posterior.state.examples == 30
    assert len(caught.value.posterior.history["log_loss"]) == 30


@pytest.mark.parametrize(
    "setting", [{"forgetting": 0.99}, {"drift_variance": 0.1}, {"prior_pull": 0.1}, {"gate_quantile": 0.9}]
)
def test_dynamics_and_gates_exclude_several_passes(setting):
    (name, value), plain = setting.popitem(), bkf.KalmanConfig()
    message = rf"`passes` above 1 needs `{name}` {getattr(plain, name)}, since [^`]*, got {value}\.$"
    with pytest.raises(ValueError, match=message):
        bkf.KalmanConfig(passes=2, **{name: value})


@pytest.mark.parametrize("covariance", ["full", "low_rank", "block_diagonal", "diagonal"])
def test_a_natural_gradient_step_equals_its_formula(covariance):
    """Against dense matrices: P, the prior's pull, and the filter's denominator along the gradient."""
    model, x, y = small("categorical")
    config = bkf.KalmanConfig(covariance=covariance, initial_variance=0.3, bound_prior=False)
    state = bkf.fit(model, batches_of(x, y), config, progress=False).state
    adapter, mean = AdapterModel(model), state.belief.mean.clone()
    at = mean.clone().requires_grad_(True)
    loss = -LIKELIHOODS["categorical"]().log_prob(adapter.call(adapter.unflatten(at), x[:4]), y[:4]).sum()
    (gradient,) = torch.autograd.grad(loss, at)
    dense = state.belief.covariance_matrix()
    gradient = gradient + 4 / 30 * (mean - adapter.vector()) / 0.3
    moved = dense @ gradient / (1 + 0.7 * gradient @ dense @ gradient)
    after, actual = mean_pass.natural_gradient_step(config, adapter, state, x[:4], y[:4], 0.7)
    torch.testing.assert_close(after.belief.mean, mean - 0.7 * moved, rtol=1e-9, atol=1e-11)
    assert actual == pytest.approx(float(loss.detach()), rel=1e-12)
    assert torch.equal(state.belief.mean, mean)
    assert all(torch.equal(a, b) for a, b in zip(after.belief[1:], state.belief[1:], strict=True))


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "poisson"])
def test_mean_passes_approach_the_mode(likelihood):
    """Near it where no example has much leverage; counts as large as these are held back by the denominator."""
    model, x, y = small(likelihood)
    setting = {"likelihood": likelihood, "covariance": "full", "initial_variance": 0.3, "bound_prior": False}
    single = bkf.fit(model, batches_of(x, y), bkf.KalmanConfig(**setting), progress=False)
    config = bkf.KalmanConfig(**setting, mean_passes=30)
    posterior = bkf.fit(model, batches_of(x, y), config, progress=False)
    adapter, family = AdapterModel(model), LIKELIHOODS[likelihood]()

    def excess(mean):
        loss = -family.log_prob(adapter.outputs(mean, x), y).sum()
        return float(loss + 0.5 * (mean - adapter.vector()).square().sum() / 0.3) - least

    mode, _, least = mode_by_lbfgs(model, x, y, family, 0.3, posterior.mean_vector)
    assert 0 <= excess(posterior.mean_vector) < 0.5 * excess(single.mean_vector)
    precision = torch.linalg.inv(single.state.belief.covariance)
    before, after = (((p.mean_vector - mode) @ precision @ (p.mean_vector - mode)).sqrt() for p in (single, posterior))
    if likelihood != "poisson":
        assert float(after) < 0.2 * float(before)  # in posterior standard deviations
    assert torch.equal(posterior.state.belief.covariance, single.state.belief.covariance)
    assert torch.equal(posterior.history["log_loss"], single.history["log_loss"])
    assert len(posterior.history["fitted_log_loss"]) == 30


def test_at_the_mode_a_batch_of_all_data_does_not_move_the_mean():
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 1, bias=False).double(), torch.randn(18, 5).double(), torch.randn(18, 1).double()
    config = bkf.KalmanConfig(
        likelihood="gaussian", noise_variance=0.3, covariance="full", initial_variance=0.7, mean_passes=3
    )
    posterior = bkf.fit(model, [(x, y)], config, progress=False)
    mean, _ = linear_posterior(x, y[:, 0], model.weight.detach()[0], 0.7 * torch.eye(5).double(), 0.3)
    torch.testing.assert_close(posterior.mean_vector, mean, rtol=1e-9, atol=1e-9)


def test_settings_and_loaders_that_exclude_mean_passes_raise():
    model, x, y = small("categorical")
    config = bkf.KalmanConfig(mean_passes=1)
    with pytest.raises(
        ValueError, match=r"`loader` must allow a new iteration in each of 2 passes, got list_iterator\."
    ):
        bkf.fit(model, iter(batches_of(x, y)), config, progress=False)
    for bad in (-1, 1.0, True):
        with pytest.raises(ValueError, match=r"`mean_passes` must be a whole number >= 0, got "):
            bkf.KalmanConfig(mean_passes=bad)
    needed = (
        r"`mean_passes` above 0 needs `forgetting` 1\.0 and `gate_quantile` None, since [^`]*, got 0\.9 and 0\.5\.$"
    )
    with pytest.raises(ValueError, match=needed):
        bkf.KalmanConfig(mean_passes=1, forgetting=0.9, gate_quantile=0.5)
    with pytest.raises(ValueError, match=r"`mean_passes` descend the likelihood of `noise` 'exponential_family', got"):
        bkf.KalmanConfig.loko(mean_passes=1)

    class Shrinking(list):
        def __iter__(self):
            yield from [self.pop() for _ in range(len(self) // 2)]

    with pytest.raises(ValueError, match=r"must yield the same 16 examples in every pass, got 8 in a later one\."):
        bkf.fit(model, Shrinking(batches_of(x, y)[:7] + batches_of(x, y)[:1]), config, progress=False)
