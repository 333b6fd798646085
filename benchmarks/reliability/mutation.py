"""The share of mutants that the tests kill, from a random sample with a confidence interval.

mutmut (``[tool.mutmut]`` in ``pyproject.toml``) changes ``inference/`` and ``evaluation/`` in some 25,000 small ways,
and runs the tests of both folders that call the changed function. All of them would take days. mutmut itself cannot
sample, so this script draws mutants at random. A mutant is killed if a test fails or runs out of time. A mutant that no
test of these folders runs, or that has an effect only while the package is imported, survives. The interval of the rate
is Wilson's, of 95 %.

    pip install mutmut
    python -m benchmarks.reliability.mutation                      # 400 mutants, some hours; results/mutation.md
    python -m benchmarks.reliability.mutation --folder /tmp/there  # the copy of the repository, to continue later
    python -m benchmarks.reliability.mutation --table              # the table from existing results
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from scipy import stats

from benchmarks.common.command import Command
from benchmarks.common.result_files import ResultFile, markdown_table

ROOT = Path(__file__).resolve().parents[2]
KILLED = ("killed", "timeout", "segfault", "caught by type check")


def prepare(folder: Path) -> None:
    """Clone the repository into ``folder``, unless that exists."""
    if not folder.exists():
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)  # noqa: S603, S607


def mutmut(folder: Path, *arguments: str, quiet: bool = False) -> str:
    """Run mutmut in ``folder``; its output if ``quiet``."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    command = [sys.executable, "-m", "mutmut", *arguments]
    output = subprocess.PIPE if quiet else None
    done = subprocess.run(command, cwd=folder, env=environment, stdout=output, text=True, check=True)  # noqa: S603
    return done.stdout or ""


def outcomes(folder: Path) -> dict[str, str]:
    """Mutant -> outcome so far."""
    lines = mutmut(folder, "results", "--all", "true", quiet=True).splitlines()
    pairs = (line.strip().rpartition(": ") for line in lines)
    return {name: status for name, _, status in pairs if name.startswith("bayes_kf.")}


def group(name: str) -> str:
    """The subpackage of a mutant."""
    return name.split(".")[1]


def write(file: ResultFile) -> None:
    """The table, and the survivors by function."""
    rows = []
    for where, cell in sorted(file.cells.items()):
        rate = f"{100 * cell['rate']:.1f} % ({100 * cell['low']:.1f} to {100 * cell['high']:.1f})"
        rows.append([where, f"{cell['mutants']:,}", f"{cell['tried']:,}", f"{cell['killed']:,}", rate])
    survivors = [f"- {name}" for cell in file.cells.values() for name in cell.get("survivors", ())]
    header = ["", "mutants", "tried", "killed", "rate (95 %)"]
    file.write_markdown("Mutation testing", [*markdown_table(header, rows), "", "Survived:", "", *survivors])


def main() -> None:
    """The command line."""
    command = Command(__doc__).option("--sample", type=int, default=400, help="number of mutants (%(default)s)").table()
    command.option("--seed", type=int, default=0, help="of the sample").option(
        "--folder", type=Path, help="of the copy"
    )
    args = command.option("--children", type=int, default=1, help="processes at once (%(default)s)").parse()
    file = ResultFile("mutation")
    if not args.table:
        file.begin()
        with TemporaryDirectory() as scratch:
            folder = (args.folder or Path(scratch) / "copy").resolve()
            sample(file, folder, args.sample, args.seed, ("--max-children", str(args.children)))
    write(file)


def sample(file: ResultFile, folder: Path, size: int, seed: int, children: tuple[str, str]) -> None:
    """Try a random sample of mutants in a copy of the repository, and put the rates into the file."""
    prepare(folder)
    if not (folder / "mutants" / "mutmut-stats.json").exists():  # the first run generates all mutants
        mutmut(folder, "run", *children, "bayes_kf.files.checksums.*")
    known = outcomes(folder)
    chosen = random.Random(seed).sample(sorted(known), size)  # noqa: S311 (no secrets)
    mutmut(folder, "run", *children, *chosen)
    results = outcomes(folder)
    for where in ("inference", "evaluation", "all"):
        tried = {name: results[name] for name in chosen if where in ("all", group(name))}
        killed = sum(status in KILLED for status in tried.values())
        interval = stats.binomtest(killed, len(tried)).proportion_ci(method="wilson")
        cell = {
            "mutants": sum(where in ("all", group(name)) for name in known),
            "tried": len(tried),
            "killed": killed,
            "rate": killed / len(tried),
            "low": float(interval.low),
            "high": float(interval.high),
            "outcomes": dict(Counter(tried.values())),
        }
        if where != "all":
            cell["survivors"] = sorted(name for name, status in tried.items() if status not in KILLED)
        file.put(where, cell)
        print(where, json.dumps(cell, indent=1))


if __name__ == "__main__":
    main()
