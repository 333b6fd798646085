"""The bench's files: runs resume, tables regenerate, rows and data sets are files; errors are told."""

import csv
import json
import shutil
import urllib.error
from pathlib import Path

import pytest
import torch

from benchmarks.bench import command, epochs, online
from benchmarks.bench.networks import base, large
from benchmarks.bench.registry.optimizers import BUDGET, found_rows
from benchmarks.bench.registry.problems import found_problems
from benchmarks.bench.tables import epochs_table, figures, online_table
from benchmarks.common import result_files

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = REPOSITORY / "benchmarks" / "bench" / "example"
UCI = found_problems()["uci"]
BENCHES = {
    "online": (online, online_table.render, figures.draw_online),
    "optimizers": (epochs, epochs_table.render, figures.draw_epochs),
}


def call(name, folder, *arguments):
    bench, render, draw = BENCHES[name]
    command.main(bench, "A title", None, render, draw, ["--results", str(folder), *arguments])


@pytest.mark.parametrize("name", BENCHES)
def test_a_run_resumes_and_tables_regenerate(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(result_files, "RESULTS", tmp_path)
    monkeypatch.setattr(epochs, "EPOCHS", 1)
    run = ["--problems", "uci", "--rows", "default", "adamw", "--limit", "10", "--seeds", "2"]
    call(name, tmp_path, *run)
    stem = tmp_path / f"bench_{name}-limit10"
    kept = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    assert sum(key.startswith("uci/default/") for key in kept["cells"]) == 2
    assert sum(key.endswith("/tuning") for key in kept["cells"]) == BUDGET
    assert all(("adamw_milliseconds" in cell) != key.endswith("/tuning") for key, cell in kept["cells"].items())
    text = stem.with_suffix(".md").read_text(encoding="utf-8")
    assert "| AdamW" in text
    assert f"]({stem.name}.png)" in text
    with stem.with_suffix(".csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(kept["cells"])
    assert {line["row"] for line in lines} == {"default", "adamw"}
    made = {ending: stem.with_suffix(ending).read_bytes() for ending in (".md", ".csv", ".png")}
    assert len(made[".png"]) > 10_000

    def refuse(*_, **__):
        raise AssertionError("a cell was run again")

    monkeypatch.setattr(BENCHES[name][0], "measure", refuse)
    call(name, tmp_path, *run)  # all is there
    for ending in made:
        stem.with_suffix(ending).unlink()
    call(name, tmp_path, "--limit", "10", "--table")
    assert {ending: stem.with_suffix(ending).read_bytes() for ending in (".md", ".csv")} == {
        ending: made[ending] for ending in (".md", ".csv")
    }
    assert stem.with_suffix(".png").is_file()
    capsys.readouterr()
    with pytest.raises(AssertionError, match="again"):
        call(name, tmp_path, *run, "--redo")


def test_a_new_optimizer_and_a_new_data_set_are_one_file_each(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(result_files, "RESULTS", tmp_path)
    shutil.copytree(EXAMPLE, tmp_path / "mine")
    run = ["--extra", str(tmp_path / "mine"), "--problems", "upside_down", "--rows", "signum"]
    call("online", tmp_path, *run, "--limit", "40", "--seeds", "1")
    text = capsys.readouterr().out
    assert "UCI digits upside down" in text
    cells = json.loads((tmp_path / "bench_online-limit40.json").read_text(encoding="utf-8"))["cells"]
    assert sum(key.startswith("upside_down/signum/") and key.endswith("/tuning") for key in cells) == BUDGET
    actual = [cell for key, cell in cells.items() if key.startswith("upside_down/signum/") and key.endswith("/0")]
    assert actual[0]["online_accuracy"] > 0.1
    assert actual[0]["state_bytes"] == 4 * actual[0]["parameters"]  # one average


@pytest.mark.parametrize("path", sorted(EXAMPLE.glob("*/*.py")), ids=lambda path: path.stem)
def test_contributing_shows_the_example_as_it_is(path):
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert path.read_text(encoding="utf-8") in text


# errors


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("GRID = ({},)\ndef make(): pass", r"`TITLE` must be the row's name in .*bad.py, got nothing of that name\."),
        ("TITLE = 'x'\nGRID = ({}, {})\ndef make(): pass", r"`GRID` must be 4 dicts, .* or one, got 2 in .*bad.py\."),
        ("TITLE = 'x'\nGRID = ({'a': 1},) * 4\ndef make(): pass", r"`GRID` must hold different settings, got some"),
        ("TITLE = 'x'\nGRID = ({},)\nBENCHES = ('on',)", r"`BENCHES` must be among online, optimizers, got on in"),
    ],
)
def test_bad_files_are_named(source, message, tmp_path):
    (tmp_path / "optimizers").mkdir()
    (tmp_path / "optimizers" / "bad.py").write_text(source, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        found_rows("online", tmp_path)


def test_bad_names_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"`--extra` must name a folder .*, got .*nowhere\."):
        found_rows("online", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"`--backbone` must be one of digits-vit, .*roberta-base, got 'vgg'\."):
        found_problems(backbone="vgg")
    with pytest.raises(SystemExit, match=r"`--rows` must be among .*; got adam\."):
        call("online", tmp_path, "--rows", "adam", "--table")
    with pytest.raises(ValueError, match=r"`SIZES` of uci must fit its 1,197 and 600 examples, got Sizes"):
        UCI._replace(sizes={"online": UCI.sizes_of("online", 300)._replace(stream=2000)}).split("online", 0)
    with pytest.raises(ValueError, match=r"`adapter` must be one of lora, dora, conv, weights, full, got 'bias'\."):
        UCI.model("bias", 0)


def test_weights_that_cannot_be_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(result_files, "RESULTS", tmp_path)

    def refuse(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(large.models, "get_model", refuse)
    asked = base.Request(10, True, "conv", 0)
    with pytest.raises(FileNotFoundError, match=r"`--backbone` densenet121 needs weights .*, got URLError"):
        large.LARGE["densenet121"].build(asked)
    with pytest.raises(SystemExit, match=r"got URLError: <urlopen error no route to host>\."):
        call("online", tmp_path, "--problems", "uci", "--rows", "adamw", "--backbone", "resnet18", "--limit", "4")


def test_the_papers_networks_take_lora_on_convolutions():
    problem = found_problems(backbone="resnet18", random_weights=True)["uci"]
    assert "sst2" not in found_problems(backbone="resnet18", random_weights=True)
    model = problem.model("conv", 0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum("lora_A" in name for name in trained) == 20  # every convolution
    assert any("fc" in name for name in trained)
    with torch.no_grad():
        assert model(problem.split("online", 0, 4).stream.inputs[:1]).shape == (1, 10)
