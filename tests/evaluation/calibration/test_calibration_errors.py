"""Calibration errors against other implementations and by hand; their null bands against repetition."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from bayes_kf import evaluation as ev


def random_case(num_examples: int, num_classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    probs = (2 * torch.randn(num_examples, num_classes, generator=generator, dtype=torch.float64)).softmax(dim=1)
    return probs, torch.randint(num_classes, (num_examples,), generator=generator)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("num_examples", "num_classes"), [(1, 2), (7, 3), (500, 2), (2000, 10)])
def test_errors_equal_torchmetrics(num_examples, num_classes, seed):
    probs, targets = random_case(num_examples, num_classes, seed)
    for num_bins in (1, 10, 15):
        for norm, error in (("l1", ev.expected_calibration_error), ("max", ev.maximum_calibration_error)):
            expected = multiclass_calibration_error(probs, targets, num_classes, n_bins=num_bins, norm=norm)
            assert error(probs, targets, num_bins) == pytest.approx(expected.item(), abs=1e-6)


def test_confidence_exactly_one_belongs_to_the_last_bin():
    """Torchmetrics has it alone in bin number b + 1; NumPy's histogram and this package in number b."""
    probs = torch.tensor([[1.0, 0.0], [0.95, 0.05], [0.95, 0.05]])
    targets = torch.tensor([1, 0, 0])
    bins = ev.reliability_bins(probs, targets, num_bins=10)
    assert bins.counts.tolist() == np.histogram(probs[:, 0], 10, (0, 1))[0].tolist()
    together = abs((1.0 + 0.95 + 0.95) / 3 - 2 / 3)
    assert ev.expected_calibration_error(probs, targets, 10) == pytest.approx(together, abs=1e-7)
    apart = multiclass_calibration_error(probs, targets, 2, n_bins=10).item()
    assert apart == pytest.approx((1.0 + 2 * 0.05) / 3, abs=1e-6)
    without_others = torch.tensor([[1.0, 0.0], [0.7, 0.3], [0.0, 1.0]])
    expected = multiclass_calibration_error(without_others, targets, 2, n_bins=10).item()
    assert ev.expected_calibration_error(without_others, targets, 10) == pytest.approx(expected, abs=1e-6)


def test_classwise_error_is_the_mean_of_binary_ones():
    probs, targets = random_case(400, 4, 0)
    for norm, error, combine in (
        ("l1", ev.expected_calibration_error, np.mean),
        ("max", ev.maximum_calibration_error, np.max),
    ):
        classes = [(probs[:, c].contiguous(), (targets == c).long()) for c in range(4)]
        one_by_one = [binary_calibration_error(p, t, n_bins=15, norm=norm).item() for p, t in classes]
        assert error(probs, targets, kind="classwise") == pytest.approx(combine(one_by_one), abs=1e-6)


def test_an_edge_belongs_to_the_upper_bin_in_either_precision():
    for dtype in (torch.float32, torch.float64):
        probs = torch.tensor([[0.7, 0.3], [0.6, 0.4]], dtype=dtype)
        bins = ev.reliability_bins(probs, torch.tensor([0, 0]), num_bins=10)
        assert bins.counts.nonzero().flatten().tolist() == [6, 7]


def equal_mass_by_hand(confidence: np.ndarray, hit: np.ndarray, num_bins: int) -> float:
    """Sorted chunks of equal size; only for confidences without ties."""
    order = np.argsort(confidence)
    starts = np.arange(num_bins) * len(order) // num_bins
    chunks = np.split(order, starts[1:])
    return sum(abs(confidence[chunk].sum() - hit[chunk].sum()) for chunk in chunks if len(chunk)) / len(order)


@pytest.mark.parametrize(("num_examples", "num_bins"), [(300, 15), (301, 7), (5, 15)])
def test_equal_mass_bins_hold_equal_counts(num_examples, num_bins):
    probs, targets = random_case(num_examples, 3, 3)
    bins = ev.reliability_bins(probs, targets, num_bins, "equal_mass")
    assert bins.counts.sum() == num_examples
    assert bins.counts.max() - bins.counts.min() <= 1
    confidence, hit = probs.max(dim=1).values.numpy(), (probs.argmax(dim=1) == targets).numpy()
    expected = equal_mass_by_hand(confidence, hit, num_bins)
    assert ev.expected_calibration_error(probs, targets, num_bins, "equal_mass") == pytest.approx(expected, abs=1e-12)


