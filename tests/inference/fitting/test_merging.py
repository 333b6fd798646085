"""Posteriors of disjoint data merged, against the one that saw all of it, and against dense float64 products."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import bayes_kf as bkf
from bayes_kf.data import uci_digits_split
from bayes_kf.inference.covariance.structure import STRUCTURES

PLAIN = {"expansion": "mean", "damping": False, "bound_prior": False, "initial_variance": 0.4}


def linear_data(size=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 5, generator=g).double()
    return x, torch.randn(size, 2, generator=g).double() + x[:, :2]


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(5, 2).double()


def fitted(model, x, y, config, size=4):
    return bkf.fit(model, list(zip(x.split(size), y.split(size), strict=True)), config, progress=False)


def dense(posterior):
    """P⁻¹ and P⁻¹(μ − μ₀) in float64."""
    inverse = torch.linalg.inv(posterior.covariance_matrix().double())
    return inverse, inverse @ (posterior.mean_vector - posterior.state.prior.mean).double()


def same(first, second):
    parts = zip(leaves(first), leaves(second), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in parts)


def leaves(state):
    return [leaf for part in state for leaf in leaves(part)] if isinstance(state, tuple) else [state]


@pytest.mark.parametrize("cuts", [(40,), (13, 27), (10, 1, 9, 20)], ids=str)
@pytest.mark.parametrize("covariance", ["full", "low_rank"])
def test_merged_parts_of_a_linear_model_equal_the_posterior_of_all_data(covariance, cuts):
    """Mean and covariance, whatever the parts; low rank with room for every direction that the data have."""
    x, y = linear_data()
    config = bkf.KalmanConfig(likelihood="gaussian", noise_variance=0.5, covariance=covariance, rank=12, **PLAIN)
    whole = fitted(linear(), x, y, config)
    parts = [fitted(linear(), a, b, config) for a, b in zip(x.split(cuts), y.split(cuts), strict=True)]
    actual = bkf.merge(parts)
    torch.testing.assert_close(actual.mean_vector, whole.mean_vector, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(actual.covariance_matrix(), whole.covariance_matrix(), rtol=1e-8, atol=1e-10)
    assert actual.state.examples == whole.state.examples == 40
    assert actual.state.step == sum(part.state.step for part in parts)


@pytest.mark.parametrize("covariance", STRUCTURES)
def test_every_structure_merges_by_the_product_of_gaussians(covariance):
    """P⁻¹ = Σ P_k⁻¹ − (K − 1) P₀⁻¹ written out densely; the forms are closed under it, but for the cut to low rank."""
    x, y = linear_data()
    config = bkf.KalmanConfig(likelihood="gaussian", noise_variance=0.5, covariance=covariance, rank=12, **PLAIN)
    parts = [fitted(linear(), a, b, config) for a, b in zip(x.split(20), y.split(20), strict=True)]
    actual = bkf.merge(parts)
    prior = torch.diag(1.0 / parts[0].state.prior.variance.double())
    products = [dense(part) for part in parts]
    precision = sum(inverse for inverse, _ in products) - prior
    mean = parts[0].state.prior.mean + torch.linalg.solve(precision, sum(own for _, own in products))
    torch.testing.assert_close(actual.mean_vector, mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(actual.covariance_matrix().double(), torch.linalg.inv(precision), rtol=1e-8, atol=1e-10)
    backwards = bkf.merge(parts[::-1])
    torch.testing.assert_close(backwards.mean_vector, actual.mean_vector, rtol=1e-9, atol=1e-12)


def test_low_rank_without_room_keeps_mean_and_variances_in_bounds():
    """The mean is exact before the cut; the diagonal keeps the marginal variances that the cut would lose."""
    x, y = linear_data()
    config = bkf.KalmanConfig(likelihood="gaussian", noise_variance=0.5, covariance="low_rank", rank=3, **PLAIN)
    parts = [fitted(linear(), a, b, config) for a, b in zip(x.split(20), y.split(20), strict=True)]
    actual = bkf.merge(parts)
    prior = torch.diag(1.0 / parts[0].state.prior.variance)
    precision = sum(dense(part)[0] for part in parts) - prior
    mean = parts[0].state.prior.mean + torch.linalg.solve(precision, sum(dense(part)[1] for part in parts))
    torch.testing.assert_close(actual.mean_vector, mean, rtol=1e-9, atol=1e-9)
    diagonals = sum(part.state.belief.diagonal for part in parts) - prior.diagonal()
    belief, exact = actual.state.belief, torch.linalg.inv(precision)
    kept_only = torch.diag(diagonals) + belief.factor @ belief.factor.T
    for index in range(len(mean)):
        alone = kept_only.clone()
        alone[index, index] += belief.diagonal[index] - diagonals[index]
        torch.testing.assert_close(torch.linalg.inv(alone)[index, index], exact[index, index], rtol=1e-8, atol=1e-10)
    assert belief.factor.shape == parts[0].state.belief.factor.shape


@pytest.mark.parametrize("covariance", STRUCTURES)
def test_one_posterior_merges_to_itself(covariance):
    x, y = linear_data()
    config = bkf.KalmanConfig(likelihood="gaussian", covariance=covariance, rank=4, **PLAIN)
    alone = fitted(linear(), x, y, config)
    actual = bkf.merge([alone])
    torch.testing.assert_close(actual.mean_vector, alone.mean_vector, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(actual.covariance_matrix(), alone.covariance_matrix(), rtol=1e-8, atol=1e-12)


def test_temperature_is_chosen_by_all_streams_together():
    model, config = nn.Linear(64, 10), bkf.KalmanConfig(covariance="diagonal")
    images, labels = uci_digits_split(1197)[0]
    flat = nn.functional.avg_pool2d(images, 3)[:, 0].flatten(1)[:, :64]
    kf = bkf.KalmanFilter(model, config)
    start, parts = kf.init(flat[:32]), []
    for where in (slice(0, 100), slice(100, 200)):
        state = start
        for x, y in zip(flat[where].split(5), labels[where].split(5), strict=True):
            state, _ = kf.update(state, x, y)
        parts.append(bkf.Posterior(kf, state))
    actual = bkf.merge(parts)
    torch.testing.assert_close(
        actual.state.temperature_scores.total, sum(p.state.temperature_scores.total for p in parts)
    )
    assert actual.state.temperature_scores.updates == 40
    assert actual.history == {}


@pytest.mark.slow
def test_a_merged_posterior_of_digits_is_closer_to_that_of_all_data_than_its_parts():
    """A classifier on UCI's digits: four parts together are nearer to the whole than any of them."""
    (images, labels), (held, answers) = uci_digits_split(1197)
    flat, test = images.flatten(1)[:, ::12], held.flatten(1)[:, ::12]
    torch.manual_seed(0)
    kf = bkf.KalmanFilter(nn.Linear(flat.shape[1], 10), bkf.KalmanConfig(temperature=1.0))
    start = kf.init(flat[:32])

    def learned(where):
        state = start
        for x, y in zip(flat[where].split(10), labels[where].split(10), strict=True):
            state, _ = kf.update(state, x, y)
        return bkf.Posterior(kf, state)

    def loss(posterior):
        return -float(posterior.predict(test, "probit", targets=answers).log_prob.mean())

    parts = [loss(learned(slice(k, k + 150))) for k in range(0, 600, 150)]
    together = loss(bkf.merge([learned(slice(k, k + 150)) for k in range(0, 600, 150)]))
    whole = loss(learned(slice(0, 600)))
    assert abs(together - whole) < 0.5 * (min(parts) - whole)


