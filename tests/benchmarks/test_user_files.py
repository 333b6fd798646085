"""Random sequences of saves in folders with a user's files; 500 are in ``benchmarks/reliability/user_files.py``."""

import sys

import pytest

from benchmarks.reliability import user_files


@pytest.mark.skipif(
    sys.platform == "win32", reason="the processes to be killed are made by os.fork, which Windows lacks"
)
def test_what_the_package_did_not_write_stays_as_it_is():
    actual = user_files.run(12, seed=1000, progress=False)
    assert actual["opened"] > 50
    assert actual["files of other people"] > 20
    assert sum(number for name, number in actual.items() if name.endswith("killed")) >= 5
    assert sum(number for name, number in actual.items() if name.endswith("refused")) >= 5