def test_equal_mass_bins_do_not_split_ties():
    confidence = torch.tensor([0.6] + [0.7] * 6 + [0.8, 0.9, 1.0], dtype=torch.float64)
    probs = torch.stack([confidence, 1 - confidence], dim=1)
    targets = torch.tensor([0, 0, 0, 0, 1, 1, 1, 0, 0, 0])
    shuffled = torch.tensor([3, 9, 0, 7, 1, 5, 2, 8, 6, 4])
    for order in (torch.arange(10), shuffled):
        bins = ev.reliability_bins(probs[order], targets[order], 5, "equal_mass")
        assert bins.edges.tolist() == [0.6, 0.7, 0.9, 1.0]  # starts 0.6, 0.7, 0.7, 0.7, 0.9
        assert bins.counts.tolist() == [1, 7, 2]
        assert bins.accuracy.tolist() == pytest.approx([1, 4 / 7, 1])


def test_one_confidence_is_one_equal_mass_bin():
    bins = ev.reliability_bins(torch.full((8, 4), 0.25), torch.arange(8) % 4, 15, "equal_mass")
    assert bins.edges.tolist() == [0.25, 0.25]
    assert bins.accuracy.tolist() == [0.25]


def test_confidence_gap_is_confidence_minus_accuracy():
    probs, targets = random_case(400, 4, 0)
    gap = probs.max(dim=1).values.mean().item() - ev.accuracy(probs, targets)
    assert ev.confidence_gap(probs, targets) == pytest.approx(gap, abs=1e-12)
    assert ev.confidence_gap(probs, probs.argmax(dim=1)) < 0


def test_a_calibrated_four_class_model_shows_a_large_error_at_100_examples():
    """A bare ECE means little: about 0.1 with nothing wrong at all."""
    logits = torch.randn(100, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    null = ev.calibration_null(logits.softmax(dim=1))
    assert null.mean == pytest.approx(0.11, abs=0.02)
    assert null.low < null.mean < null.high


VARIANTS = [
    ("ece", "equal_width", "confidence"),
    ("ece", "equal_mass", "confidence"),
    ("ece", "equal_width", "classwise"),
    ("mce", "equal_mass", "confidence"),
    ("gap", "equal_width", "confidence"),
]


@pytest.mark.parametrize(("statistic", "binning", "kind"), VARIANTS)
def test_null_band_covers_a_calibrated_model(statistic, binning, kind):
    """1,000 data sets of a calibrated model; 95 % ± 2 % is three standard errors and the band's own noise."""
    generator = torch.Generator().manual_seed(0)
    settings = {"statistic": statistic, "binning": binning, "kind": kind, "num_bins": 10, "num_simulations": 300}
    inside = rejected = 0
    for repetition in range(1000):
        probs = (1.5 * torch.randn(100, 4, generator=generator, dtype=torch.float64)).softmax(dim=1)
        targets = torch.multinomial(probs, 1, generator=generator)[:, 0]
        result = ev.calibration_test(probs, targets, seed=repetition, **settings)
        inside += result.null_low <= result.value <= result.null_high
        rejected += result.p_value <= 0.05
    assert 930 <= inside <= 970
    assert 30 <= rejected <= 70


def test_simulated_moments_are_the_binomial_ones():
    probs = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).repeat(400, 1)
    low, high = ev.reliability_band(probs, num_bins=10, num_simulations=4000)
    standard_error = (0.7 * 0.3 / 400) ** 0.5
    used = ~torch.isnan(low)
    assert used.nonzero().flatten().tolist() == [7]
    assert low[7].item() == pytest.approx(0.7 - 1.96 * standard_error, abs=0.005)
    assert high[7].item() == pytest.approx(0.7 + 1.96 * standard_error, abs=0.005)


def test_simulated_labels_follow_the_probabilities():
    """Classwise with one bin: hits of each class are binomial counts; a class of probability zero never comes."""
    from bayes_kf.evaluation.resampling.binning import classwise_bins, simulate_hits

    probs = torch.tensor([[0.0, 0.5, 0.3, 0.2, 0.0]], dtype=torch.float64).repeat(50, 1)
    hits = simulate_hits(classwise_bins(probs, 1, "equal_width"), probs, 2000, seed=0)
    assert (hits.sum(dim=1) == 50).all()
    standard_error = (probs[0] * (1 - probs[0]) * 50 / 2000).sqrt()
    assert ((hits.mean(dim=0) - 50 * probs[0]).abs() <= 5 * standard_error).all()


