"""Broken files for every reader, some of each kind; tens of thousands are in ``benchmarks/reliability/fuzz.py``."""

import pytest

from benchmarks.reliability import fuzz

READERS = fuzz.readers()


@pytest.mark.parametrize("reader", READERS, ids=[reader.name for reader in READERS])
def test_a_broken_file_is_refused_in_a_sentence(reader):
    actual = fuzz.attack(reader, 120, number=1)
    assert actual["cases"] >= 100
    assert actual["refused"] > 0
    assert actual["read"] > 0
    assert actual["longest_seconds"] < fuzz.SECONDS
