"""Bootstrap intervals: coverage of known values, agreement with SciPy's, and the ends."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap

from bayes_kf import evaluation as ev
from bayes_kf.evaluation.binning import class_cells
from bayes_kf.evaluation.bootstrap import LARGE, classwise_interval, resampled_indices


def population(size: int, gap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two-class predictions whose confidence is `gap` too high everywhere; binned error and gap are known."""
    generator = torch.Generator().manual_seed(0)
    confidence = 0.65 + 0.3 * torch.rand(size, generator=generator, dtype=torch.float64)
    hit = torch.rand(size, generator=generator, dtype=torch.float64) < confidence - gap
    return torch.stack([confidence, 1 - confidence], dim=1), (~hit).long()


def test_mean_interval_equals_scipys_up_to_chance():
    values = torch.randn(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()
    low, high = ev.mean_interval(values, num_resamples=20_000)
    rng = np.random.default_rng(1)
    theirs = bootstrap((values.numpy(),), np.mean, n_resamples=20_000, method="percentile", rng=rng, vectorized=True)
    spread = values.std().item() / math.sqrt(300)
    assert low == pytest.approx(theirs.confidence_interval.low, abs=0.05 * spread)
    assert high == pytest.approx(theirs.confidence_interval.high, abs=0.05 * spread)


def test_many_examples_take_the_normal_limit_which_agrees():
    values = torch.rand(LARGE + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    limit, drawn = ev.mean_interval(values), ev.mean_interval(values[:-1], num_resamples=4000)
    width = limit.high - limit.low
    assert drawn.low == pytest.approx(limit.low, abs=0.05 * width)
    assert drawn.high == pytest.approx(limit.high, abs=0.05 * width)


def test_infinite_losses_stay_infinite():
    values = torch.tensor([1.0, 2.0, math.inf] * 20)
    assert ev.mean_interval(values) == (math.inf, math.inf)
    assert ev.mean_interval(torch.tensor([0.5])) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("statistic", "least"), [("gap", 0.92), ("ece", 0.90), ("debiased", 0.90), ("smooth", 0.90), ("ks", 0.90)]
)
def test_intervals_of_calibration_errors_cover_the_true_one(statistic, least):
    """True value 0.08: every example is 8 points too sure. 300 data sets of 800; three standard errors are 3.8 %."""
    probs, targets = population(240_000, 0.08)
    covered = 0
    for repetition in range(300):
        rows = slice(800 * repetition, 800 * (repetition + 1))
        low, high = ev.calibration_interval(
            probs[rows], targets[rows], statistic, num_bins=10, num_resamples=200, seed=repetition
        )
        covered += low <= 0.08 <= high
    assert least <= covered / 300 <= 0.985


def test_classwise_intervals_cover_the_true_error():
    """Three classes, every odds of the first one doubled; the true error is that of 400,000 examples."""
    generator = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(400_000, 3, generator=generator, dtype=torch.float64)
    targets = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    probs = (logits + torch.tensor([math.log(2), 0, 0])).softmax(dim=1)
    true = ev.expected_calibration_error(probs, targets, 5, kind="classwise")
    covered = 0
    for repetition in range(300):
        rows = slice(1000 * repetition, 1000 * (repetition + 1))
        cells = class_cells(probs[rows], 5, "equal_width")
        found = classwise_interval(cells, probs[rows], targets[rows], 0.95, 200, repetition)
        assert found is not None
        covered += found.low <= true <= found.high
    assert 0.90 <= covered / 300 <= 0.985


def test_classwise_resamples_by_hand():
    """The same indices, one resampled data set after the other."""
    probs, targets = population(40, 0.1)
    cells = class_cells(probs, 5, "equal_width")
    value = ev.expected_calibration_error(probs, targets, 5, kind="classwise")
    residual = probs - torch.nn.functional.one_hot(targets, 2)
    errors = []
    for index in torch.cat(list(resampled_indices(40, 39, 3))):
        sums = torch.zeros(cells.num_cells, dtype=torch.float64)
        sums.index_add_(0, cells.index[index].flatten(), residual[index].flatten())
        errors.append(sums.abs().sum().item() / 80)
    found = classwise_interval(cells, probs, targets, 0.95, 39, 3)
    assert found == pytest.approx((max(0, 2 * value - max(errors)), 2 * value - min(errors)), abs=1e-12)


def test_intervals_end_at_zero_and_hold_no_more_than_there_is():
    probs, targets = population(500, 0.0)
    low, high = ev.calibration_interval(probs, targets, "ece")
    assert low == 0
    assert high < 0.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_resamples": 38}, "`num_resamples` must be at least 39 for level 0.95, got 38."),
        ({"level": 0.0}, "`level` must lie strictly between 0 and 1, got 0.0."),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=r"^`") as error:
        ev.mean_interval(torch.rand(5), **settings)
    assert str(error.value) == message


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match=r"^`values` must be a vector, got shape \(2, 2\)\.$"):
        ev.mean_interval(torch.rand(2, 2))
    with pytest.raises(ValueError, match=r"^`statistic` must be one of ece, mce"):
        ev.calibration_interval(torch.full((2, 2), 0.5), torch.tensor([0, 1]), "nll")