def test_saved_merged_and_loaded(tmp_path):
    x, y = linear_data()
    config = bkf.KalmanConfig(likelihood="gaussian", **PLAIN)
    for index, (a, b) in enumerate(zip(x.split(20), y.split(20), strict=True)):
        fitted(linear(), a, b, config).save_pretrained(tmp_path / str(index))
    parts = [bkf.Posterior.from_pretrained(tmp_path / name, linear()) for name in "01"]
    merged = bkf.merge(parts)
    merged.save_pretrained(tmp_path / "both")
    assert same(bkf.Posterior.from_pretrained(tmp_path / "both", linear()).state, merged.state)
    onward, _ = merged.filter().update(merged.state, x[:2], y[:2])
    assert onward.examples == 42


def parts_of(first=None, second=None, models=(None, None)):
    x, y = linear_data()
    actual = []
    for options, model, where in ((first, models[0], slice(0, 20)), (second, models[1], slice(20, 40))):
        config = bkf.KalmanConfig(**{"likelihood": "gaussian", "covariance": "diagonal"} | PLAIN | (options or {}))
        actual.append(fitted(model or linear(), x[where], y[where], config))
    return actual


def test_no_posteriors_raise():
    with pytest.raises(ValueError, match="`posteriors` must hold at least one posterior, got none"):
        bkf.merge([])


@pytest.mark.parametrize(
    "setting",
    [
        {"forgetting": 0.9},
        {"drift_variance": 0.1},
        {"prior_pull": 0.1},
        {"gradient_penalty": 1.0},
        {"noise": "ema_taylor"},
        {"noise_variance": "estimated"},
    ],
    ids=str,
)
def test_settings_under_which_beliefs_are_not_prior_times_likelihoods_raise(setting):
    with pytest.raises(ValueError, match=f"must have no dynamics, .*got {next(iter(setting))}"):
        bkf.merge(parts_of(setting, setting))


def test_different_settings_raise():
    with pytest.raises(ValueError, match="the same settings, got another noise_variance in number 1"):
        bkf.merge(parts_of(None, {"noise_variance": 2.0}))
    bkf.merge(parts_of(None, {"seed": 5}))


