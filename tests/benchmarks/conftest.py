"""The folder of the results is a global of the benchmarks; every test leaves it as it was."""

import pytest

from benchmarks.common import result_files


@pytest.fixture(autouse=True)
def results_folder(monkeypatch):
    monkeypatch.setattr(result_files, "RESULTS", result_files.RESULTS)
