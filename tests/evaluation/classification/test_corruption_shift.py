"""Calibration under shift: independent values at each severity, real digits ever more corrupted, and the figure."""

import math

import numpy as np
import pytest
import torch
from evaluation_cases import random_case
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, log_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from bayes_kf import evaluation as ev
from bayes_kf.data.corruption import corrupt
from bayes_kf.data.digits import uci_digits_split

Sets = dict[float, tuple[torch.Tensor, torch.Tensor]]


def sharpened() -> Sets:
    """Calibrated at severity 0, ever surer with the same labels."""
    probs, targets = random_case(500, 4)
    return {s: ((factor * probs.log()).softmax(dim=1), targets) for s, factor in ((2, 3.0), (0, 1.0), (0.5, 1.4))}


def test_values_are_independent_ones_in_order_of_severity():
    sets = sharpened()
    curve = ev.shift_curve(sets, num_bins=10, num_simulations=200, seed=3)
    assert [row.severity for row in curve] == [0, 0.5, 2]
    for row in curve:
        probs, targets = sets[row.severity]
        assert row.num_examples == 500
        assert row.accuracy == (probs.argmax(dim=1) == targets).double().mean().item()
        assert row.nll == pytest.approx(log_loss(targets, probs, labels=range(4)), abs=1e-9)
        assert row.brier == pytest.approx(
            brier_score_loss(targets, probs, labels=range(4), scale_by_half=False), abs=1e-9
        )
        assert row.entropy == pytest.approx(torch.distributions.Categorical(probs).entropy().mean().item(), abs=1e-9)
        theirs = multiclass_calibration_error(probs, targets, 4, n_bins=10, norm="l1").item()
        assert row.ece.value == pytest.approx(theirs, abs=1e-6)
        assert row.ece == ev.calibration_test(probs, targets, num_bins=10, num_simulations=200, seed=3)
    assert curve[0].ece.p_value > 0.05
    assert curve[2].ece.value > curve[2].ece.null_high


@pytest.fixture(scope="module")
def digits() -> dict[str, Sets]:
    """A logistic regression of clean digits on ever more corrupted ones."""
    stream, heldout = uci_digits_split()

    def features(images: torch.Tensor) -> np.ndarray:
        return torch.nn.functional.avg_pool2d(images, 2).flatten(1).numpy()

    model = LogisticRegression(max_iter=2000).fit(features(stream.images), stream.labels)

    def predict(kind: str, severity: int) -> torch.Tensor:
        images = corrupt(heldout.images, kind, severity) if severity else heldout.images
        return torch.from_numpy(model.predict_proba(features(images)))

    return {kind: {s: (predict(kind, s), heldout.labels) for s in range(6)} for kind in ("rotation", "occlusion")}


def test_rotation_takes_accuracy_and_calibration_from_digits(digits):
    curve = ev.shift_curve(digits["rotation"], num_simulations=200)
    accuracies = [row.accuracy for row in curve]
    assert accuracies[0] > 0.95
    assert accuracies[5] < 0.2
    assert accuracies == sorted(accuracies, reverse=True)
    assert curve[0].ece.p_value > 0.05
    assert all(row.ece.value > 5 * row.ece.null_high for row in curve[2:])
    assert all(row.ece.p_value < 0.01 for row in curve[2:])
    assert curve[5].entropy < curve[0].entropy < curve[2].entropy  # surest where nearly all is wrong


def test_occlusion_takes_accuracy_and_leaves_calibration_for_long(digits):
    curve = ev.shift_curve(digits["occlusion"], num_simulations=200)
    assert curve[4].accuracy < 0.8
    assert all(row.ece.null_low <= row.ece.value <= row.ece.null_high for row in curve[:5])
    assert curve[4].entropy > 3 * curve[0].entropy


def test_plot_draws_error_band_and_accuracy(digits):
    curve = ev.shift_curve(digits["rotation"], num_simulations=100)
    ax = ev.shift_plot(curve, ax=Figure().subplots())
    line = ax.get_lines()[0]
    assert line.get_xdata().tolist() == [0, 1, 2, 3, 4, 5]
    assert line.get_ydata().tolist() == [row.ece.value for row in curve]
    bars = ax.containers[0]
    assert [bar.get_y() for bar in bars] == pytest.approx([row.ece.null_low for row in curve])
    assert [bar.get_y() + bar.get_height() for bar in bars] == pytest.approx([row.ece.null_high for row in curve])
    assert all(bar.get_hatch() for bar in bars)
    assert [bar.get_x() + bar.get_width() / 2 for bar in bars] == pytest.approx([0, 1, 2, 3, 4, 5])
    right = next(other for other in ax.figure.axes if other is not ax)
    assert right.get_lines()[0].get_ydata().tolist() == [row.accuracy for row in curve]
    assert right.get_lines()[0].get_linestyle() != line.get_linestyle()
    assert ax.get_ylim()[1] > max(row.ece.value for row in curve)
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert sorted(names) == ["95 % null band", "ECE", "accuracy"]


def test_plot_of_one_certain_prediction():
    curve = ev.shift_curve({1: (torch.tensor([[1.0, 0.0]]), torch.tensor([0]))}, num_simulations=39)
    given = Figure().subplots()
    ax = ev.shift_plot(curve, ax=given)
    assert ax is given
    assert ax.get_lines()[0].get_ydata().tolist() == [0]
    ax.figure.canvas.draw()


def test_bad_input_is_refused():
    probs, targets = random_case(10, 3)
    with pytest.raises(ValueError, match=r"^`sets` must hold at least one severity, got none\.$"):
        ev.shift_curve({})
    for severity in ("mild", math.nan, True):
        with pytest.raises(ValueError, match=r"^`sets` must have finite numbers as severities, got "):
            ev.shift_curve({severity: (probs, targets)})
    with pytest.raises(ValueError, match=r"^`sets\[2\]` must sum to one in every row, got 2 in row 0; "):
        ev.shift_curve({1: (probs, targets), 2: (torch.ones(10, 2), targets)})
    with pytest.raises(ValueError, match=r"^`targets` must have shape \(10,\) as `probs` has, got \(9,\)\.$"):
        ev.shift_curve({1: (probs, targets[1:])})
    with pytest.raises(ValueError, match=r"^`curve` must hold at least one severity, got none\.$"):
        ev.shift_plot([])
