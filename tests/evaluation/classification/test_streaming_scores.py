"""Scores from sums: equal to those of all examples at once, whatever the batches and processes."""

import json
import math
from multiprocessing import set_forkserver_preload
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scipy.stats import binomtest, kstest

from bayes_kf import evaluation as ev

EXACT = ("accuracy", "nll", "brier", "confidence", "entropy", "confidence_gap", "ece", "mce", "ece_classwise", "rps")
IN_CELLS = ("ece_equal_mass", "ece_smooth", "ks", "ece_debiased")


def random_case(num_examples: int, num_classes: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    probs = (2.5 * torch.randn(num_examples, num_classes, generator=generator)).softmax(dim=1)
    targets = torch.multinomial(probs, 1, generator=generator)[:, 0]
    targets[: num_examples // 10] = torch.arange(num_examples // 10) % num_classes
    return probs, targets


def streamed(probs: torch.Tensor, targets: torch.Tensor, size: int, **settings) -> ev.StreamingScores:
    stream = ev.StreamingScores(probs.shape[1], **settings)
    for batch, labels in zip(probs.split(size), targets.split(size), strict=True):
        stream.update(batch, labels)
    return stream


def direct(probs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    return ev.evaluate_predictions(probs, targets, ordered=True, top_k=(5,)).scores


@pytest.mark.parametrize("num_examples", [1, 37, 9000])
def test_streamed_scores_are_those_of_all_at_once(num_examples):
    probs, targets = random_case(num_examples)
    scores = streamed(probs, targets, 500, top_k=(5,), ordered=True).scores()
    expected = direct(probs, targets)
    for name in (*EXACT, "ece_top5", "spiegelhalter", "brier_miscalibration", "brier_resolution", "brier_within"):
        assert scores[name] == pytest.approx(expected[name], abs=1e-9), name
    for name in IN_CELLS:
        assert scores[name] == pytest.approx(expected[name], abs=2e-5), name
    assert set(scores) - set(expected) == set()
    if num_examples == 9000:
        for name in ("ece", "ece_classwise", "ks", "confidence_gap", "ece_smooth"):
            width = expected[f"{name}_null_high"] - expected[f"{name}_null_low"]
            for end in ("low", "high"):  # quantiles of 1,000, classwise by 40 simulated data sets
                assert scores[f"{name}_null_{end}"] == pytest.approx(expected[f"{name}_null_{end}"], abs=0.2 * width)
    for name, value in expected.items():
        if name.endswith(("_low", "_high")) and "_null_" not in name and name in scores:
            assert scores[name] == pytest.approx(value, abs=1e-9), name
    assert {"accuracy_low", "brier_high", "confidence_gap_low", "rps_low"} <= set(scores)
    assert ("nll_low" in scores) == (num_examples >= 50)


def test_batches_and_merging_change_nothing_but_the_drawn_labels():
    probs, targets = random_case(700)
    whole = streamed(probs, targets, 700)
    parts = streamed(probs[:300], targets[:300], 50)
    parts.merge(streamed(probs[300:], targets[300:], 123))
    assert parts.num_examples == 700
    for name, total in whole.state.items():
        if name != "class_draws":
            torch.testing.assert_close(parts.state[name], total, rtol=1e-12, atol=1e-12)
    assert parts.state["class_draws"].sum() == whole.state["class_draws"].sum() == 40 * 700


def test_labels_are_drawn_anew_for_every_batch():
    probs, targets = random_case(60)
    first, second = streamed(probs[:30], targets[:30], 30), streamed(probs[30:], targets[30:], 30)
    again = streamed(probs[:30], targets[:30], 30)
    assert torch.equal(first.state["class_draws"], again.state["class_draws"])
    assert not torch.equal(first.state["class_draws"], second.state["class_draws"])


def _worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    probs, targets = random_case(400)
    stream = streamed(probs[rank::2], targets[rank::2], 64)
    for total in stream.state.values():
        dist.all_reduce(total)
    if rank == 0:
        Path(folder, "scores.json").write_text(json.dumps(stream.scores()))
    dist.destroy_process_group()


def test_two_processes_add_up(tmp_path):
    set_forkserver_preload(["bayes_kf.evaluation"])  # imported once
    mp.start_processes(_worker, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    scores = json.loads((tmp_path / "scores.json").read_text())
    expected = streamed(*random_case(400), 400).scores()
    for name in ("accuracy", "nll", "ece", "ece_classwise", "ks", "brier_resolution"):
        assert scores[name] == pytest.approx(expected[name], abs=1e-12)


def test_state_is_saved_and_loaded():
    probs, targets = random_case(100)
    stream = streamed(probs, targets, 100)
    other = ev.StreamingScores(12)
    other.load_state(stream.state)
    other.update(probs, targets)
    assert (stream.num_examples, other.num_examples) == (100, 200)
    assert other.scores()["nll"] == pytest.approx(stream.scores()["nll"])


def test_impossible_labels_make_the_loss_infinite_and_nothing_else():
    stream = streamed(torch.tensor([[1.0, 0.0], [0.4, 0.6]]), torch.tensor([1, 1]), 1)
    scores = stream.scores(39)
    assert scores["nll"] == math.inf
    assert math.isfinite(scores["ece"])
    assert not any(math.isnan(value) for value in scores.values())


def test_refused_batches_leave_everything_as_it_was():
    probs, targets = random_case(100)
    stream = streamed(probs, targets, 100)
    before = {name: total.clone() for name, total in stream.state.items()}
    bad = probs.clone()
    bad[70, 0] = math.nan
    for given, labels, message in (
        (bad, targets, r"^`probs` must be finite, got 1 bad"),
        (probs, targets + 12, r"^`targets` must lie in 0\.\.11"),
        (probs[:, :5], targets, r"^`probs` must have 12 classes, got 5\.$"),
        (probs, targets[:50], r"^`targets` must have shape \(100,\)"),
        (probs[:0], targets[:0], r"^`probs` must not be empty"),
    ):
        with pytest.raises(ValueError, match=message):
            stream.update(given, labels)
    for name, total in stream.state.items():
        assert torch.equal(total, before[name])


def test_bad_settings_are_refused():
    for settings, message in (
        ({"num_classes": 1}, r"^`num_classes` must be an integer of at least 2, got 1\.$"),
        ({"num_classes": 3, "top_k": (4,)}, r"^`top_k` must hold integers from 2 to the number of classes, got 4\.$"),
        ({"num_classes": 3, "num_label_draws": 5}, r"^`num_label_draws` must be at least 39 for level 0\.95, got 5\.$"),
    ):
        with pytest.raises(ValueError, match=message):
            ev.StreamingScores(**settings)
    with pytest.raises(ValueError, match=r"^`scores` needs at least one example, got none so far\.$"):
        ev.StreamingScores(3).scores()
    with pytest.raises(ValueError, match=r"^`other` must have the settings"):
        ev.StreamingScores(3).merge(ev.StreamingScores(4))
    with pytest.raises(ValueError, match=r"^`state` must hold tensors of shapes"):
        ev.StreamingScores(3).load_state({})


def test_equal_batches_have_labels_of_their_own():
    """500 even rows of ten classes one by one: the band is that of all of them together."""
    probs, targets = torch.full((500, 10), 0.1), torch.arange(500) % 10
    one_by_one, together = (streamed(probs, targets, size).scores(39) for size in (1, 500))
    for end in ("low", "high"):
        name = f"ece_classwise_null_{end}"
        assert one_by_one[name] == pytest.approx(together[name], abs=0.15 * together["ece_classwise_null_high"])
    merged = streamed(probs[:250], torch.zeros(250, dtype=torch.int64), 1)
    merged.merge(streamed(probs[:250], torch.ones(250, dtype=torch.int64), 1))
    result = merged.scores(39)["ece_classwise_null_high"]
    assert result == pytest.approx(together["ece_classwise_null_high"], rel=0.15)


@pytest.mark.parametrize(("num_examples", "num_classes"), [(300, 2), (60, 4), (400, 12)])
def test_the_band_of_the_classwise_error_covers_calibrated_models(num_examples, num_classes):
    """40 simulated data sets and a normal root give a band that 95 % of calibrated data sets are in."""
    generator = torch.Generator().manual_seed(2)
    outside, p_values = 0, []
    for seed in range(400):
        probs = (1.5 * torch.randn(num_examples, num_classes, generator=generator)).softmax(dim=1)
        targets = torch.multinomial(probs, 1, generator=generator)[:, 0]
        scores = streamed(probs, targets, 100, seed=seed).scores(39)
        low, high = scores["ece_classwise_null_low"], scores["ece_classwise_null_high"]
        outside += not low <= scores["ece_classwise"] <= high
        p_values.append(scores["ece_classwise_p_value"])
    assert binomtest(outside, 400, 0.05).pvalue > 0.01, outside
    assert binomtest(sum(p < 0.1 for p in p_values), 400, 0.1).pvalue > 0.01
    assert kstest(p_values, "uniform").pvalue > 0.01


@pytest.mark.parametrize("kind", ["tied", "low", "sure", "few levels"])
def test_errors_at_tied_low_and_high_confidences_are_exact(kind):
    """Cells of equal confidences change nothing; others are narrow where confidences are close together."""
    generator = torch.Generator().manual_seed(1)
    size, classes = 3000, 400
    if kind == "tied":  # half of them at one confidence that is no cell's middle
        confidence = torch.where(
            torch.arange(size) % 2 == 0, 0.31234, 0.2 + 0.6 * torch.rand(size, generator=generator)
        )
    elif kind == "low":
        confidence = 0.003 + 0.004 * torch.rand(size, generator=generator)
    elif kind == "sure":
        confidence = 1 - 1e-3 * torch.rand(size, generator=generator)
    else:
        confidence = torch.tensor([0.0101, 0.0103, 0.3, 0.5001, 0.9999])[torch.arange(size) % 5]
    confidence = confidence.double()
    rest = (1 - confidence[:, None]) / (classes - 1)
    probs = torch.cat([confidence[:, None], rest.expand(-1, classes - 1)], dim=1)
    targets = (torch.rand(size, generator=generator) > 0.8 * confidence).long()
    scores = streamed(probs, targets, 700, num_label_draws=0).scores(39)
    exact = {
        "ece_equal_mass": ev.expected_calibration_error(probs, targets, binning="equal_mass"),
        "ece_debiased": ev.debiased_calibration_error(probs, targets),
        "ece_smooth": ev.smooth_calibration_error(probs, targets),
        "ks": ev.ks_calibration_error(probs, targets),
    }
    share = 0.0 if kind in ("tied", "few levels") else 1 / size  # no cell holds more than a few different confidences
    for name, value in exact.items():
        assert scores[name] == pytest.approx(value, abs=1e-9 + 8 * share * confidence.max().item()), name
    if kind == "few levels":
        assert all(scores[name] == pytest.approx(value, abs=1e-9) for name, value in exact.items())


@pytest.mark.parametrize(("right", "total"), [(1, 1), (0, 1), (19, 20), (700, 1000)])
def test_the_interval_of_the_accuracy_is_clopper_and_pearsons(right, total):
    probs = torch.tensor([[0.97, 0.03]] * total)
    scores = streamed(probs, (torch.arange(total) >= right).long(), total).scores(39)
    expected = binomtest(right, total).proportion_ci(0.95, "exact")
    assert (scores["accuracy_low"], scores["accuracy_high"]) == pytest.approx(expected, abs=1e-9)


def test_intervals_of_means_hold_no_impossible_values():
    probs = torch.tensor([[1.0, 0.0]] * 19 + [[0.6, 0.4]])
    scores = streamed(probs, torch.zeros(20, dtype=torch.int64), 20).scores(39)
    assert scores["confidence_high"] <= 1
    assert min(scores[f"{name}_low"] for name in ("brier", "entropy", "confidence")) >= 0
