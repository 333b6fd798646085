"""The options and the loop over cells that all benchmarks share."""

import json

import pytest
import torch

from benchmarks.common import command, result_files
from benchmarks.common.command import Command, is_due, run_cells, seeds_of


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.setattr(result_files, "RESULTS", result_files.RESULTS)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(result_files, "RESULTS", tmp_path)
    return result_files.ResultFile("cells")


def counted(calls, **values):
    def measure(key):
        calls.append(key)
        return {"value": values[key]}

    return {key: lambda key=key: measure(key) for key in values}


def test_options(tmp_path):
    made = Command("What it does.").names("--data", ("usps", "uci")).names("--rows", ("a", "b"), ("a",), "methods")
    made = made.numbers("--shots", (1, 2), "shots").seeds(2).limit("examples").redo().table().hidden("--part")
    args = made.parse([])
    assert (args.data, args.rows, args.shots, args.seeds) == (["usps", "uci"], ["a"], [1, 2], [0, 1])
    assert (args.limit, args.redo, args.table, args.part, args.threads) == (None, None, False, None, 1)
    given = ["--data", "uci", "--seeds", "1,3", "--redo", "--table", "--results", str(tmp_path), "--limit", "5"]
    args = made.parse(given)
    assert (args.data, args.seeds, args.redo, args.table, args.limit) == (["uci"], [1, 3], "", True, 5)
    assert tmp_path == result_files.RESULTS
    assert made.parse(["--redo", "^uci/"]).redo == "^uci/"
    text = made.parser.format_help()
    assert "What it does." in text
    assert "--part" not in text
    with pytest.raises(SystemExit):
        made.parse(["--data", "mnist"])


def test_seeds():
    assert seeds_of("1") == [0]
    assert seeds_of("4,") == [4]
    with pytest.raises(SystemExit):
        Command("x").seeds(1).parse(["--seeds", "many"])


def test_missing_cells_are_run_and_written_at_once(file):
    calls = []
    cells = counted(calls, a=1, b=2)
    cells["broken"] = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run_cells(file, cells)
    assert json.loads(file.path.read_text())["cells"] == {"a": {"value": 1}, "b": {"value": 2}}
    assert run_cells(result_files.ResultFile("cells"), counted(calls, a=3, b=4, c=5)) == 1
    assert calls == ["a", "b", "c"]


def test_cells_are_run_again_when_asked_or_stale(file):
    calls = []
    run_cells(file, counted(calls, aa=1, ab=2, b=3))
    calls.clear()
    assert run_cells(file, counted(calls, aa=4, ab=5, b=6), "^a") == 2
    assert calls == ["aa", "ab"]
    assert run_cells(file, counted(calls, aa=7, ab=8, b=9), is_stale=lambda key, cell: cell["value"] == 3) == 1
    assert file.cells == {"aa": {"value": 4}, "ab": {"value": 5}, "b": {"value": 9}}
    assert run_cells(file, counted(calls, aa=1, ab=1, b=1), "") == 3
    assert not is_due(file, "aa", None)
    assert is_due(file, "missing", None)


def test_a_file_names_the_module_that_ran(file, monkeypatch):
    main = type(command)("__main__")
    main.__spec__ = command.__spec__
    monkeypatch.setitem(result_files.sys.modules, "__main__", main)
    monkeypatch.setattr(result_files.sys, "argv", ["/somewhere/command.py", "--seeds", "2"])
    assert result_files.provenance()["command"] == "python -m benchmarks.common.command --seeds 2"
    main.__spec__ = None
    assert result_files.provenance()["command"] == "python -m command --seeds 2"
