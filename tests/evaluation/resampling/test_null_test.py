"""Null bands and p-values from simulated values."""

import numpy as np
import pytest
import torch

from bayes_kf.evaluation.resampling.null_test import (
    CalibrationNull,
    check_simulation,
    compare_to_null,
    null_quantiles,
    summarize_null,
)


@pytest.mark.parametrize("size", [39, 99, 1000])
def test_the_kth_of_r_values_is_the_quantile_k_over_r_plus_one(size):
    values = torch.from_numpy(np.random.default_rng(0).normal(size=size))
    shares = np.arange(1, size + 1) / (size + 1)
    torch.testing.assert_close(null_quantiles(values, shares), values.sort().values, rtol=0, atol=1e-12)


def test_quantiles_of_each_column():
    values = torch.from_numpy(np.random.default_rng(1).normal(size=(99, 3)))
    values[:, 1] = torch.nan  # an empty bin
    low, high = null_quantiles(values, (0.1, 0.9))
    assert low.isnan().tolist() == high.isnan().tolist() == [False, True, False]
    ordered = values.sort(dim=0).values
    torch.testing.assert_close(low[[0, 2]], ordered[9, [0, 2]], rtol=0, atol=1e-12)
    torch.testing.assert_close(high[[0, 2]], ordered[89, [0, 2]], rtol=0, atol=1e-12)


def test_a_null_without_ties_is_its_mean_and_central_interval():
    null = summarize_null(torch.arange(1.0, 40.0, dtype=torch.float64), 0.9)
    assert null == pytest.approx(CalibrationNull(20.0, 2.0, 38.0))


def test_the_band_starts_at_the_smallest_value_if_many_values_equal_it():
    """Half of the values are zero: the upper tail has the whole probability outside the band."""
    values = torch.cat([torch.zeros(19), torch.arange(1.0, 21.0)]).double()
    assert summarize_null(values, 0.9) == pytest.approx(CalibrationNull(values.mean().item(), 0.0, 17.0))


def test_the_p_value_counts_values_at_least_as_far_from_zero():
    null = torch.tensor([-3.0, -1.0, 0.5, 2.0] * 10, dtype=torch.float64)
    assert compare_to_null(torch.tensor(-2.0), null, 0.95).p_value == (1 + 20) / 41
    assert compare_to_null(torch.tensor(4.0), null, 0.95).p_value == 1 / 41
    assert compare_to_null(torch.tensor(2.0 + 1e-13, dtype=torch.float64), null, 0.95).p_value == (1 + 20) / 41


def test_the_p_value_may_compare_another_value():
    null = torch.arange(40.0, dtype=torch.float64)
    value, coarse = torch.tensor(100.0), torch.tensor(39.0)
    result = compare_to_null(value, null, 0.95, compared=coarse)
    assert (result.value, result.p_value) == (100.0, 2 / 41)


@pytest.mark.parametrize(
    ("num_simulations", "level", "message"),
    [
        (38, 0.95, r"^`num_simulations` must be at least 39 for level 0\.95, got 38\.$"),
        (0, 0.95, r"^`num_simulations` must be a positive integer, got 0\.$"),
        (99, 1.0, r"^`level` must lie strictly between 0 and 1, got 1\.0\.$"),
    ],
)
def test_too_few_simulations_are_refused(num_simulations, level, message):
    with pytest.raises(ValueError, match=message):
        check_simulation(num_simulations, level)
    check_simulation(39, 0.95)