def test_a_class_of_probability_zero_is_never_drawn():
    """Not even when the uniform number is exactly zero, or exactly where a class ends."""
    from bayes_kf.evaluation.resampling.binning import _draw_labels

    cumulative = torch.tensor([[0.0, 0.5, 0.5, 1.0, 1.0]], dtype=torch.float64)
    assert _draw_labels(cumulative, torch.tensor([[0.0, 0.25, 0.5, 1 - 2**-24]])).tolist() == [[1, 1, 3, 3]]


def test_blocks_of_rows_and_draws_keep_the_distribution(monkeypatch):
    from bayes_kf.evaluation.resampling import binning

    probs, _ = random_case(100, 4, 0)
    cells = binning.classwise_bins(probs, 5, "equal_width")
    whole = binning.simulate_hits(cells, probs, 400, seed=0)
    monkeypatch.setattr(binning, "ROW_BLOCK", 28)  # seven rows at a time
    monkeypatch.setattr(binning, "DRAW_BLOCK", 64)
    blocks = binning.simulate_hits(cells, probs, 400, seed=0)
    assert (blocks.sum(dim=1) == 100).all()
    expected = cells.confidence_sum
    standard_error = (expected / 400).sqrt()  # of a mean of 400 counts, at most
    for hits in (whole, blocks):
        assert ((hits.mean(dim=0) - expected).abs() <= 5 * standard_error + 1e-12).all()


def test_same_seed_same_band_other_seed_another():
    probs, targets = random_case(100, 4, 0)
    assert ev.calibration_test(probs, targets, seed=3) == ev.calibration_test(probs, targets, seed=3)
    assert ev.calibration_null(probs, seed=3) != ev.calibration_null(probs, seed=4)


def test_certain_and_right_leaves_chance_no_room():
    probs = torch.eye(3)[[0, 1, 2, 0]]
    result = ev.calibration_test(probs, torch.tensor([0, 1, 2, 0]))
    assert result == ev.Calibrated(0.0, 0.0, 0.0, 0.0, 1.0)


BAD_SETTINGS = [
    ({"num_bins": 0}, "`num_bins` must be a positive integer, got 0."),
    ({"num_bins": 2.5}, "`num_bins` must be a positive integer, got 2.5."),
    ({"binning": "equal"}, "`binning` must be one of equal_width, equal_mass, got 'equal'."),
    ({"kind": "all"}, "`kind` must be one of confidence, classwise, got 'all'."),
    ({"statistic": "auc"}, "`statistic` must be one of ece, mce, gap, debiased, smooth, ks, got 'auc'."),
    (
        {"statistic": "gap", "kind": "classwise"},
        '`kind` must be "confidence" for the statistic "gap", got "classwise".',
    ),
    ({"top_k": 3}, "`top_k` must be at most the number of classes, 2, got 3."),
    ({"top_k": 2, "kind": "classwise"}, '`top_k` must be 1 for the kind "classwise", got 2.'),
    ({"statistic": "ks", "kind": "classwise"}, '`kind` must be "confidence" for the statistic "ks", got "classwise".'),
    ({"num_simulations": 0}, "`num_simulations` must be a positive integer, got 0."),
    ({"num_simulations": 38}, "`num_simulations` must be at least 39 for level 0.95, got 38."),
    ({"level": 1.0}, "`level` must lie strictly between 0 and 1, got 1.0."),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=r"^`") as error:
        ev.calibration_null(torch.full((2, 2), 0.5), **settings)
    assert str(error.value) == message


def test_the_former_name_of_a_kind_is_accepted():
    probs, targets = random_case(200, 4, 0)
    for measure in (ev.expected_calibration_error, ev.maximum_calibration_error):
        assert measure(probs, targets, kind="top_label") == measure(probs, targets, kind="confidence")
    first, second = (ev.calibration_test(probs, targets, "ece", kind=kind) for kind in ("top_label", "confidence"))
    assert first == second
