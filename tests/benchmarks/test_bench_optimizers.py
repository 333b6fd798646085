"""Every row of the bench learns, online and over epochs."""

import json
import math

import pytest
import torch

from benchmarks.bench import epochs, online, runner
from benchmarks.bench.registry.optimizers import BUDGET, found_rows
from benchmarks.bench.registry.problems import found_problems
from benchmarks.common import result_files

ONLINE, SEVERAL = found_rows("online"), found_rows("optimizers")
UCI = found_problems()["uci"]
LIMIT = 5


def started(row, seed=0, limit=LIMIT):
    """A learner of a row's first setting on UCI's digits, its model, and its stream."""
    adapter = row.adapter(UCI.network.adapters)
    stream = UCI.split("online", seed, limit).stream
    model = UCI.model(adapter, seed)
    return row.make(model, row.grid[0], seed, limit, stream.inputs), model, stream


def few(row):
    """The row with two of its settings: what tuning does is the same."""
    return row._replace(grid=row.grid[:2])


def on_uci(rows):
    return [row for row in rows.values() if row.adapter(UCI.network.adapters)]


def test_every_row_of_the_papers_is_there():
    wanted = {"adamw", "adagrad", "sgd", "kfac", "ring", "reng", "sophia", "sparse", "r_kalman", "default"}
    assert wanted | {"loko_lora", "loko_dora", "loko_conv"} <= set(ONLINE)
    assert wanted <= set(SEVERAL)
    assert all(len(row.grid) == BUDGET for row in ONLINE.values() if row.tuned)
    assert [row.name for row in ONLINE.values() if not row.tuned] == ["default", "kalman", "frozen"]


@pytest.mark.parametrize("row", on_uci(ONLINE), ids=lambda row: row.name)
def test_learn_returns_the_logits_before_the_update(row):
    learner, model, stream = started(row)
    untouched = UCI.model(row.adapter(UCI.network.adapters), 0)
    (first, label), (second, other) = stream.batches()[:2]
    with torch.no_grad():
        expected = untouched(first).logits
    torch.testing.assert_close(learner.learn(first, label).float(), expected, rtol=1e-5, atol=1e-5)
    learner.learn(second, other)
    learner.settle()
    with torch.no_grad():
        assert torch.equal(model(first).logits, expected) == (row.name == "frozen")  # others learned something
    assert learner.bytes() >= 0


@pytest.mark.parametrize("bench", [online, epochs], ids=["online", "optimizers"])
def test_every_row_runs(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(epochs, "EPOCHS", 2)
    rows = [few(row) for row in on_uci(found_rows(bench.NAME))]
    monkeypatch.setattr(result_files, "RESULTS", tmp_path)
    file = result_files.ResultFile("cells")
    runner.run(runner.Plan(bench, rows, [UCI], seeds=[0], limit=LIMIT), file)
    for row in rows:
        tuning = [cell for name, cell in file.cells.items() if name.startswith(f"uci/{row.name}/") and "tuning" in name]
        cells = [
            cell for name, cell in file.cells.items() if name.startswith(f"uci/{row.name}/") and name.endswith("/0")
        ]
        assert len(tuning) == (2 if row.tuned else 0)
        assert len(cells) in (1, 2)
        for cell in cells:
            assert cell["parameters"] > 0
            if "cause" in cell:
                continue
            assert cell["steps"] == (LIMIT if bench is online else 2)
            assert 0 <= cell["accuracy"] <= 1
            assert math.isfinite(cell["nll"])
    json.dumps(file.cells, allow_nan=False)
