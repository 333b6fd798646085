"""The fit of real targets without a config: what its scales and σ² are, and that intervals cover."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import BayesianRidge
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset

import bayes_kf as bkf
from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.fitting.passes.mode_steps import ModeSteps
from bayes_kf.inference.fitting.progress import ProgressBar
from bayes_kf.inference.fitting.regression import evidence
from bayes_kf.inference.fitting.regression.evidence import (
    approximate_at_mean,
    refitted_scales,
    under_scales,
    with_scales,
)
from bayes_kf.inference.fitting.regression.examples import holds_real_targets, repeated_examples
from bayes_kf.inference.fitting.regression.regression_fit import (
    PASSES,
    number_of_passes,
    refit_passes,
    regression_config,
)
from bayes_kf.models.adapter import AdapterModel

CONFIG = bkf.KalmanConfig(
    likelihood="gaussian", noise_variance="estimated", covariance="full", initial_variance=1.0, temperature=1.0
)


def linear_data(number=80, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 6, generator=generator, dtype=torch.float64)
    weights = torch.tensor([0.9, -0.4, 0.2, 0.0, 0.3, -0.1], dtype=torch.float64)
    return x, (x @ weights)[:, None] + 0.5 * torch.randn(number, 1, generator=generator, dtype=torch.float64)


def curved_data(number, seed=0, noise=0.2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 2, generator=generator)
    return x, torch.sin(1.5 * x[:, :1]) + 0.5 * x[:, 1:] + noise * torch.randn(number, 1, generator=generator)


def batches(x, y, size=20):
    return list(zip(x.split(size), y.split(size), strict=True))


def network(inputs=2, outputs=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs))


def zero_linear():
    model = nn.Linear(6, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    return model


def test_the_fixed_point_of_a_linear_model_is_that_of_bayesian_ridge(monkeypatch):
    monkeypatch.setattr(evidence, "SCALE_COUNT", 0.0)
    x, y = linear_data()
    kf, data = KalmanFilter(zero_linear(), CONFIG), batches(x, y)
    state = kf.init()
    first = state.prior.variance
    state = kf.update(state, x, y, hold_mean=True)[0]
    for _ in range(60):
        start = kf.restart(state)
        for inputs, targets in data:  # the exact mean under the present scales; `at` keeps σ²
            start = kf.update(start, inputs, targets, at=torch.zeros(6, dtype=torch.float64))[0]
        at_mean = approximate_at_mean(kf, start, data, ProgressBar())
        scales = refitted_scales(kf, at_mean, first)
        state = with_scales(at_mean.state, scales)
    ridge = BayesianRidge(tol=1e-12, max_iter=5_000, alpha_1=0, alpha_2=0, lambda_1=0, lambda_2=0, fit_intercept=False)
    ridge.fit(x.numpy(), y[:, 0].numpy())
    assert float(scales.noise_variance) == pytest.approx(1.0 / ridge.alpha_, rel=1e-6)
    assert float(scales.prior_variance[0]) == pytest.approx(1.0 / ridge.lambda_, rel=1e-6)
    np.testing.assert_allclose(at_mean.state.belief.mean.numpy(), ridge.coef_, rtol=1e-6, atol=1e-9)
    covariance = under_scales(at_mean, scales).state.belief.covariance_matrix()
    np.testing.assert_allclose(covariance.numpy(), ridge.sigma_, rtol=1e-5, atol=1e-9)


def test_the_fit_of_a_linear_model_predicts_as_bayesian_ridge():
    x, y = linear_data(200)
    posterior = bkf.fit(nn.Linear(6, 1).double(), batches(x, y), progress=False)
    ridge = BayesianRidge().fit(x.numpy(), y[:, 0].numpy())
    new = torch.cat([torch.zeros(1, 6), 3.0 * torch.eye(6)]).double()  # also where no data are
    mean, sd = ridge.predict(new.numpy(), return_std=True)
    prediction = posterior.predict(new)
    np.testing.assert_allclose(prediction.mean[:, 0].numpy(), mean, atol=0.1 * sd.min())
    # other priors: one scale for all coefficients there, initial values that are not zero here
    np.testing.assert_allclose(prediction.variance[:, 0].sqrt().numpy(), sd, rtol=0.02)


@pytest.mark.parametrize("outputs", [1, 2])
def test_one_step_of_the_fixed_point_is_the_formula(outputs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, outputs)).double()
    x, y = linear_data()
    y = torch.cat([y, 2.0 * y.flip(0)], 1)[:, :outputs]
    kf = KalmanFilter(model, CONFIG)
    state = kf.update(kf.init(), x, y)[0]
    at_mean = approximate_at_mean(kf, state, batches(x, y), ProgressBar())
    mean, covariance = at_mean.state.belief.mean, at_mean.state.belief.covariance_matrix()
    assert torch.equal(mean, state.belief.mean)
    scales = refitted_scales(kf, at_mean, torch.full_like(mean, 0.5))  # p is another variance than the present one
    gamma = 1.0 - covariance.diagonal()  # under the present prior variance 1
    for where in kf.adapter.slices().values():
        squares = ((mean - state.prior.mean)[where].square() / 0.5).sum()
        expected = 0.5 * (squares + 0.1) / (gamma[where].sum() + 0.1)
        torch.testing.assert_close(scales.prior_variance[where], expected.expand(mean[where].shape))
    residual = y - kf.adapter.outputs(mean, x)
    shares = at_mean.leverages if outputs == 2 else torch.ones(1).double()
    expected = residual.square().sum(0) / (len(x) - gamma.sum() * shares / shares.sum())
    torch.testing.assert_close(scales.noise_variance, expected)
    if outputs == 1:
        again = under_scales(at_mean, scales).state.belief.covariance_matrix()
        ratio = float(state.noise.variance / scales.noise_variance)
        precision = ratio * (torch.linalg.inv(covariance) - torch.eye(len(mean))) + torch.diag(
            1 / scales.prior_variance
        )
        torch.testing.assert_close(torch.linalg.inv(again), precision, rtol=1e-7, atol=1e-7)


def test_a_tensor_without_effect_keeps_its_scale():
    model = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 1)).double()
    nn.init.zeros_(model[1].weight)  # the first layer has no effect
    x, y = linear_data()
    kf = KalmanFilter(model, CONFIG)
    state = kf.update(kf.init(), x, y, hold_mean=True)[0]
    at_mean = approximate_at_mean(kf, state, batches(x, y), ProgressBar())
    first = torch.full_like(state.belief.mean, 0.3)
    scales = refitted_scales(kf, at_mean, first)
    torch.testing.assert_close(scales.prior_variance[kf.adapter.slices()["0.weight"]], first[:12])


def test_steps_are_those_of_adam_in_units_of_the_prior():
    x, y = linear_data()
    kf, data = KalmanFilter(network(6).double(), regression_config(AdapterModel(network(6)))), batches(x, y, 16)
    state = kf.init(x)
    for batch in data:
        state = kf.update(state, *batch)[0]
    steps = ModeSteps(kf, state, 2, 0.06)
    steps.run(data, ProgressBar())
    after = steps.run(data, ProgressBar())
    sd, start = state.prior.variance.sqrt(), state.prior.mean
    z = nn.Parameter((state.belief.mean - start) / sd)
    optimizer, done = torch.optim.Adam([z], lr=0.06), 0
    for inputs, targets in data + data:
        optimizer.param_groups[0]["lr"] = 0.06 * (1.0 - done / 160)
        optimizer.zero_grad()
        outputs = kf.adapter.call(kf.adapter.unflatten(start + sd * z), inputs)
        loss = (targets - outputs).square().mean() / (2 * float(state.noise.variance)) + z.square().sum() / (2 * 80)
        loss.backward()
        optimizer.step()
        done += 16
    torch.testing.assert_close(after.belief.mean, (start + sd * z).detach(), rtol=1e-9, atol=1e-9)
    assert not torch.equal(after.belief.mean, state.belief.mean)


def test_parameters_of_low_precision_are_moved_too():
    x, y = curved_data(64)
    model = network()
    model[0].to(torch.bfloat16)

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = model[0], model[2]

        def forward(self, inputs):
            return self.head(torch.tanh(self.body(inputs.to(torch.bfloat16)).float()))

    mixed = Mixed()
    posterior = bkf.fit(mixed, batches(x, y), progress=False)
    assert all(not torch.equal(posterior.mean[name], p.float()) for name, p in mixed.named_parameters())


def test_intervals_cover_and_the_noise_is_found():
    x, y = curved_data(400)
    posterior = bkf.fit(network(), batches(x, y), progress=False)
    new, targets = curved_data(4_000, 1)
    prediction = posterior.predict(new)
    assert float(posterior.likelihood.noise_variance) == pytest.approx(0.04, rel=0.2)
    for level in (0.5, 0.9):
        lower, upper = prediction.interval(level)
        inside = ((lower <= targets) & (targets <= upper)).double().mean()
        assert float(inside) == pytest.approx(level, abs=0.05)
    assert float((prediction.mean - targets).square().mean().sqrt()) < 0.26  # of 0.2 at best
    far = posterior.predict(8.0 * new[:100])
    assert float(far.epistemic.mean()) > 10.0 * float(prediction.epistemic.mean())
    assert posterior.temperature == 1.0
    assert len(posterior.history["noise_variance"]) == len(refit_passes(PASSES))
    assert len(posterior.history["log_loss"]) == 400  # of the filter's pass


def test_intervals_cover_over_many_small_data_sets():
    """Of 40 examples each, fewer than the network has parameters: the evidence does not take noise for signal."""
    inside = {0.5: 0.0, 0.9: 0.0}
    for seed in range(10):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
        prediction = bkf.fit(model, [curved_data(40, seed)], progress=False).predict(curved_data(1_000, 100 + seed)[0])
        _, targets = curved_data(1_000, 100 + seed)
        for level in inside:
            lower, upper = prediction.interval(level)
            inside[level] += float(((lower <= targets) & (targets <= upper)).double().mean()) / 10
    assert inside == pytest.approx({0.5: 0.5, 0.9: 0.9}, abs=0.05)  # a standard error over data sets is about 0.02


def test_the_same_call_gives_the_same_posterior_and_the_model_stays():
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = TensorDataset(*curved_data(60))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    fits = [bkf.fit(model, loader(data), progress=False) for loader in (list_of, sorted_loader, list_of)]
    assert torch.equal(fits[0].mean_vector, fits[2].mean_vector)
    assert torch.equal(fits[0].variance_vector, fits[2].variance_vector)
    assert fits[1].state.examples == fits[0].state.examples == 60
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert holds_real_targets(sorted_loader(data))
    torch.set_rng_state(state)


def test_a_mixture_has_members_from_other_starts():
    x, y = curved_data(60)
    model, data = network(), batches(x, y)
    mixture = bkf.fit_mixture(model, data, progress=False)
    assert mixture.weights == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert torch.equal(mixture.members[0].mean_vector, bkf.fit(model, data, progress=False).mean_vector)
    starts = [member.state.prior.mean for member in mixture.members]
    for where in mixture.adapter.slices().values():
        values = [start[where].sort().values for start in starts]
        assert torch.equal(values[0], values[1])
        assert torch.equal(values[0], values[2])
    assert not torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[1], starts[2])
    assert all(member.adapter is mixture.adapter for member in mixture.members)
    parts = [member.predict(x[:5]) for member in mixture.members]
    torch.testing.assert_close(mixture.predict(x[:5]).mean, torch.stack([part.mean for part in parts]).mean(0))


def test_members_of_a_partly_frozen_model_start_from_its_tensors():
    model = network()
    model[0].requires_grad_(False)
    mixture = bkf.fit_mixture(model, batches(*curved_data(60)), progress=False)
    start = torch.cat([model[2].weight.flatten(), model[2].bias]).detach()
    assert all(torch.equal(member.state.prior.mean, start) for member in mixture.members)
    assert not torch.equal(mixture.members[0].mean_vector, mixture.members[1].mean_vector)


def list_of(data):
    return batches(*data.tensors)


def sorted_loader(data):
    return DataLoader(data, batch_size=20)


def test_other_loaders_and_targets_keep_their_fits():
    x, y = curved_data(40)
    data = TensorDataset(x, y)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(data)

    assert holds_real_targets([(x, y)])
    assert holds_real_targets(DataLoader(data, batch_size=8, shuffle=True))
    others = [
        [],
        iter([(x, y)]),
        [(x, y > 0)],
        [(x, (y > 0).float())],
        [(x, (y > 0).long().flatten())],
        [x],
        DataLoader(Stream(), batch_size=8),
        DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 8, False)),
        DataLoader(data, batch_size=8, sampler=[1, 2, 3]),
    ]
    assert not any(holds_real_targets(loader) for loader in others[:-2])
    assert not holds_real_targets(others[-1])
    with pytest.raises(ValueError, match="`loader` must be a DataLoader over a data set or a list of batches, got"):
        repeated_examples(iter([(x, y)]))
    with pytest.raises(ValueError, match="`loader` must yield targets with every batch, got none in batch 0"):
        repeated_examples([x])


def test_passes_depend_on_the_data_and_on_frozen_tensors():
    adapter = AdapterModel(network())
    assert number_of_passes(adapter, 500) == 100
    assert number_of_passes(adapter, 5_000) == 10
    assert number_of_passes(adapter, 100_000) == 6
    frozen = network()
    frozen[0].requires_grad_(False)
    assert number_of_passes(AdapterModel(frozen), 500) == 10
    for passes in (6, 10, 37, 100):
        refits = refit_passes(passes)
        assert refits[-1] == passes
        assert refits == sorted(set(refits))
        assert 3 <= len(refits) <= 10


def test_batches_that_do_not_fit_together_are_used_as_they_are():
    short = {"x": torch.ones(3, 2)}, torch.randn(3, 1)
    long = {"x": torch.ones(4, 5)}, torch.randn(4, 1)
    examples = repeated_examples([short, long])
    assert sum(len(targets) for _, targets in examples.small) == 7
    assert list(examples.large) == [short, long]
    joined = repeated_examples([({"x": torch.ones(9, 2)}, torch.randn(9, 1))] * 3)
    assert [len(targets) for _, targets in joined.small] == [16, 11]
    assert [len(targets) for _, targets in joined.large] == [27]
    seen = [torch.cat([targets for _, targets in joined.small]) for _ in range(2)]
    assert not torch.equal(*seen)
    assert math.isclose(float(seen[0].sum()), float(seen[1].sum()), abs_tol=1e-4)
