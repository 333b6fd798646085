"""Sums over processes are the information form on one."""

import dataclasses

import pytest
import torch

import bayes_kf as bkf
from bayes_kf.distributed import DataParallelFilter

from . import cases
from .processes import run

SETTING = bkf.KalmanConfig(covariance="diagonal_information", expansion="mean", initial_logit_sd=1.0)
CONFIGS = {
    "network": ("low_rank", SETTING),
    "drifting": ("low_rank", dataclasses.replace(SETTING, forgetting=0.97, drift_variance=1e-3, prior_pull=0.02)),
    "damped": ("low_rank", dataclasses.replace(SETTING, initial_logit_sd=12.0)),
    "gaussian": ("gaussian", dataclasses.replace(SETTING, likelihood="gaussian", noise_variance=0.5)),
    "lora": ("lora", SETTING),
    "tied": ("tied", SETTING),
    "truncated": ("truncated", dataclasses.replace(SETTING, curvature="truncated", curvature_epsilon=0.2)),
}


def parts(name):
    case, config = CONFIGS[name]
    return cases.MODELS[cases.CASES[case][0]][0], config, cases.batches(case)


def together(rank, size):
    actual = {}
    for name in CONFIGS:
        make, config, data = parts(name)
        kf = DataParallelFilter(make(), config)
        state, damping, correct = kf.init(data[0][0] if rank == 0 else None), [], 0
        for inputs, targets in data:
            state, info = kf.update(state, *cases.share(inputs, targets, rank, size))
            damping.append(info.damping)
            correct += len(info.log_loss)
        actual[name] = {
            "mean": state.belief.mean,
            "variance": state.belief.variance,
            "scores": state.temperature_scores.total,
            "examples": state.examples,
            "own": correct,
            "damping": damping,
            "bytes": kf.group.bytes_sent,
        }
    return actual


@pytest.mark.parametrize("size", [1, 2, 3])
def test_sums_over_processes_equal_one_filter(size, tmp_path):
    actual, damped = run(size, together, tmp_path, size), False
    for name in CONFIGS:
        make, config, data = parts(name)
        kf = bkf.KalmanFilter(make(), config)
        state, damping = kf.init(data[0][0]), []
        for inputs, targets in data:
            state, info = kf.update(state, inputs, targets)
            damping.append(info.damping)
        damped |= min(damping) < 1.0
        for here in (process[name] for process in actual):
            torch.testing.assert_close(here["mean"], state.belief.mean, rtol=1e-8, atol=1e-10, msg=name)
            torch.testing.assert_close(here["variance"], state.belief.variance, rtol=1e-8, atol=1e-12, msg=name)
            assert here["damping"] == damping
            assert here["examples"] == state.examples
            if config.likelihood == "gaussian" or size == 1:  # the others draw, each process for its own examples
                torch.testing.assert_close(here["scores"], state.temperature_scores.total)
        assert sum(process[name]["own"] for process in actual) == state.examples
    assert damped  # so that the guard was seen


LARGE = dataclasses.replace(SETTING, temperature=1.0)


def clusters(size):
    """Examples of four classes that a network can tell apart."""
    generator = torch.Generator().manual_seed(5)
    centres = 1.5 * torch.randn(4, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(4, (size,), generator=generator)
    return centres[y] + torch.randn(size, 5, generator=generator, dtype=torch.float64), y


def log_loss(kf, state):
    x, y = clusters(1200)
    return float(torch.nn.functional.cross_entropy(kf.adapter.outputs(state.belief.mean, x[600:]), y[600:]))


def one_large_batch(rank, size):
    x, y = clusters(600)
    kf = DataParallelFilter(cases.network(), LARGE)
    state = kf.init(x[:32] if rank == 0 else None)
    state, info = kf.update(state, *cases.share(x, y, rank, size))
    again = (info.relinearized, info.linearized_again, info.checked)
    return {"mean": state.belief.mean, "variance": state.belief.variance, "loss": log_loss(kf, state), "again": again}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_one_large_batch_learns_as_small_ones_do(size, tmp_path):
    x, y = clusters(600)
    kf = bkf.KalmanFilter(cases.network(), LARGE)
    small = kf.init(x[:32])
    for some in torch.arange(600).split(16):
        small, _ = kf.update(small, x[some], y[some])
    actual = run(size, one_large_batch, tmp_path, size)
    assert actual[0]["loss"] <= 1.05 * log_loss(kf, small)
    for here in actual:
        torch.testing.assert_close(here["mean"], actual[0]["mean"], rtol=0.0, atol=0.0)
        assert here["again"][0] == actual[0]["again"][0] > 0
    linearized, checked = (sum(process["again"][k] for process in actual) for k in (1, 2))
    assert linearized >= 600
    assert checked >= 600


def test_the_number_of_processes_does_not_matter_for_a_large_batch(tmp_path):
    for name in ("one", "three"):
        (tmp_path / name).mkdir()
    (one,), several = run(1, one_large_batch, tmp_path / "one", 1), run(3, one_large_batch, tmp_path / "three", 3)
    torch.testing.assert_close(several[0]["mean"], one["mean"], rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(several[0]["variance"], one["variance"], rtol=1e-7, atol=1e-10)
    assert several[0]["again"][0] == one["again"][0]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"covariance": "low_rank"}, r"`covariance` must be 'diagonal_information' for a DataParallelFilter, got 'low"),
        ({"expansion": "mode"}, r"`expansion` must be 'mean' for a DataParallelFilter, got 'mode'"),
        (
            {"likelihood": "student_t", "expansion": "mode"},
            "`likelihood` must not be one of student_t, heteroscedastic_gaussian, ordinal for a DataParallelFilter, ",
        ),
        ({"noise": "identity"}, r"`noise` must be 'exponential_family' for a DataParallelFilter"),
        ({"gate_quantile": 0.9}, r"`gate_quantile` must be None for a DataParallelFilter, got 0\.9"),
        (
            {"likelihood": "gaussian", "noise_variance": "estimated"},
            r"`noise_variance` must be a number for a DataParallelFilter, got 'estimated'",
        ),
    ],
)
def test_unsupported_settings_raise(setting, message, alone):
    with pytest.raises(ValueError, match=message):
        DataParallelFilter(cases.network(), dataclasses.replace(SETTING, **setting))
