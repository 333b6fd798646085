"""Debiased, smooth, Kolmogorov-Smirnov and top-k errors by brute force; bands at three sizes; Spiegelhalter's test."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.fft import dct, idct
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import binomtest

from bayes_kf import evaluation as ev
from bayes_kf.evaluation.calibration.confidence_profile import MAX_CELLS, coarse_profile, exact_profile, profile_bins
from bayes_kf.evaluation.calibration.smooth_ece import smooth_error
from bayes_kf.evaluation.calibration.statistics import class_statistic, profile_statistic
from bayes_kf.evaluation.report.score_table import score_table
from bayes_kf.evaluation.resampling.binning import classwise_bins, observed_hits

CASES = [(1, 2), (2, 2), (40, 3), (500, 4), (500, 12)]


def random_case(num_examples: int, num_classes: int, seed: int, ties: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_examples, num_classes, generator=generator, dtype=torch.float64)
    probs = (logits.round() if ties else logits).softmax(dim=1)
    probs[: num_examples // 5] = torch.eye(num_classes, dtype=torch.float64)[0]  # exactly one and zero
    return probs, torch.randint(num_classes, (num_examples,), generator=generator)


def confidence_and_hit(probs: torch.Tensor, targets: torch.Tensor, top_k: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """With stable sorting by hand: the first of equal classes come first."""
    rows = [sorted(range(len(row)), key=lambda c: (-row[c], c))[:top_k] for row in probs.tolist()]
    confidence = [min(1.0, sum(row[c] for c in top)) for row, top in zip(probs.tolist(), rows, strict=True)]
    return np.array(confidence), np.array([float(t in top) for t, top in zip(targets.tolist(), rows, strict=True)])


def cases():
    return list(itertools.product(CASES, range(3), (False, True)))


@pytest.mark.parametrize(("size", "seed", "ties"), cases())
def test_kolmogorov_smirnov_error_by_hand(size, seed, ties):
    probs, targets = random_case(*size, seed, ties)
    confidence, hit = confidence_and_hit(probs, targets)
    expected = max(abs((confidence - hit)[confidence <= c].sum()) for c in confidence) / len(hit)
    assert ev.ks_calibration_error(probs, targets) == pytest.approx(expected, abs=1e-12)
    assert expected >= abs(ev.confidence_gap(probs, targets)) - 1e-12


@pytest.mark.parametrize(("size", "seed", "ties"), cases())
def test_debiased_error_by_hand(size, seed, ties):
    probs, targets = random_case(*size, seed, ties)
    confidence, hit = confidence_and_hit(probs, targets)
    edges = ev.reliability_bins(probs, targets, 10, "equal_mass").edges.numpy()
    total = 0.0
    for b, low in enumerate(edges[:-1]):
        last = b == len(edges) - 2
        inside = (confidence >= low) & (confidence <= edges[b + 1] if last else confidence < edges[b + 1])
        if inside.sum() > 1:
            gap = hit[inside].mean() - confidence[inside].mean()
            total += inside.sum() * (gap**2 - hit[inside].var(ddof=1) / inside.sum())
    expected = math.sqrt(max(0.0, total / len(hit)))
    assert ev.debiased_calibration_error(probs, targets, 10) == pytest.approx(expected, abs=1e-9)


def test_the_debiased_error_of_calibrated_models_is_near_zero_where_the_plain_one_is_not():
    """Squares averaged over 400 data sets: nothing is left of what chance adds."""
    generator = torch.Generator().manual_seed(0)
    plain = debiased = 0.0
    for _ in range(400):
        probs = (1.5 * torch.randn(200, 4, generator=generator, dtype=torch.float64)).softmax(dim=1)
        targets = torch.multinomial(probs, 1, generator=generator)[:, 0]
        bins = ev.reliability_bins(probs, targets, 10, "equal_mass")
        share = bins.counts.double() / 200
        noise = (share * bins.accuracy * (1 - bins.accuracy) / (bins.counts - 1)).sum().item()
        square = (share * (bins.accuracy - bins.confidence).square()).sum().item()
        plain += square / 400
        debiased += (square - noise) / 400
        result = ev.debiased_calibration_error(probs, targets, 10)
        assert result == pytest.approx(math.sqrt(max(0.0, square - noise)), abs=1e-9)
    assert plain > 0.005
    assert abs(debiased) < 0.05 * plain


def smooth_error_by_quadrature(confidence: np.ndarray, hit: np.ndarray) -> float:
    """The definition with seven images of each kernel on either side, integrated on 40,001 points."""
    grid = np.linspace(0, 1, 40_001)
    residual = (confidence - hit) / len(hit)

    def error(width: float) -> float:
        images = [2 * k + sign * c for k in range(-3, 4) for sign, c in ((1, confidence), (-1, confidence))]
        total = sum(np.exp(-0.5 * ((grid[:, None] - image) / width) ** 2) @ residual for image in images)
        return float(np.trapezoid(np.abs(total), grid)) / (width * math.sqrt(2 * math.pi))

    return brentq(lambda width: error(width) - width, 1e-3, 1.0, xtol=1e-10)


@pytest.mark.parametrize(("size", "seed", "ties"), [((1, 2), 0, False), ((40, 3), 1, True), ((120, 4), 2, False)])
def test_smooth_error_equals_quadrature(size, seed, ties):
    probs, targets = random_case(*size, seed, ties)
    expected = smooth_error_by_quadrature(*confidence_and_hit(probs, targets))
    assert ev.smooth_calibration_error(probs, targets) == pytest.approx(expected, abs=1e-6)


def test_smooth_error_of_one_confidence_is_the_gap():
    """One residual keeps its sign wherever it is smeared: the integral is its size."""
    probs = torch.tensor([[0.8, 0.2]] * 10)
    targets = torch.tensor([0] * 5 + [1] * 5)
    assert ev.smooth_calibration_error(probs, targets) == pytest.approx(0.3, abs=1e-6)
    one, _ = quad(lambda t: math.exp(-0.5 * ((t - 0.8) / 0.3) ** 2) / (0.3 * math.sqrt(2 * math.pi)), -5, 5)
    assert one == pytest.approx(1)


def test_each_of_many_smooth_errors_is_where_the_width_is_the_error():
    """By brentq on what the kernel leaves, for residuals that fall off slowly, at once, not at all, and none."""
    confidence = (torch.arange(1024, dtype=torch.float64) + 0.5) / 1024  # on the points of the grid
    by_turns = 1.0 - 2.0 * (torch.arange(1024) // 3 % 2)
    noise = torch.randn(1024, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    residual = torch.stack([noise, 0.02 * noise, noise + 0.3, by_turns, 1e-3 * by_turns, 0.4 + 0 * noise, 0 * noise])
    result = smooth_error(confidence, residual / 1024)
    for row, error in zip(residual / 1024, result.tolist(), strict=True):
        spectrum, frequency = dct(row.numpy(), norm="ortho"), np.pi * np.arange(1024)

        def excess(width, spectrum=spectrum, frequency=frequency):
            return np.abs(idct(spectrum * np.exp(-0.5 * (frequency * width) ** 2), norm="ortho")).sum() - width

        expected = brentq(excess, 1e-4, 1, rtol=1e-12) if excess(1e-4) > 0 else excess(1e-4) + 1e-4
        assert error == pytest.approx(expected, rel=3e-6)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("ties", [False, True])
def test_top_k_errors_by_hand(top_k, ties):
    probs, targets = random_case(300, 4, 5, ties)
    confidence, hit = confidence_and_hit(probs, targets, top_k)
    index = np.minimum((confidence + 1e-7) * 10 // 1, 9).astype(int)
    residual = np.bincount(index, confidence - hit, 10)
    counts = np.bincount(index, minlength=10)
    expected = np.abs(residual).sum() / 300
    assert ev.expected_calibration_error(probs, targets, 10, top_k=top_k) == pytest.approx(expected, abs=1e-12)
    worst = (np.abs(residual)[counts > 0] / counts[counts > 0]).max()
    assert ev.maximum_calibration_error(probs, targets, 10, top_k=top_k) == pytest.approx(worst, abs=1e-12)
    assert ev.confidence_gap(probs, targets, top_k=top_k) == pytest.approx((confidence - hit).mean(), abs=1e-12)


def test_all_classes_together_are_certain_and_right():
    probs, targets = random_case(50, 4, 0, False)
    assert ev.expected_calibration_error(probs, targets, top_k=4) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("num_examples", [100, 1_000, 10_000])
@pytest.mark.parametrize(
    ("statistic", "binning"),
    [
        ("ece", "equal_width"),
        ("ece", "equal_mass"),
        ("mce", "equal_width"),
        ("gap", "equal_width"),
        ("debiased", "equal_mass"),
        ("smooth", "equal_width"),
        ("ks", "equal_width"),
    ],
)
def test_bands_cover_calibrated_models_at_every_size(num_examples, statistic, binning):
    """2,000 label sets of four calibrated models: 95 % of their errors lie in the band, 93 to 97 % allowed.

    MCE takes few values, many of them equal to an end of its band: 95 % lies between the shares without and with the
    ends.
    """
    generator = torch.Generator().manual_seed(0)
    inside = within = above = 0
    for seed in range(4):
        probs = (1.5 * torch.randn(num_examples, 4, generator=generator, dtype=torch.float64)).softmax(dim=1)
        null = ev.calibration_null(probs, statistic, binning=binning, num_simulations=2000, seed=seed)
        profile = coarse_profile(exact_profile(probs.max(dim=1).values, torch.zeros(num_examples)), 15)
        if len(profile.counts) == num_examples:  # every confidence a cell of its own: draw every example
            hits = (torch.rand(500, num_examples, generator=generator) < profile.confidence).double()
        else:
            index = torch.searchsorted(profile.confidence, probs.max(dim=1).values, right=True) - 1
            drawn = (torch.rand(500, num_examples, generator=generator) < probs.max(dim=1).values).double()
            hits = torch.zeros(500, len(profile.counts), dtype=torch.float64).index_add_(1, index, drawn)
        values = profile_statistic(statistic, profile._replace(hits=hits), profile_bins(profile, 15, binning))
        inside += int(((null.low <= values) & (values <= null.high)).sum())
        within += int(((null.low < values) & (values < null.high)).sum())
        above += int((values > null.high).sum())
    assert inside >= 1860
    assert (within if statistic == "mce" else inside) <= 1940
    assert above <= (130 if statistic == "debiased" else 85)  # an error that is often zero has no lower tail


@pytest.mark.parametrize("num_examples", [100, 1_000, 10_000])
def test_classwise_bands_cover_calibrated_models_at_every_size(num_examples):
    """As above, with labels drawn by torch."""
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for seed in range(4):
        probs = (1.5 * torch.randn(num_examples, 4, generator=generator, dtype=torch.float64)).softmax(dim=1)
        null = ev.calibration_null(probs, kind="classwise", num_simulations=1000, seed=seed)
        cells = classwise_bins(probs, 15, "equal_width")
        labels = torch.multinomial(probs, 500, replacement=True, generator=generator)  # (N, 500)
        hits = torch.stack([observed_hits(cells, column) for column in labels.unbind(dim=1)])
        values = class_statistic("ece", cells, hits)
        inside += int(((null.low <= values) & (values <= null.high)).sum())
    assert 1860 <= inside <= 1940


@pytest.mark.parametrize("num_examples", [6000, 50_000])
def test_narrow_cells_change_no_binned_error(num_examples):
    probs, targets = random_case(num_examples, 3, 0, False)
    confidence, hit = probs.max(dim=1).values, (probs.argmax(dim=1) == targets).double()
    exact = exact_profile(confidence, hit)
    narrow = coarse_profile(exact, 15)
    assert len(narrow.counts) <= MAX_CELLS < len(exact.counts)
    for whole, part in zip(exact[1:], narrow[1:], strict=True):
        assert part.sum().item() == pytest.approx(whole.sum().item())
    groups, narrow_groups = profile_bins(exact, 15, "equal_width"), profile_bins(narrow, 15, "equal_width")
    for whole, part in zip(exact[1:], narrow[1:], strict=True):
        torch.testing.assert_close(groups.sums(whole), narrow_groups.sums(part))
    spread = exact_profile(confidence, confidence)  # Σ c per cell, to bound the variance inside cells
    assert spread.hits.sum().item() == pytest.approx(confidence.sum().item())


def test_variance_inside_narrow_cells_is_binomial():
    """What replaces each example's own Bernoulli number by its cell's binomial one is off by a thousandth at most."""
    probs, _ = random_case(200_000, 2, 0, False)
    confidence = torch.cat([probs.max(dim=1).values, 1 - torch.logspace(-11, -1, 50_000, dtype=torch.float64)])
    narrow = coarse_profile(exact_profile(confidence, torch.zeros_like(confidence)), 15)
    index = torch.searchsorted(narrow.confidence, confidence, right=True) - 1
    true = torch.bincount(index, confidence * (1 - confidence))
    share = narrow.confidence_sum / narrow.counts
    binomial = narrow.counts * share * (1 - share)
    used = true > 1e-9
    assert used.sum() > 1500
    assert ((binomial - true).abs()[used] / true[used]).max() < 2e-3


def spiegelhalter_by_hand(p: np.ndarray, y: np.ndarray) -> float:
    """The textbook's z for one probability p of the event y."""
    return float(((y - p) * (1 - 2 * p)).sum() / math.sqrt(((1 - 2 * p) ** 2 * p * (1 - p)).sum()))


