"""Folders that take each other's place, whatever happens meanwhile."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import bayes_kf as bkf
from bayes_kf.inference import folders

SAVING = """
import sys
import torch
import bayes_kf as bkf

model = torch.nn.Linear(30, 3)
kf = bkf.KalmanFilter(model, bkf.KalmanConfig(initial_variance=1.0, covariance="diagonal"))
state, g = kf.init(), torch.Generator().manual_seed(0)
while True:
    state, _ = kf.update(state, torch.randn(1, 30, generator=g), torch.tensor([0]))
    bkf.Posterior(kf, state).save_pretrained(sys.argv[1])
    print(state.step, flush=True)
"""


def folder(path, text):
    path.mkdir()
    (path / "file").write_text(text, encoding="utf-8")
    return path


def content(path):
    return (path / "file").read_text(encoding="utf-8")


@pytest.mark.parametrize("exchange", [True, False], ids=["one step", "two steps"])
def test_the_new_takes_the_old_one_s_place(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(folders, "_renameat2", lambda: None)
    folders.replace_folder(folder(tmp_path / "first", "1"), tmp_path / "there")
    assert content(tmp_path / "there") == "1"
    folders.replace_folder(folder(tmp_path / "second", "2"), tmp_path / "there")
    assert content(tmp_path / "there") == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has renameat2, one step for two folders")
def test_linux_does_it_in_one_step(tmp_path, monkeypatch):
    old, new = folder(tmp_path / "old", "old"), folder(tmp_path / "new", "new")
    monkeypatch.setattr(os, "replace", None)
    folders.replace_folder(new, old)
    assert content(old) == "new"


def test_a_file_system_that_cannot_exchange(tmp_path, monkeypatch):
    def refuse(*_):
        import ctypes

        ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(folders, "_renameat2", lambda: refuse)
    old = folder(tmp_path / "old", "old")
    folders.replace_folder(folder(tmp_path / "new", "new"), old)
    assert content(old) == "new"


def test_other_errors_are_told_and_change_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        import ctypes

        ctypes.set_errno(errno.EACCES)
        return -1

    monkeypatch.setattr(folders, "_renameat2", lambda: refuse)
    old, new = folder(tmp_path / "old", "old"), folder(tmp_path / "new", "new")
    with pytest.raises(PermissionError, match="old"):
        folders.replace_folder(new, old)
    assert (content(old), content(new)) == ("old", "new")


def test_a_second_step_that_fails_is_undone(tmp_path, monkeypatch):
    real, calls = os.replace, []

    def failing(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "no space")
        return real(source, target)

    monkeypatch.setattr(folders, "_renameat2", lambda: None)
    monkeypatch.setattr(os, "replace", failing)
    old = folder(tmp_path / "old", "old")
    with pytest.raises(OSError, match="no space"):
        folders.replace_folder(folder(tmp_path / "new", "new"), old)
    assert content(old) == "old"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it takes two steps, with a gap between them")
def test_killed_while_saving_the_last_or_the_one_before_is_there(tmp_path):
    """A process that does nothing but save, looked at in twenty of its moments and killed twice."""
    target = tmp_path / "posterior"
    command = [sys.executable, "-c", SAVING, str(target)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    g = torch.Generator().manual_seed(0)
    for _ in range(2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            for _ in range(10):  # stopped in its tracks, looked at, and let go on
                time.sleep(0.02 + 0.05 * float(torch.rand(1, generator=g)))
                process.send_signal(signal.SIGSTOP)
                assert whole(target) >= 1
                process.send_signal(signal.SIGCONT)
            process.send_signal(signal.SIGKILL)
            last = [int(line) for line in process.stdout.read().split()]
        assert not last or whole(target) in (last[-1], last[-1] + 1)


def whole(target: Path) -> int:
    """The step of a posterior that loads."""
    return bkf.Posterior.from_pretrained(target, torch.nn.Linear(30, 3)).state.step
