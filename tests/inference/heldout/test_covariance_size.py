"""The size of a covariance: what it changes, and which one held-out examples choose."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import nn

import bayes_kf as bkf
from bayes_kf.inference.heldout import covariance_size, heldout_examples
from bayes_kf.inference.heldout.covariance_size import (
    SIZES,
    choose_common_size,
    choose_size,
    first_not_worse,
    with_size,
)
from bayes_kf.inference.heldout.heldout_examples import heldout_blocks, heldout_outputs, heldout_outputs_of
from bayes_kf.models.batch import Batch


def data(number, seed=0, classes=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 2, generator=generator, dtype=torch.float64)
    logits = 2.0 * torch.cat([x, x[:, :1] * x[:, 1:]], 1)
    logits = torch.nn.functional.pad(logits, (0, classes - 3))
    return x, torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)


def network(classes=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, classes)).double()


def batches(x, y, size=8):
    return [(x[k : k + size], y[k : k + size]) for k in range(0, len(x), size)]


def fitted(covariance="full", classes=3, **settings):
    x, y = data(80, classes=classes)
    config = bkf.KalmanConfig(covariance=covariance, rank=20, temperature=1.0, **settings)
    return bkf.fit(network(classes), batches(x, y), config, progress=False)


@pytest.mark.parametrize("covariance", ["full", "low_rank", "diagonal_information"])
def test_the_size_is_a_factor_on_the_precision_of_the_prior(covariance):
    posterior = fitted(covariance)
    prior_precision = torch.diag(1.0 / posterior.state.prior.variance)
    for size in (0.1, 1.0, 30.0):
        sized = with_size(posterior, size)
        expected = torch.linalg.inv(posterior.covariance_matrix()) + (size - 1.0) * prior_precision
        torch.testing.assert_close(torch.linalg.inv(sized.covariance_matrix()), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(sized.mean_vector, posterior.mean_vector)
        assert sized.temperature == 1.0


def test_with_dynamics_the_size_is_a_temperature():
    posterior = fitted(forgetting=0.99)
    sized = with_size(posterior, 4.0)
    assert sized.temperature == 0.25
    assert torch.equal(sized.covariance_matrix(), posterior.covariance_matrix())


@pytest.mark.parametrize("pieces", [1, 3])  # texts come in batches of several lengths, which cannot be concatenated
def test_blocks_hold_the_covariance_of_all_their_outputs(pieces):
    posterior = fitted()
    x, y = data(12, seed=1)
    (block,) = heldout_blocks(posterior, batches(x, y, 12 // pieces))
    dense = posterior.kf.linearize(posterior.mean_vector, Batch.of(x)).jacobian().dense().flatten(0, 1)
    expected = dense @ posterior.covariance_matrix() @ dense.mT
    actual = posterior.state.belief.joint_output_covariance(block.jacobian)
    centre = torch.eye(3).double() - 1.0 / 3  # softmax ignores a shift of all outputs of an example
    centre = torch.block_diag(*[centre] * 12)
    torch.testing.assert_close(centre @ actual @ centre, centre @ expected @ centre, rtol=1e-7, atol=1e-9)
    assert torch.equal(block.targets, y)


def test_of_many_classes_a_block_keeps_the_likely_ones_and_the_label():
    posterior = fitted(classes=12)
    x, y = data(10, seed=1, classes=12)
    (block,) = heldout_blocks(posterior, batches(x, y, 5))
    outputs = posterior.adapter.outputs(posterior.mean_vector, x)
    assert block.outputs.shape[1] <= 7
    expected = posterior.likelihood.log_prob(outputs, y)
    torch.testing.assert_close(block.family.log_prob(block.outputs, block.targets), expected)
    likely = outputs.argmax(1)
    each = posterior.state.belief.output_covariance(block.jacobian)
    dense = posterior.kf.linearize(posterior.mean_vector, Batch.of(x)).jacobian().dense()
    rows = dense[range(10), likely]
    variance = torch.einsum("bi,ij,bj->b", rows, posterior.covariance_matrix(), rows)
    column = (block.outputs - outputs.gather(1, likely[:, None])).abs().argmin(1)
    torch.testing.assert_close(each[range(10), column, column], variance)


def test_the_chosen_size_of_a_linear_regression_is_the_most_probable_one():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([[0.3], [-0.2], [0.1]], dtype=torch.float64) + 0.5 * torch.randn(60, 1, generator=generator)
    config = bkf.KalmanConfig(
        likelihood="gaussian", covariance="full", noise_variance=0.25, initial_variance=50.0, temperature=1.0
    )
    posterior = bkf.fit(nn.Linear(3, 1, bias=False).double(), batches(x[:10], y[:10]), config, progress=False)
    held, targets = x[10:], y[10:]
    mean, precision = posterior.mean_vector.numpy(), np.linalg.inv(posterior.covariance_matrix().numpy())
    residual = targets.numpy().ravel() - held.numpy() @ mean

    def covariance(size):
        return held.numpy() @ np.linalg.inv(precision + (size - 1) / 50.0 * np.eye(3)) @ held.numpy().T

    def height(size):
        total = covariance(size) + 0.25 * np.eye(50)
        return multivariate_normal(cov=total).logpdf(residual) - 0.5 * np.log10(size) ** 2

    def losses(size):
        variance = np.diag(covariance(size)) + 0.25
        return torch.tensor(0.5 * (np.log(2 * np.pi * variance) + residual**2 / variance))

    grid = np.logspace(0, 3, 2001)
    most_probable = grid[np.argmax([height(size) for size in grid])]
    larger = [most_probable, *(size for size in SIZES if size > most_probable)]
    expected = larger[first_not_worse([losses(size) for size in larger])]
    choice = choose_size(posterior, batches(held, targets, 25))
    assert choice.value == pytest.approx(expected, rel=0.05)
    assert choice.low <= choice.value <= choice.high


def test_the_size_grows_only_until_single_examples_are_predicted_well():
    base = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std(correction=0)  # mean 0, and a standard error of 1/7
    assert first_not_worse([base + noise + 1.9 / 7, base, base + 1.0]) == 0
    assert first_not_worse([base + noise + 2.1 / 7, base, base + 1.0]) == 1
    assert first_not_worse([base + 1.0, base + noise + 0.5 / 7, base]) == 1
    assert first_not_worse([torch.full_like(base, torch.inf), base]) == 1
    assert first_not_worse([base + 0.001 * noise + 0.019, base]) == 0  # significant, but small
    assert first_not_worse([base + 0.001 * noise + 0.021, base]) == 1
    for excess, first in ((0.019, 0), (0.021, 1)):  # without standard errors 0.02 nats decide, whatever the noise
        assert first_not_worse([base + noise + excess, base], standard_errors=0.0) == first


def test_the_common_size_is_the_most_probable_one_of_all_posteriors_together():
    x, y = data(200)
    starts = (network(seed=0), network(seed=1))
    config = bkf.KalmanConfig(covariance="full", temperature=1.0, initial_logit_sd=10.0)
    parts = [batches(x[k : k + 50], y[k : k + 50]) for k in (100, 150)]
    pairs = [
        (bkf.fit(start, batches(x[:100], y[:100]), config, progress=False), part)
        for start, part in zip(starts, parts, strict=True)
    ]
    one = choose_common_size(pairs[:1])
    assert one == choose_size(*pairs[0])
    both, other = choose_common_size(pairs), choose_size(*pairs[1])
    assert min(one.low, other.low) <= both.value <= max(one.high, other.high)
    twice = choose_common_size([pairs[0], pairs[0]])
    assert twice.high / twice.low < one.high / one.low  # the same examples twice are more certain


def test_held_out_outputs_are_those_of_the_posterior():
    posterior = fitted()
    x, y = data(20, seed=1)
    outputs = heldout_outputs(posterior, batches(x, y))
    prediction = posterior.predict(x, targets=y, num_samples=20_000)
    torch.testing.assert_close(outputs.log_loss(), -prediction.log_prob.double(), rtol=0, atol=0.02)


@pytest.mark.parametrize(("most", "count"), [(2**13, 200), (12 * 150, 100), (12, 100)])
def test_of_many_outputs_fewer_examples_stop_the_growth(most, count, monkeypatch):
    posterior = fitted(classes=12)
    monkeypatch.setattr(covariance_size, "MOST_OUTPUTS", most)
    held = [(posterior, batches(*data(100, seed=seed, classes=12))) for seed in (1, 2)]
    losses = covariance_size._losses(held, [1.0, 3.0])
    assert [len(each) for each in losses] == [count, count]


@pytest.mark.parametrize("covariance", ["full", "low_rank"])  # one size at a time, and all sizes together
def test_every_posterior_has_its_own_noise(covariance):
    x, _ = data(40)
    y = x[:, :1]
    noise_vars, held = (0.04, 4.0), []
    for noise_var in noise_vars:
        config = bkf.KalmanConfig(
            likelihood="gaussian", covariance=covariance, noise_variance=noise_var, forgetting=0.99, temperature=1.0
        )
        held.append((bkf.fit(network(1), batches(x, y), config, progress=False), batches(x, y)))
    together = covariance_size._losses(held, [1.0, 3.0])
    for size, losses in zip((1.0, 3.0), together, strict=True):
        each = [heldout_outputs(with_size(posterior, size), loader).log_loss() for posterior, loader in held]
        torch.testing.assert_close(losses, torch.cat(each))


@pytest.mark.parametrize("by_draws", [False, True])
def test_held_out_outputs_at_several_sizes_are_those_at_each(by_draws, monkeypatch):
    monkeypatch.setattr(heldout_examples, "parameter_draws_are_cheaper", lambda *_: by_draws)
    posterior = fitted()
    x, y = data(20, seed=1)
    sized = [with_size(posterior, size) for size in (1.0, 30.0)]
    together = heldout_outputs_of(sized, batches(x, y))
    assert [held.root is not None for held in together] == [by_draws] * 2
    for one, held in zip(sized, together, strict=True):
        assert torch.equal(held.log_loss(1.3), heldout_outputs(one, batches(x, y)).log_loss(1.3))
    assert not torch.equal(together[0].log_loss(), together[1].log_loss())


def test_the_size_grows_until_all_classes_are_predicted_well():
    """A block makes one class of the many unlikely ones, which hides what these take from the label."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 8, generator=generator, dtype=torch.float64)
    y = torch.randint(40, (100,), generator=generator)
    x = centres[y] + 0.3 * torch.randn(100, 8, generator=generator, dtype=torch.float64)
    model = nn.Linear(8, 40, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(0.3 * centres)
    config = bkf.KalmanConfig(covariance="diagonal", initial_variance=1.0, temperature=1.0)
    kf = bkf.KalmanFilter(bkf.AdapterModel(model), config)
    posterior = bkf.Posterior(kf, kf.init(x), {})
    means = [
        -with_size(posterior, size).predict(x, targets=y, num_samples=500).log_prob.double().mean() for size in SIZES
    ]
    assert means[0] - min(means) > 0.5, means  # by independent draws
    chosen = choose_size(posterior, batches(x, y, 50))
    assert 10.0 < chosen.value < 1000.0


@pytest.mark.parametrize("call", [choose_size, heldout_outputs])
def test_held_out_data_need_targets(call):
    x, _ = data(4)
    with pytest.raises(ValueError, match="`loader` must yield targets with every batch, got none in batch 0"):
        call(fitted(), [x])
    with pytest.raises(ValueError, match="`loader` must yield at least one batch, got none"):
        call(fitted(), [])