def test_different_priors_raise():
    """Each measured the scale of its outputs on its own data."""
    measured = {"initial_variance": None}
    with pytest.raises(ValueError, match="must come from one prior, got another in number 1; begin with one"):
        bkf.merge(parts_of(measured, measured))


def test_different_tensors_and_frozen_weights_raise():
    def two_layers(width, seed=0):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, width), nn.Linear(width, 2)).double()
        model[0].requires_grad_(False)
        return model

    with pytest.raises(ValueError, match="over the same tensors, got others in number 1"):
        bkf.merge(parts_of(models=(two_layers(3), two_layers(4))))
    base = two_layers(3)
    other = copy.deepcopy(base)
    other[0].weight.data += 1.0
    with pytest.raises(ValueError, match="the same frozen weights, got others in number 1"):
        bkf.merge(parts_of(models=(base, other)))
    bkf.merge(parts_of(models=(base, copy.deepcopy(base))))


def test_the_merged_temperature_does_not_depend_on_the_order():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(40, 3)
    y = torch.arange(40) % 2
    config = bkf.KalmanConfig(covariance="full", initial_variance=1.0)
    parts = [bkf.fit(model, [(x[k : k + 20], y[k : k + 20])], config, progress=False) for k in (0, 20)]
    joint = bkf.merge(parts).temperature
    fixed = [bkf.Posterior(bkf.KalmanFilter(p.adapter, replace(p.config, temperature=0.3)), p.state) for p in parts]
    assert bkf.merge(fixed).temperature == 0.3
    for mixed in ([fixed[0], parts[1]], [parts[1], fixed[0]]):
        assert bkf.merge(mixed).temperature == joint
    kf = bkf.KalmanFilter(model, replace(config, temperature=0.3))
    untold = bkf.Posterior(kf, kf.update(kf.init(), x[:20], y[:20])[0])
    other = bkf.KalmanFilter(model, replace(config, temperature=3.0))
    with pytest.raises(ValueError, match=r"one temperature, or each a stream that chooses it, got 0.3, 3.0"):
        bkf.merge([untold, bkf.Posterior(other, other.update(other.init(), x[20:], y[20:])[0])])


def mixture_of(x, y, weights, variances=(0.4, 2.0), **settings):
    fits = []
    for variance in variances:
        plain = PLAIN | {"initial_variance": variance, "likelihood": "gaussian", "covariance": "full"} | settings
        fits.append(fitted(linear(), x, y, bkf.KalmanConfig(noise_variance=0.5, **plain)))
    return bkf.MixturePosterior(tuple(fits), weights)


def test_mixtures_are_merged_member_by_member():
    """Members are ordered by weight, so that the same one has another number in each mixture."""
    x, y = linear_data()
    first, second = mixture_of(x[:10], y[:10], (0.6, 0.4)), mixture_of(x[10:], y[10:], (0.1, 0.9))
    merged = bkf.merge([first, second])
    assert isinstance(merged, bkf.MixturePosterior)
    assert merged.weights == pytest.approx((0.36 / 0.42, 0.06 / 0.42))
    for member, variance in zip(merged.members, (2.0, 0.4), strict=True):
        assert member.config.initial_variance == variance
        whole = mixture_of(x, y, (1.0,), (variance,)).best
        torch.testing.assert_close(member.mean_vector, whole.mean_vector, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(member.covariance_matrix(), whole.covariance_matrix(), rtol=1e-8, atol=1e-10)
    assert bkf.merge([first]).weights == pytest.approx(first.weights)


def test_members_of_one_prior_are_told_apart_by_their_seeds():
    x, y = linear_data()
    parts, shares = (slice(0, 10), slice(10, 40)), ((0.6, 0.4), (0.2, 0.8))
    one, two = (
        bkf.MixturePosterior(
            tuple(mixture_of(x[part], y[part], (1.0,), (0.4,), seed=seed).best for seed in (0, 1)), weights
        )
        for part, weights in zip(parts, shares, strict=True)
    )
    merged = bkf.merge([one, two])
    assert [member.config.seed for member in merged.members] == [1, 0]
    assert merged.weights == pytest.approx((0.32 / 0.44, 0.12 / 0.44))


def test_mixtures_that_do_not_fit_together_are_refused():
    x, y = linear_data()
    mixture = mixture_of(x[:10], y[:10], (0.6, 0.4))
    with pytest.raises(ValueError, match="`posteriors` must all be mixtures or none, got 1 of 2"):
        bkf.merge([mixture, mixture.best])
    with pytest.raises(ValueError, match="mixtures of as many members, 2, got 1 in number 1"):
        bkf.merge([mixture, mixture_of(x[10:], y[10:], (1.0,), (0.4,))])
    with pytest.raises(ValueError, match=r"none like member 1 of the first in number 1: .*another initial_variance"):
        bkf.merge([mixture, mixture_of(x[10:], y[10:], (0.5, 0.5), (0.4, 3.0))])
