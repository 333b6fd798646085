"""Intervals in closed form: SciPy's where there is one, Monte Carlo, coverage, and what has none."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from bayes_kf import evaluation as ev
from bayes_kf.evaluation.calibration.intervals import (
    bounded_interval,
    loss_interval,
    proportion_interval,
    runner_up_losses,
    skewed_interval,
)
from bayes_kf.evaluation.calibration.rank_intervals import rank_correlation_interval

KINDS = ("calibrated", "over-confident", "under-confident", "one class", "label noise")
REPEATS = 150
LEAST = 0.9 - 3 * (0.9 * 0.1 / REPEATS) ** 0.5  # three standard errors below 90 %


def population(size: int, num_classes: int, kind: str, scale: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and labels; `scale` is the spread of the logits that the labels are drawn from."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(size, num_classes, generator=generator, dtype=torch.float64)
    targets = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    if kind == "label noise":
        noisy = torch.rand(size, generator=generator) < 0.1
        targets = torch.where(noisy, torch.randint(num_classes, (size,), generator=generator), targets)
    shift = torch.zeros(num_classes, dtype=torch.float64)
    shift[0] = math.log(3) if kind == "one class" else 0.0
    return (({"over-confident": 1.5, "under-confident": 1 / 1.5}.get(kind, 1.0) * logits) + shift).softmax(1), targets


@pytest.mark.parametrize(("hits", "count"), [(0, 1), (3, 3), (0, 30), (1, 30), (29, 30), (500, 1000)])
def test_intervals_of_proportions_are_clopper_and_pearsons(hits, count):
    expected = binomtest(hits, count).proportion_ci(0.95, "exact")
    assert proportion_interval(hits, count, 0.95) == pytest.approx(expected, abs=1e-12)
    values = torch.arange(count) < hits
    assert ev.mean_interval(values.double()) == pytest.approx(expected, abs=1e-12)
    shifted = ev.mean_interval(3 * values.double() - 1, bounds=(-1, 2))
    assert shifted == pytest.approx([3 * end - 1 for end in expected], abs=1e-9)


def test_intervals_of_means_are_those_of_the_bayesian_bootstrap():
    """Dirichlet weights on the examples and one more at the bound; 40,000 draws, and the Beta has no third moment."""
    values = torch.rand(80, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    weights = np.random.default_rng(0).dirichlet(np.ones(81), 40_000)
    expected = [np.quantile(weights @ np.r_[values, bound], q) for bound, q in ((0, 0.025), (1, 0.975))]
    low, high = ev.mean_interval(values)
    assert (low, high) == pytest.approx(expected, abs=0.02 * (high - low))


def test_every_interval_contains_its_value():
    rng = np.random.default_rng(0)
    for values in (np.ones(1), np.zeros(2), np.full(4, 0.3), rng.random(9), rng.random(4000) ** 9):
        low, high = ev.mean_interval(values)
        assert 0 <= low <= values.mean() <= high <= 1
        assert high > low
    losses = rng.exponential(size=60) ** 3
    result = loss_interval(*((losses**k).sum() for k in (1, 2, 3)), 60, 0.0, 0.95)
    assert result.low < losses.mean() < result.high
    low, high = skewed_interval(torch.from_numpy(losses), 0.95)
    assert low < losses.mean() < high
    for value in (-1.0, -0.3, 0.0, 1.0):
        result = rank_correlation_interval(value, 40, 0.95)
        assert result.low <= value <= result.high
        assert result.high - result.low > 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "num_classes", "scale"), [(60, 2, 6.0), (60, 10, 4.0), (300, 10, 1.0)])
def test_intervals_of_a_report_cover(kind, size, num_classes, scale):
    """The truth is that of all data sets together; Student's covered the log loss in 62 % where models are sharp."""
    probs, targets = population(REPEATS * size, num_classes, kind, scale, 1)
    confidence, hits = probs.amax(1), (probs.argmax(1) == targets).double()
    columns = {
        "accuracy": (hits, 0, 1),
        "brier": ((probs - torch.nn.functional.one_hot(targets, num_classes)).square().sum(1), 0, 2),
        "entropy": (ev.entropy(probs), 0, math.log(num_classes)),
        "gap": (confidence - hits, -1, 1),
    }
    inside = {"nll": 0}
    losses, unseen = -probs.gather(1, targets[:, None])[:, 0].log(), runner_up_losses(probs)
    for part, bound in zip(losses.view(REPEATS, size), unseen.view(REPEATS, size), strict=True):
        powers = (part.pow(k).sum().item() for k in (1, 2, 3))
        low, high = loss_interval(*powers, size, bound.mean().item(), 0.95)
        inside["nll"] += low <= losses.mean() <= high
    for name, (values, least, most) in columns.items():
        parts = values.view(REPEATS, size)
        result = [
            bounded_interval(total, squares, size, least, most, 0.95)
            for total, squares in zip(parts.sum(1).tolist(), parts.square().sum(1).tolist(), strict=True)
        ]
        inside[name] = sum(low <= values.mean() <= high for low, high in result)
    assert min(inside.values()) / REPEATS >= LEAST, inside


