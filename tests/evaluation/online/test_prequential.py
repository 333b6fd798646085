"""Regression, online scores and filter health."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from sklearn.metrics import root_mean_squared_error

from bayes_kf import evaluation as ev


def gaussian_case(spread_sd: float = 1.0, num_samples: int = 400) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(3000, 2, generator=generator, dtype=torch.float64)
    targets = mean + torch.randn(3000, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_samples, 3000, 2, generator=generator, dtype=torch.float64)
    return mean, targets, mean + spread_sd * noise


def test_rmse_equals_sklearn():
    mean, targets, _ = gaussian_case(num_samples=1)
    expected = root_mean_squared_error(targets.flatten(), mean.flatten())
    assert ev.rmse(mean, targets) == pytest.approx(expected, abs=1e-12)


def test_mean_log_loss_takes_impossible_targets():
    assert ev.mean_log_loss(np.array([-1.0, -3.0])) == 2
    assert ev.mean_log_loss(np.array([-1.0, -np.inf])) == math.inf


@pytest.mark.parametrize("num_samples", [39, 64, 400])
def test_right_samples_cover_as_they_should_whatever_their_number(num_samples):
    _, targets, samples = gaussian_case(num_samples=num_samples)
    result = ev.interval_coverage(samples, targets)
    # 6,000 targets: five standard errors; linear interpolation between normal order statistics adds less than 0.004
    margin = 5 * (result.levels * (1 - result.levels) / 6000).sqrt() + 0.004
    assert ((result.coverage - result.levels).abs() < margin).all()


def test_gaussian_and_sampled_coverage_agree_on_too_narrow_intervals():
    mean, targets, samples = gaussian_case(spread_sd=0.5, num_samples=2000)
    by_moments = ev.gaussian_coverage(mean, torch.full_like(mean, 0.25), targets).coverage
    by_samples = ev.interval_coverage(samples, targets).coverage
    torch.testing.assert_close(by_samples, by_moments, rtol=0, atol=0.02)
    assert by_moments[2].item() == pytest.approx(2 * 0.8365 - 1, abs=0.03)  # P(|z| < 0.98)


def test_coverage_band_is_binomial():
    low, high = ev.coverage_null(torch.tensor([0.95]), num_targets=10_000)
    standard_error = (0.95 * 0.05 / 10_000) ** 0.5
    assert low.item() == pytest.approx(0.95 - 1.96 * standard_error, abs=2e-4)
    assert high.item() == pytest.approx(0.95 + 1.96 * standard_error, abs=2e-4)


def test_bad_regression_input_is_refused():
    mean, targets, samples = gaussian_case(num_samples=38)
    with pytest.raises(ValueError, match=r"^`samples` must hold at least 39 draws for this interval, got 38\.$"):
        ev.interval_coverage(samples, targets, levels=(0.95,))
    with pytest.raises(ValueError, match=r"^`targets` must have the shape of `mean`, \(3000, 2\), got \(3000,\)\.$"):
        ev.rmse(mean, targets[:, 0])
    with pytest.raises(ValueError, match=r"^`variance` must be positive, got 0\.$"):
        ev.gaussian_coverage(mean, torch.zeros_like(mean), targets)
    with pytest.raises(ValueError, match=r"^`levels` must lie strictly between 0 and 1, got 95\.$"):
        ev.gaussian_coverage(mean, torch.ones_like(mean), targets, levels=(95,))


def test_online_scores_by_hand():
    correct = torch.tensor([True, False, True, True])
    assert ev.running_accuracy(correct).tolist() == pytest.approx([1, 1 / 2, 2 / 3, 3 / 4])
    losses = np.array([0.5, 1.5, 4.0])
    assert ev.prequential_log_loss(losses).tolist() == pytest.approx([0.5, 1.0, 2.0])
    assert ev.moving_average(losses, 2).tolist() == pytest.approx([1.0, 2.75])
    assert ev.moving_average(losses, 3).tolist() == pytest.approx([2.0])


def test_regret_is_what_was_lost_so_far():
    regret = ev.prequential_regret(torch.tensor([1.0, 3.0, 0.5]), torch.tensor([0.5, 1.0, 1.0]))
    assert regret.tolist() == [0.5, 2.5, 2.0]
    loss = torch.rand(50, generator=torch.Generator().manual_seed(0))
    assert ev.prequential_regret(loss, torch.zeros(50))[-1] / 50 == pytest.approx(ev.prequential_log_loss(loss)[-1])
    with pytest.raises(ValueError, match=r"^`reference` must hold as many losses as `log_loss`, 3, got 2\.$"):
        ev.prequential_regret(torch.zeros(3), torch.zeros(2))


def test_one_infinite_loss_leaves_the_later_windows_alone():
    values = torch.tensor([1.0, math.inf, 2.0, 4.0])
    assert ev.moving_average(values, 2).tolist() == [math.inf, math.inf, 3.0]
    assert ev.prequential_log_loss(values)[0] == 1


def test_bad_series_are_refused():
    with pytest.raises(ValueError, match=r"^`window` must be at most the number of values, 3, got 4\.$"):
        ev.moving_average(torch.ones(3), 4)
    with pytest.raises(ValueError, match=r"^`window` must be a positive integer, got 0\.$"):
        ev.moving_average(torch.ones(3), 0)
    with pytest.raises(ValueError, match=r"^`correct` must lie between zero and one, got values in 0\.\.2\.$"):
        ev.running_accuracy(torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"^`log_loss` must not hold NaN, got 1 bad of 2 values\.$"):
        ev.prequential_log_loss(torch.tensor([math.nan, 1.0]))
    with pytest.raises(ValueError, match=r"^`log_loss` must be a vector, got shape \(2, 1\)\.$"):
        ev.prequential_log_loss(torch.ones(2, 1))


def test_innovation_band_holds_a_consistent_filter():
    """Windows that do not overlap are independent: 95 % of them lie inside, within five standard errors."""
    rng = np.random.default_rng(0)
    dof = rng.integers(1, 10, 40_000)
    health = ev.innovation_health(rng.chisquare(dof), dof, window=20)
    separate = slice(None, None, 20)
    inside = ((health.low <= health.ratio) & (health.ratio <= health.high))[separate].double().mean().item()
    assert inside == pytest.approx(0.95, abs=5 * (0.95 * 0.05 / 2000) ** 0.5)


def test_an_innovation_may_be_zero():
    assert ev.innovation_whiteness(np.array([0.0, 0.9, 0.5]), 1, lags=1).p_value == pytest.approx(
        ev.innovation_whiteness(np.array([0.1, 0.9, 0.5]), 1, lags=1).p_value
    )  # by ranks


def test_innovation_ratio_and_band_by_hand():
    health = ev.innovation_health(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1, 2, 4]), window=2, level=0.9)
    assert health.step.tolist() == [2, 3]
    assert health.ratio.tolist() == pytest.approx([3 / 3, 8 / 6])
    assert health.low.tolist() == pytest.approx([chi2.ppf(0.05, 3) / 3, chi2.ppf(0.05, 6) / 6])
    assert health.high.tolist() == pytest.approx([chi2.ppf(0.95, 3) / 3, chi2.ppf(0.95, 6) / 6])


def test_bad_innovations_are_refused():
    with pytest.raises(ValueError, match=r"^`nis` must not be negative, got -1\.$"):
        ev.innovation_health(torch.tensor([-1.0]), 1, window=1)
    with pytest.raises(ValueError, match=r"^`dof` must be one number or 2 as `nis` has, got 3\.$"):
        ev.innovation_health(torch.ones(2), torch.ones(3), window=1)
    with pytest.raises(ValueError, match=r"^`dof` must be positive, got 0\.$"):
        ev.innovation_health(torch.ones(2), 0, window=1)


def test_whiteness_calls_consistent_filters_white_as_often_as_it_says():
    """400 streams of independent χ²: at 5 % the share of alarms lies within four standard errors."""
    rng = np.random.default_rng(0)
    dof = rng.integers(1, 20, size=200)
    p_values = np.array([ev.innovation_whiteness(rng.chisquare(dof), dof).p_value for _ in range(400)])
    for level in (0.05, 0.2, 0.5):
        error = (level * (1 - level) / 400) ** 0.5
        assert abs((p_values < level).mean() - level) < 4 * error + 0.01  # Q is χ² only for long streams


def test_whiteness_sees_innovations_that_come_in_runs():
    rng = np.random.default_rng(1)
    level = np.zeros(500)
    for t in range(1, 500):
        level[t] = 0.8 * level[t - 1] + rng.normal()
    result = ev.innovation_whiteness(np.exp(0.5 * level) * rng.chisquare(3, size=500), 3)
    assert result.p_value < 1e-6
    assert result.autocorrelation[0] > 0.2


def test_whiteness_by_hand():
    """Q written out for three values by hand: ranks 1, 3, 2 less their mean are −1, 1, 0."""
    result = ev.innovation_whiteness(np.array([0.1, 0.9, 0.5]), 1, lags=1)
    assert result.autocorrelation.tolist() == pytest.approx([-0.5])
    assert result.statistic == pytest.approx(3 * 5 * 0.25 / 2)
    assert result.p_value == pytest.approx(chi2.sf(1.875, 1))


def test_bad_whiteness_is_refused():
    with pytest.raises(ValueError, match=r"^`lags` must be below the number of updates less one, 9, got 10\.$"):
        ev.innovation_whiteness(np.ones(10), 1)


def test_whiteness_ranks_innovations_far_above_what_was_expected():
    """Where every probability is one or zero in floating point, large innovations still differ."""
    far = np.linspace(100, 1e4, 500)
    assert ev.innovation_whiteness(far, 1).p_value < 1e-12
    dof = np.arange(500) % 3 + 1
    assert ev.innovation_whiteness(far, dof).p_value < 1e-12
    assert ev.innovation_whiteness(np.linspace(1e-3, 1, 500), 1000 + dof).p_value < 1e-12  # far below
    assert abs(ev.innovation_whiteness(np.random.default_rng(0).permutation(far), dof).p_value) > 0.01


def test_whiteness_compares_different_degrees_of_freedom_by_their_probabilities():
    """Many degrees of freedom after few: at 5 % the share of alarms lies within four standard errors."""
    rng, dof = np.random.default_rng(0), np.repeat([1, 50], 150)
    alarms = sum(ev.innovation_whiteness(rng.chisquare(dof), dof).p_value < 0.05 for _ in range(400))
    assert abs(alarms / 400 - 0.05) < 4 * (0.05 * 0.95 / 400) ** 0.5 + 0.01
