"""A pass that is killed while it writes checkpoints resumes; ``benchmarks/reliability`` does it hundreds of times."""

import sys

import pytest

from benchmarks.reliability.kills import one_process, several_processes


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
def test_killed_it_goes_on_to_the_bit(tmp_path):
    actual = one_process.run(8, 60, tmp_path / "pass", seed=3, longest=0.4)
    assert actual["kills"] == 8
    assert actual["whole_passes"] >= 1
    assert actual["equal_to_the_bit"]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
def test_processes_that_torchrun_starts_again_go_on_to_the_bit(tmp_path):
    actual = several_processes.run(1, 100, 2, tmp_path, longest=1.0)
    assert actual["kills"] == 1
    assert actual["whole passes"] == 1
    assert actual["equal to the bit"]
    assert actual["distance from one process"] < 1e-6
    assert actual["others with another error"] == 0