def test_where_nothing_went_wrong_yet_the_log_loss_is_not_certain():
    """One error in 300 costs 7 nats: data sets of 60 without one must not exclude it."""
    probs = torch.tensor([[0.999, 0.001]], dtype=torch.float64).expand(60, 2)
    scores = ev.evaluate_predictions(probs, torch.zeros(60, dtype=torch.int64), num_simulations=39).scores
    truth = -math.log(0.999) + math.log(999) / 300
    assert scores["nll"] < 0.01 < truth < scores["nll_high"]
    assert runner_up_losses(probs)[0].item() == pytest.approx(math.log(1000), abs=1e-9)


def test_calibration_errors_have_no_interval():
    probs, targets = population(300, 10, "calibrated", 2.0, 0)
    scores = ev.evaluate_predictions(probs, targets, top_k=(3,), num_simulations=39).scores
    errors = ("ece", "ece_equal_mass", "ece_debiased", "ece_smooth", "ks", "mce", "ece_classwise", "ece_top3")
    assert not {f"{name}{end}" for name in errors for end in ("_low", "_high")} & set(scores)
    assert {f"{name}_null_high" for name in errors} <= set(scores)
    assert {f"confidence_gap{end}" for end in ("_low", "_high", "_null_low")} <= set(scores)
    gap = ev.calibration_interval(probs, targets)
    assert (scores["confidence_gap_low"], scores["confidence_gap_high"]) == pytest.approx(gap, abs=1e-9)
    with pytest.raises(ValueError, match=r"^`statistic` must be one of gap, got 'ece'\.$"):
        ev.calibration_interval(probs, targets, "ece")


def test_infinite_losses_have_no_interval():
    scores = ev.evaluate_predictions(torch.tensor([[1.0, 0.0]] * 60), torch.arange(60) % 2, num_simulations=39).scores
    assert scores["nll"] == math.inf
    assert "nll_low" not in scores


def test_intervals_narrow_as_one_over_the_root():
    """At N = 10⁶ they are the normal ones."""
    values = torch.rand(10**6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = ev.mean_interval(values)
    half = 1.96 * values.std().item() / 1000
    assert (low, high) == pytest.approx((values.mean().item() - half, values.mean().item() + half), abs=0.02 * half)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": torch.rand(2, 2)}, "`values` must be a vector, got shape (2, 2)."),
        ({"values": torch.tensor([0.5, 1.5])}, "`values` must lie in 0..1, the `bounds`, got values in 0.5..1.5."),
        (
            {"values": torch.rand(5), "bounds": (0, math.inf)},
            "`bounds` must be two finite numbers, the smaller first, got (0, inf).",
        ),
        ({"values": torch.rand(5), "level": 0.0}, "`level` must lie strictly between 0 and 1, got 0.0."),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=r"^`") as error:
        ev.mean_interval(**arguments)
    assert str(error.value) == message


def test_sums_of_large_bounded_values_do_not_cancel():
    low, high = bounded_interval(1000 * 5.0, 1000 * 25.0, 1000, 0.0, 10.0, 0.95)
    assert low <= 5 <= high < 5.05
