"""The code of every guide runs from top to bottom, and the commands of the shell page do."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bayes_kf as bkf
from bayes_kf.cli import main
from bayes_kf.data import uci_digits_split
from bayes_kf.models.zoo import digits_vit

ROOT = Path(__file__).parents[2]
GUIDES = ROOT / "docs" / "how-to"
PAGES = [path for path in sorted((ROOT / "docs").rglob("*.md")) if "```python\n" in path.read_text(encoding="utf-8")]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_every_guide_is_run():
    with_code = {path.stem for path in PAGES if path.parent == GUIDES}
    others = {"index", "trainer", "several-processes", "shell", "lightning"}  # scripts that other tests run, commands
    assert {path.stem for path in GUIDES.glob("*.md")} == with_code | others


@pytest.mark.parametrize("path", PAGES, ids=[str(path.relative_to(ROOT / "docs")) for path in PAGES])
def test_code_runs(path, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    torch.manual_seed(0)
    for number, block in enumerate(blocks(path, "python")):
        exec(compile(block, f"{path.name}, block {number}", "exec"), scope)
    assert capsys.readouterr().out.strip()
    assert not list(tmp_path.iterdir()), "a guide must leave nothing behind where it runs"


def test_one_script_ends_with_one_posterior_whatever_has_launched_it(tmp_path):
    """As it stands with python, torchrun and accelerate launch: means and variances to 1e-6 of their size."""
    launchers = {
        "python": [],
        "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        "accelerate": [
            *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
            *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
        ],
    }
    found = {}
    for name, launcher in launchers.items():
        command = [sys.executable, *launcher, str(GUIDES / "several_processes.py"), str(tmp_path / name)]
        done = subprocess.run(command, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("log loss") == (1 if name == "python" else 2)
        found[name] = bkf.Posterior.from_pretrained(tmp_path / name, digits_vit())
    whole = found.pop("python")
    assert whole.state.examples == 160
    for other in found.values():
        for value, expected in zip(
            (other.mean_vector, other.variance_vector), (whole.mean_vector, whole.variance_vector), strict=True
        ):
            assert (value - expected).norm() < 1e-6 * expected.norm()


def test_the_commands_of_the_shell_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [line.removeprefix("$ ") for block in blocks(GUIDES / "shell.md", "console") for line in block.splitlines()]
    demo, *commands = lines
    assert (ROOT / shlex.split(demo)[0]).is_file()  # another test runs it
    (tmp_path / "demo-output").mkdir()
    stream, rest = uci_digits_split()
    for name, data, size in (("stream", stream, 40), ("heldout", rest, 60)):  # as the demo leaves them, fewer
        arrays = {"x": data.images[:size].numpy(), "y": data.labels[:size].numpy()}
        np.savez(tmp_path / "demo-output" / f"{name}.npz", **arrays)
    for line in commands:
        if line.startswith("bayes-kf "):
            assert main(shlex.split(line)[1:]) == 0, line
        else:
            subprocess.run(["bash", "-c", line], check=True)
    assert {"report.html", "compare.html", "predictions.html"} <= {path.name for path in tmp_path.iterdir()}
