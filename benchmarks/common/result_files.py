"""Results of the benchmarks: one JSON file and one Markdown table each, in ``benchmarks/results``.

Each cell is written when it is measured, so that a stopped run can continue. A file lists every command that added to
it, with the date and the versions of the packages.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import bayes_kf

RESULTS = Path(__file__).resolve().parents[1] / "results"
PACKAGES = ("torch", "peft", "transformers", "numpy", "scipy", "scikit-learn")


class ResultFile:
    """A results file: cells by key, written after every change.

    Args:
        name: of the file, without its suffix.
    """

    def __init__(self, name: str) -> None:
        self.path = RESULTS / f"{name}.json"
        self.cells: dict[str, dict[str, Any]] = {}
        self.runs: list[dict[str, Any]] = []
        self._merge()

    def begin(self) -> None:
        """Add this command to the list, once even if it is continued."""
        run = provenance()
        if all(any(run[k] != old[k] for k in run if k != "date") for old in self.runs):
            self.runs.append(run)

    def put(self, key: str, cell: dict[str, Any]) -> None:
        """Add or replace a cell and write the file, with cells that another process wrote in the meantime."""
        self._merge()
        self.cells[key] = cell
        self.save()

    def save(self) -> None:
        """Write the file atomically."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cells = [
            f"  {json.dumps(key)}: {json.dumps(cell, allow_nan=False)}" for key, cell in sorted(self.cells.items())
        ]
        body = ",\n".join(cells)  # one cell on each line, so that a changed cell changes one line
        text = f'{{\n"runs": {json.dumps(self.runs, indent=1)},\n"cells": {{\n{body}\n}}\n}}\n'
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path)

    def write_markdown(self, title: str, body: Sequence[str]) -> str:
        """Write the table beside the JSON, with the commands that made it; return the text."""
        lines = [f"# {title}", "", *body, "", "## Made by", ""]
        for run in self.runs:
            packages = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
            machine = f"{run['cpu']}, threads: {run['threads']}"
            lines += [f"    {run['command']}", "", f"{run['date']}; {machine}; {packages}.", ""]
        text = "\n".join(lines).rstrip() + "\n"
        self.path.with_suffix(".md").write_text(text, encoding="utf-8")
        return text

    def _merge(self) -> None:
        """Add cells and runs of the file on disk, whose cells are the newest."""
        if not self.path.is_file():
            return
        content = json.loads(self.path.read_text(encoding="utf-8"))
        self.cells = self.cells | content["cells"]
        self.runs = content["runs"] + [run for run in self.runs if run not in content["runs"]]


def provenance() -> dict[str, Any]:
    """Command, date, processor, threads and package versions of this process."""
    return {
        "command": shlex.join(["python", "-m", _module(), *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": _processor(),
        "threads": torch.get_num_threads(),
        "versions": {
            "bayes_kf": bayes_kf.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
    }


def mean_sd(values: Sequence[float], digits: int = 3) -> str:
    """The text "mean ± sd" of several values, the value itself for one, a dash for none."""
    if not values:
        return "–"
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    sd = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return f"{mean:.{digits}f} ± {sd:.{digits}f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table with padded columns, so that the text is a table, too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, *rows]]
    lines.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(line) + " |" for line in lines]


def _module() -> str:
    """The name of the module that runs as ``__main__``."""
    spec = sys.modules["__main__"].__spec__
    return spec.name.removesuffix(".__main__") if spec is not None else Path(sys.argv[0]).stem


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _processor() -> str:
    """The processor's name, or its architecture."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
