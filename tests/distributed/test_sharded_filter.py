"""A filter on 1, 2, 3 and 4 processes is the filter on one."""

import pytest
import torch

import bayes_kf as bkf
from bayes_kf.distributed import ShardedFilter

from . import cases
from .processes import run


def alone(name):
    """The filter on one process, and what it reported."""
    model, config = cases.CASES[name]
    kf = bkf.KalmanFilter(cases.MODELS[model][0](), config)
    data = cases.batches(name)
    state, infos = kf.init(data[0][0]), []
    for inputs, targets in data:
        state, info = kf.update(state, inputs, targets)
        infos.append(info)
    return state, infos


def together(rank, size, names):
    """In each of several processes: the whole state in the end, and reports."""
    actual = {}
    for name in names:
        model, config = cases.CASES[name]
        kf = ShardedFilter(cases.MODELS[model][0](), config)
        data = cases.batches(name)
        state = kf.init(data[0][0])
        infos = []
        for inputs, targets in data:
            state, info = kf.update(state, *cases.share(inputs, targets, rank, size))
            infos.append(info)
        whole = kf.gather(state)
        back = kf.shard(whole)
        actual[name] = {
            "belief": dict(zip(whole.belief._fields, whole.belief, strict=True)),
            "scores": whole.temperature_scores.total,
            "noise": {k: v for k, v in whole.noise._asdict().items() if v is not None},
            "outputs": [info.outputs for info in infos],
            "innovation": [info.innovation for info in infos],
            "damping": [info.damping for info in infos],
            "step_norm": [info.step_norm for info in infos],
            "again": [(info.relinearized, info.linearized_again, info.checked) for info in infos],
            "examples": whole.examples,
            "own": len(state.belief.mean),
            "same": all(torch.equal(a, b) for a, b in zip(back.belief, state.belief, strict=True)),
        }
    return actual


@pytest.fixture(scope="module")
def expected():
    return {name: alone(name) for name in cases.CASES}


@pytest.mark.parametrize("size", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_equal_one(size, expected, tmp_path):
    actual = run(size, together, tmp_path, size, list(cases.CASES))
    for name, (state, infos) in expected.items():
        for here in (process[name] for process in actual):
            whole = type(state.belief)(**here["belief"])
            torch.testing.assert_close(whole.mean, state.belief.mean, rtol=1e-7, atol=1e-9, msg=name)
            matrix = type(state.belief).covariance_matrix
            torch.testing.assert_close(matrix(whole), matrix(state.belief), rtol=1e-7, atol=1e-9, msg=name)
            torch.testing.assert_close(here["scores"], state.temperature_scores.total, rtol=1e-8, atol=1e-8, msg=name)
            for field, value in here["noise"].items():
                torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(getattr(state.noise, field)))
            for got, info in zip(here["outputs"], infos, strict=True):
                torch.testing.assert_close(got, info.outputs, rtol=1e-7, atol=1e-8)
            assert here["innovation"] == pytest.approx([info.innovation for info in infos], rel=1e-6)
            assert here["damping"] == pytest.approx([info.damping for info in infos], rel=1e-9)
            assert here["step_norm"] == pytest.approx([info.step_norm for info in infos], rel=1e-6)
            again = [(info.relinearized, info.linearized_again, info.checked) for info in infos]
            assert here["again"] == again
            if name == "many rows":
                assert sum(count for count, *_ in again) > 0
            assert here["examples"] == state.examples
            assert here["same"]
        held = [process[name]["own"] for process in actual]
        assert sum(held) == len(state.belief.mean)
        assert max(held) - min(held) <= 0.25 * max(held) + 16
