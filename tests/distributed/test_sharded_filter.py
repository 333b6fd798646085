"""A filter on 1, 2, 3 and 4 processes is the filter on one."""

import os
import shutil
from pathlib import Path

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


NAMES = ("low_rank", "information", "gaussian", "tied", "lora", "loko")


def saved_half_way(rank, size, names, folder):
    """Each process saves its rows after half of the batches, and again over them."""
    for number, name in enumerate(names):
        model, config = cases.CASES[name]
        kf, data = ShardedFilter(cases.MODELS[model][0](), config), cases.batches(name)
        state = kf.init(data[0][0])
        kf.save_divided(state, f"{folder}/{number}")
        for inputs, targets in data[:2]:
            state, _ = kf.update(state, *cases.share(inputs, targets, rank, size))
        kf.save_divided(state, f"{folder}/{number}")
        kf.save_divided(state, f"{folder}/{number}")  # of the same step: beside the first until it is complete
        back = kf.load_divided(f"{folder}/{number}")
        assert all(torch.equal(a, b) for a, b in zip(back.belief, state.belief, strict=True))
        assert back.noise.step == state.noise.step
    return {}


def went_on(rank, size, names, folder):
    """The whole states after the other batches, from what another number of processes saved."""
    actual = {}
    for number, name in enumerate(names):
        model, config = cases.CASES[name]
        kf = ShardedFilter(cases.MODELS[model][0](), config)
        state = kf.load_divided(f"{folder}/{number}", cases.batches(name)[0][0])
        for inputs, targets in cases.batches(name)[2:]:
            state, _ = kf.update(state, *cases.share(inputs, targets, rank, size))
        whole = kf.gather(state)
        actual[name] = {"belief": dict(zip(whole.belief._fields, whole.belief, strict=True)), "step": whole.step}
        actual[name]["scores"] = whole.temperature_scores.total
        actual[name]["noise"] = {k: v for k, v in whole.noise._asdict().items() if v is not None}
    return actual


def test_rows_that_two_processes_saved_go_on_with_three(expected, tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "notes.txt").write_text("mine")
    run(2, saved_half_way, tmp_path, 2, NAMES, str(tmp_path))
    assert sorted(path.name for path in (tmp_path / "0").iterdir()) == ["divided-2-again", "divided.json", "notes.txt"]
    assert all(path.suffix == ".safetensors" for path in (tmp_path / "0" / "divided-2-again").iterdir())
    for found in run(3, went_on, tmp_path, 3, NAMES, str(tmp_path)):
        for name in NAMES:
            state, _ = expected[name]
            assert found[name]["step"] == state.step
            whole = type(state.belief)(**found[name]["belief"])
            torch.testing.assert_close(whole.mean, state.belief.mean, rtol=1e-7, atol=1e-9, msg=name)
            matrix = type(state.belief).covariance_matrix
            torch.testing.assert_close(matrix(whole), matrix(state.belief), rtol=1e-7, atol=1e-9, msg=name)
            scores, wanted = found[name]["scores"], state.temperature_scores.total
            torch.testing.assert_close(scores, wanted, rtol=1e-8, atol=1e-8, msg=name)
            for field, value in found[name]["noise"].items():
                torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(getattr(state.noise, field)))
    assert (tmp_path / "0" / "notes.txt").read_text() == "mine"


def refused(rank, folder):
    """The errors for folders that do not fit."""
    from safetensors.torch import save_file

    model, config = cases.CASES["low_rank"]
    kf = ShardedFilter(cases.MODELS[model][0](), config)
    data = cases.batches("low_rank")
    state = kf.init(data[0][0])
    kf.save_divided(state, f"{folder}/good")
    said = {}

    def told(name, call):
        try:
            call()
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"

    told("none", lambda: kf.load_divided(f"{folder}/empty"))
    other = ShardedFilter(cases.MODELS[model][0](), cases.CASES["diagonal"][1])
    told("settings", lambda: other.load_divided(f"{folder}/good"))
    wide = ShardedFilter(cases.MODELS["wide"][0](), config)
    told("model", lambda: wide.load_divided(f"{folder}/good"))
    torch.distributed.barrier()
    if rank == 0:
        os.makedirs(f"{folder}/cut")
        shutil.copytree(f"{folder}/good", f"{folder}/cut", dirs_exist_ok=True)
        for path in Path(f"{folder}/cut/divided-0").iterdir():
            save_file({"other": torch.zeros(1)}, path)
        Path(f"{folder}/taken").mkdir()
        Path(f"{folder}/taken/divided-0").write_text("mine")
        Path(f"{folder}/full/divided-0").mkdir(parents=True)
        Path(f"{folder}/full/divided-0/thesis.txt").write_text("mine")
    torch.distributed.barrier()
    told("cut", lambda: kf.load_divided(f"{folder}/cut"))
    told("taken", lambda: kf.save_divided(state, f"{folder}/taken"))
    told("full", lambda: kf.save_divided(state, f"{folder}/full"))
    torch.distributed.barrier()
    assert Path(f"{folder}/taken/divided-0").read_text() == "mine"
    assert Path(f"{folder}/full/divided-0/thesis.txt").read_text() == "mine"
    return said


def test_folders_that_do_not_fit_are_refused(tmp_path):
    first, second = run(2, refused, tmp_path, str(tmp_path))
    for found in (first, second):
        assert found["none"].startswith("ValueError: `folder` must hold a readable divided.json")
        assert "checkpoint of this config, got another config" in found["settings"]
        assert "checkpoint of this model, got another" in found["model"]
        assert "could not be written or read" in found["cut"]
    assert first["taken"].startswith("FileExistsError")
    assert first["full"].startswith("FileExistsError")
    assert second["taken"].startswith("OtherProcessError: process 0 could not continue")