def test_spiegelhalter_of_two_classes_is_the_textbooks():
    probs, targets = random_case(300, 2, 0, False)
    test = ev.spiegelhalter_test(probs, targets)
    assert test.statistic == pytest.approx(spiegelhalter_by_hand(probs[:, 1].numpy(), targets.numpy()), abs=1e-9)


def test_spiegelhalter_rejects_calibrated_models_at_its_level():
    generator = torch.Generator().manual_seed(0)
    rejected = 0
    for _ in range(2000):
        probs = (1.5 * torch.randn(200, 5, generator=generator, dtype=torch.float64)).softmax(dim=1)
        targets = torch.multinomial(probs, 1, generator=generator)[:, 0]
        rejected += ev.spiegelhalter_test(probs, targets).p_value <= 0.05
    assert binomtest(rejected, 2000, 0.05).pvalue > 0.01


def test_spiegelhalter_sees_over_and_under_confidence():
    generator = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(2000, 5, generator=generator, dtype=torch.float64)
    targets = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    assert ev.spiegelhalter_test((2 * logits).softmax(dim=1), targets).statistic > 4
    assert ev.spiegelhalter_test((0.5 * logits).softmax(dim=1), targets).statistic < -4


def test_spiegelhalter_where_chance_has_no_room():
    certain = torch.eye(3, dtype=torch.float64)
    assert ev.spiegelhalter_test(certain, torch.arange(3)) == (0.0, 1.0)
    assert ev.spiegelhalter_test(certain, torch.tensor([0, 1, 0])) == (math.inf, 0.0)
    assert ev.spiegelhalter_test(torch.full((4, 2), 0.5), torch.tensor([0, 1, 1, 1])) == (0.0, 1.0)


