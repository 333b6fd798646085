"""Cells and tables of the streams' bench."""

import math

import pytest

from benchmarks.quality import streams
from benchmarks.quality.streams_table import difference, render


@pytest.fixture
def short(monkeypatch):
    problems = {name: problem._replace(limit=30) for name, problem in streams.PROBLEMS.items()}
    monkeypatch.setattr(streams, "PROBLEMS", problems)
    monkeypatch.setattr(streams, "HELDOUT", 40)


def test_a_row_is_measured(short):
    rows = ("single", "single-whitened")
    cells = {f"digits/{row}/0": streams.measure("digits", row, 0) for row in rows}
    for cell in cells.values():
        assert (cell["examples"], len(cell["blocks"])) == (30, 2)
        expected = (25 * cell["blocks"][0] + 5 * cell["blocks"][1]) / 30
        assert cell["online_log_loss"] == pytest.approx(expected, abs=1e-5)
        assert 0 <= cell["epistemic"] <= cell["entropy"] <= math.log(10)
    first, second = cells.values()
    assert first["online_log_loss"] != second["online_log_loss"]
    assert "## UCI digits" in "\n".join(render(cells, {"digits": "UCI digits"}, streams.ROWS))


def test_differences_are_paired_by_block():
    keys = [f"kmnist/{row}/{seed}" for row in ("stream", "before") for seed in (0, 1)]
    cells = dict(zip(keys, ({"blocks": b} for b in ([1.0, 2.0], [3.0], [0.5, 1.0], [2.0])), strict=True))
    # differences 0.5, 1 and 1: mean 0.833, standard deviation 0.289, standard error 0.167
    assert difference(cells, "kmnist", "stream", "before") == "+0.833 ± 0.167"
    assert difference(cells, "kmnist", "single", "before") == "–"
