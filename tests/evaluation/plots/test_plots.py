"""What is drawn: heights, places and lines, not pixels."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bayes_kf import evaluation as ev
from bayes_kf.evaluation.plots.tensor_variance import short_names


@pytest.fixture
def ax() -> Axes:
    return Figure().subplots()


def random_case() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    probs = (2 * torch.randn(400, 3, generator=generator, dtype=torch.float64)).softmax(dim=1)
    return probs, torch.randint(3, (400,), generator=generator)


@pytest.mark.parametrize("binning", ["equal_width", "equal_mass"])
def test_reliability_diagram_draws_bins_band_counts_and_error(ax, binning):
    probs, targets = random_case()
    drawn = ev.reliability_diagram(probs, targets, num_bins=10, binning=binning, ax=ax)
    assert drawn is ax
    bins = ev.reliability_bins(probs, targets, 10, binning)
    low, high = ev.reliability_band(probs, num_bins=10, binning=binning)
    used = bins.counts > 0
    band, _ = ax.containers  # the other is of the legend
    paler = [bar.get_alpha() for bar in band]
    assert [alpha < 0.5 for alpha in paler] == (bins.counts[used] < 10).tolist()
    points = np.concatenate([np.asarray(drawn.get_offsets()) for drawn in ax.collections])
    points = points[points[:, 0].argsort()]
    assert points[:, 0] == pytest.approx(bins.confidence[used].numpy())
    assert points[:, 1] == pytest.approx(bins.accuracy[used].numpy())
    assert [bar.get_y() for bar in band] == pytest.approx(low[used].tolist())
    assert [bar.get_y() + bar.get_height() for bar in band] == pytest.approx(high[used].tolist())
    outside = ((bins.accuracy < low) | (bins.accuracy > high))[used]
    assert 0 < int(outside.sum()) < len(outside)
    _, outside_points = ax.collections
    assert np.asarray(outside_points.get_offsets())[:, 1] == pytest.approx(bins.accuracy[used][outside].numpy())
    strip = ax.child_axes[0]
    assert [bar.get_height() for bar in strip.containers[0]] == bins.counts[used].tolist()
    ece = ev.calibration_test(probs, targets, num_bins=10, binning=binning)
    text = ax.get_legend().get_title().get_text()
    assert text == f"ECE {ece.value:.3f}, null band {ece.null_low:.3f}–{ece.null_high:.3f}"


def test_the_legend_may_have_another_title(ax):
    ev.reliability_diagram(*random_case(), caption="ours", ax=ax)
    assert ax.get_legend().get_title().get_text() == "ours"


def test_a_bin_that_holds_one_value_is_still_visible(ax):
    probs = torch.tensor([[1.0, 0.0]] * 5 + [[0.6, 0.4]])
    ev.reliability_diagram(probs, torch.zeros(6, dtype=torch.int64), binning="equal_mass", ax=ax)
    last = ax.child_axes[0].containers[0][-1]
    assert last.get_width() > 0
    assert last.get_x() + last.get_width() <= 1


def test_the_legend_hides_no_part_of_the_diagram(ax):
    ev.reliability_diagram(*random_case(), ax=ax)
    ax.figure.canvas.draw()
    assert ax.get_legend().get_window_extent().y1 < ax.get_window_extent().y0


def test_entropy_curves_are_the_shares_up_to_each_entropy(ax):
    id_entropy, ood_entropy = np.linspace(0, 1, 50), np.linspace(1, 2, 30)
    ev.entropy_curves(id_entropy, {"noise": ood_entropy}, ax=ax)
    for line, values in zip(ax.lines, (id_entropy, ood_entropy), strict=True):
        places, shares = line.get_data()
        for place, share in zip(places[1:-1], shares[1:-1], strict=True):
            assert share == pytest.approx((values <= place).mean())
        assert (places[-1], shares[-1]) == (2.0, 1.0)
    assert {line.get_linestyle() for line in ax.lines} == {"-", "--"}


def test_a_curve_of_many_entropies_has_few_steps(ax):
    ev.entropy_curves(np.random.default_rng(0).random(100_000), ax=ax)
    places, shares = ax.lines[0].get_data()
    assert len(places) <= 202
    assert np.abs(shares - places).max() < 0.02


def test_comparison_plot_shows_gaps_to_the_best_and_the_better_side(ax):
    probs, targets = random_case()
    models = {"flat": torch.full_like(probs, 1 / 3), "as it is": probs, "sharper": (2 * probs.log()).softmax(1)}
    for score, side in (("nll", "← better"), ("accuracy", "better →")):
        axes = Figure().subplots()
        comparison = ev.compare_predictions(models, targets)[score]
        ev.comparison_plot(comparison, ax=axes)
        order = [label.get_text().partition(":")[0] for label in axes.get_yticklabels()]
        assert order[0] == comparison.leader
        assert side in axes.get_xlabel()
        values = [float(line.get_xdata()[0]) for line in axes.lines if line.get_marker() in ("s", "o")]
        expected = [comparison.values[name] - comparison.values[comparison.leader] for name in order]
        assert values == pytest.approx(expected)


def test_the_prediction_plot_counts_what_lies_inside(ax):
    mean = torch.linspace(0, 1, 1000, dtype=torch.float64)
    targets = mean + torch.where(torch.arange(1000) % 4 == 0, 2.0, 0.5)
    ev.prediction_plot(mean, targets, mean - 1, mean + 1, ax=ax)
    labels = ax.get_legend_handles_labels()[1]
    assert labels[2:] == ["inside (750 of 1,000)", "outside (250 of 1,000)"]
    assert sum(len(points.get_offsets()) for points in ax.collections[1:]) == 400
    with pytest.raises(ValueError, match="must be of the shape of `mean`"):
        ev.prediction_plot(mean, targets[:5], mean, mean)


def test_ood_sets_of_any_name_stand_in_the_legend(ax):
    ev.entropy_curves(np.ones(4), {"_hidden": np.ones(4), r"$\bad$": np.ones(4)}, ax=ax)
    ax.figure.canvas.draw()  # mathematics that cannot be parsed would raise here
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["in distribution (4)", "“_hidden” (4)", r"“\$\bad\$” (4)"]


def test_entropy_curves_of_certain_predictions(ax):
    ev.entropy_curves(np.zeros(4), ax=ax)
    assert np.isfinite(ax.lines[0].get_xydata()).all()
    assert ax.get_xlim() == (0.0, 1.0)


def test_coverage_plot_draws_shares_and_band(ax):
    coverage = ev.Coverage(torch.tensor([0.5, 0.95]), torch.tensor([0.4, 0.9]))
    ev.coverage_plot(coverage, 100, ax=ax)
    assert ax.get_lines()[0].get_ydata() == pytest.approx([0.4, 0.9])
    low, high = ev.coverage_null(coverage.levels, 100)
    ends = [segment[:, 1].tolist() for segment in ax.collections[0].get_segments()]
    assert ends == [pytest.approx(pair) for pair in zip(low.tolist(), high.tolist(), strict=True)]


def test_online_curves_draw_running_accuracy_and_moving_loss(ax):
    correct, loss = torch.tensor([0, 1, 1, 1]), torch.tensor([3.0, 1.0, 2.0, 0.0])
    ev.online_curves({"correct": correct, "log_loss": loss}, window=2, ax=ax)
    assert ax.get_lines()[0].get_ydata() == pytest.approx([0, 1 / 2, 2 / 3, 3 / 4])
    right = next(other for other in ax.figure.axes if other is not ax)
    assert right.get_lines()[0].get_xdata().tolist() == [2, 3, 4]
    assert right.get_lines()[0].get_ydata() == pytest.approx([2, 1.5, 1])


def test_online_curves_of_a_density_show_negative_losses(ax):
    ev.online_curves({"log_loss": torch.tensor([-1.0, -2.0])}, window=1, ax=ax)
    assert ax.get_ylim()[0] < -1.9


def test_innovation_plot_draws_ratio_and_band(ax):
    nis = torch.tensor([1.0, 2.0, 3.0, 4.0])
    ev.innovation_plot(nis, 2, window=2, ax=ax)
    health = ev.innovation_health(nis, 2, window=2)
    assert ax.get_lines()[0].get_ydata() == pytest.approx(health.ratio.numpy())
    heights = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(health.low.min().item())
    assert heights.max() == pytest.approx(health.high.max().item())


def test_variance_by_tensor_draws_means_relative_to_the_prior(ax):
    variance = {"m.a.weight": torch.tensor([1.0, 3.0]), "m.b.weight": torch.tensor([[4.0]])}
    prior = {"m.a.weight": torch.tensor([4.0, 4.0]), "m.b.weight": torch.tensor([[4.0]])}
    ev.variance_by_tensor(variance, prior, ax=ax)
    assert list(ax.get_lines()[0].get_xdata()) == pytest.approx([0.5, 1.0])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert ax.get_xlabel() == "posterior / prior variance"


def test_variance_by_tensor_says_what_it_left_out(ax):
    ev.variance_by_tensor({f"t{i}": torch.ones(1) for i in range(5)}, max_tensors=3, ax=ax)
    assert len(ax.get_lines()[0].get_xdata()) == 3
    assert ax.get_xlabel() == "mean posterior variance (2 more tensors not drawn)"


@pytest.mark.parametrize("all_zero", [False, True])
def test_variance_by_tensor_leaves_out_what_has_no_variance(ax, all_zero):
    ev.variance_by_tensor({"a": torch.zeros(3), "b": torch.full((2,), 0.0 if all_zero else 2.0)}, ax=ax)
    assert list(ax.get_lines()[0].get_xdata()) == ([] if all_zero else [2.0])
    assert ax.get_xlabel() == f"mean posterior variance ({2 if all_zero else 1} without variance not drawn)"
    ax.figure.canvas.draw()


def test_output_variance_plot_draws_a_bar_for_each_tensor_or_the_largest(ax):
    actual = {"m.a.weight": 0.5, "m.b.weight": 0.0, "m.c.weight": 2.0}
    drawn = ev.output_variance_plot(actual, ax=ax)
    assert [bar.get_width() for bar in drawn.patches] == [0.5, 0.0, 2.0]
    assert [text.get_text() for text in drawn.get_yticklabels()] == ["a", "b", "c"]
    signed = ev.output_variance_plot({"a": -3.0, "b": 1.0, "c": 4.0}, max_tensors=2, ax=Figure().subplots())
    assert [bar.get_width() for bar in signed.patches] == [-3.0, 4.0]
    few = ev.output_variance_plot(actual, max_tensors=2, ax=Figure().subplots())
    assert [bar.get_width() for bar in few.patches] == [0.5, 2.0]
    assert few.get_xlabel() == "contribution to the variance (1 smaller ones not drawn)"
    for bad, message in (({}, r"^`output_variance` must hold at least one"), ({"a": math.nan}, r"got nan for a\.$")):
        with pytest.raises(ValueError, match=message):
            ev.output_variance_plot(bad)


def test_short_names_never_become_empty():
    assert short_names(["only.one"]) == ["only.one"]
    assert short_names(["a.x", "a.x.y"]) == ["x", "x.y"]
    assert short_names(["same", "same"]) == ["same", "same"]


def test_bad_plot_input_is_refused(ax):
    with pytest.raises(ValueError, match=r"^`history` must hold correct or log_loss, got \['damping'\]\.$"):
        ev.online_curves({"damping": torch.ones(3)}, ax=ax)
    with pytest.raises(ValueError, match=r"^`variance` must hold at least one tensor, got an empty mapping\.$"):
        ev.variance_by_tensor({}, ax=ax)
    with pytest.raises(ValueError, match=r"^`variance` must not be negative on average, got -1 for b\.$"):
        ev.variance_by_tensor({"a": torch.ones(1), "b": -torch.ones(1)}, ax=ax)
    with pytest.raises(ValueError, match=r"^`prior_variance` must be positive on average, got 0 for a\.$"):
        ev.variance_by_tensor({"a": torch.ones(1)}, {"a": torch.zeros(1)}, ax=ax)
    with pytest.raises(ValueError, match=r"^`prior_variance` must name the tensors of `variance`, got \['b'\]\.$"):
        ev.variance_by_tensor({"a": torch.ones(1)}, {"b": torch.ones(1)}, ax=ax)


def test_without_axes_a_new_figure_is_made():
    before = plt.get_fignums()
    ax = ev.innovation_plot(torch.ones(3), 1, window=1)
    try:
        assert len(plt.get_fignums()) == len(before) + 1
        assert ax.figure.number not in before
    finally:
        plt.close(ax.figure)