@pytest.mark.parametrize("num_classes", [2, 3, 10, 1000])
def test_spiegelhalter_of_even_float32_predictions_has_no_room_for_rounding(num_classes):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(num_classes, (100,), generator=generator)
    even = torch.full((100, num_classes), 1 / num_classes, dtype=torch.float32)
    nearly = even + 1e-7 / num_classes * torch.randn(even.shape, generator=generator)
    assert ev.spiegelhalter_test(even, targets) == (0.0, 1.0)
    assert ev.spiegelhalter_test(nearly, targets) == (0.0, 1.0)
    stream = ev.StreamingScores(num_classes, num_label_draws=0)
    stream.update(nearly, targets)
    assert stream.scores(39)["spiegelhalter_p_value"] == 1


def close_together(num_examples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A calibrated model of two classes all of whose confidences lie in the same thousandth."""
    generator = torch.Generator().manual_seed(0)
    confidence = 0.6 + 0.001 * torch.rand(num_examples, generator=generator, dtype=torch.float64)
    probs = torch.stack([confidence, 1 - confidence], dim=1)
    return probs, torch.multinomial(probs, 1, generator=generator)[:, 0]


@pytest.mark.parametrize("num_bins", [7, 15, 2000])
def test_narrow_cells_change_no_bin_of_equal_mass(num_bins):
    for probs, targets in (close_together(10_000), random_case(20_000, 3, 0, False)):
        exact = exact_profile(probs.max(dim=1).values, (probs.argmax(dim=1) == targets).double())
        narrow = coarse_profile(exact, num_bins)
        assert len(narrow.counts) < len(exact.counts)
        groups, narrow_groups = (profile_bins(profile, num_bins, "equal_mass") for profile in (exact, narrow))
        assert torch.equal(groups.edges[:-1], narrow_groups.edges[:-1])
        for whole, part in zip(exact[1:], narrow[1:], strict=True):
            torch.testing.assert_close(groups.sums(whole), narrow_groups.sums(part))


def test_bands_of_confidences_that_lie_close_together():
    probs, targets = close_together(10_000)
    low, high = ev.reliability_band(probs, binning="equal_mass", num_simulations=200)
    assert (low > 0.5).all()
    assert (high < 0.7).all()
    test = ev.calibration_test(probs, targets, binning="equal_mass", num_simulations=200)
    assert test.null_low < test.value < test.null_high
    assert test.null_mean == pytest.approx((0.6 * 0.4 * 15 / 10_000) ** 0.5 * (2 / math.pi) ** 0.5, rel=0.1)


def test_no_false_alarm_where_everything_is_certain_and_right():
    """Chance shows what there is, but for rounding, and for the smooth error's grid."""
    generator = torch.Generator().manual_seed(0)
    doubt = 1e-6 * torch.rand(6000, generator=generator, dtype=torch.float64)
    report = ev.evaluate_predictions(
        torch.stack([1 - doubt, doubt], dim=1), torch.zeros(6000, dtype=torch.int64), num_simulations=200
    )
    assert report.sections.verdict[0].startswith("No miscalibration detected")
    assert "a difference of 0.0 points (null band 0.0 to 0.0)." in report.sections.verdict[1]
    assert report.scores["ece_smooth_p_value"] == 1
    cells = [
        cell
        for group in score_table(report.sections.scores, report.sections.tested).groups
        for row in group.rows
        for cell in row
    ]
    assert not any(cell.is_outside for cell in cells)
    assert not any(cell.note in ("value above", "value below") for cell in cells)
