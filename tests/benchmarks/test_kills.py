"""A pass that is killed while it writes checkpoints resumes; ``benchmarks/reliability/kills.py`` does it 200 times."""

import sys

import pytest

from benchmarks.reliability import kills


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
def test_killed_it_goes_on_to_the_bit(tmp_path):
    actual = kills.run(8, 60, tmp_path / "pass", seed=3, longest=0.4)
    assert actual["kills"] == 8
    assert actual["whole_passes"] >= 1
    assert actual["equal_to_the_bit"]
