"""Do the tests notice when the code is wrong? mutmut changes `inference/` and `evaluation/` in thousands of small ways.

All are generated, a random sample is tried, each against the tests of both that run the changed function (without those
that measure memory and stack levels, which mutmut's own code changes). A mutant counts as killed where a test fails or
it runs out of time; one that no test of these folders runs, or that matters only while the package is imported, counts
as survived. The interval of the rate is Wilson's, of 95 %.

    pip install mutmut
    python benchmarks/mutation.py                      # 400 mutants, some hours; results/mutation.md
    python benchmarks/mutation.py --folder /tmp/there  # where its copy of the repository is kept, to go on
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from scipy import stats

from benchmarks.common.result_files import ResultFile, markdown_table

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = """
[tool.mutmut]
source_paths = ["bayes_kf"]
only_mutate = ["bayes_kf/inference/**", "bayes_kf/evaluation/**"]
also_copy = [
    "benchmarks",
    "scripts",
    "tutorials",
    "docs",
    "README.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]
pytest_add_cli_args = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
pytest_add_cli_args_test_selection = [
    "tests/inference",
    "tests/evaluation",
    "--ignore=tests/inference/linearization/test_memory.py",
    "--deselect=tests/inference/predictive/test_arviz_export.py::test_draws_of_a_nonlinear_model_are_compared_with_the_linearized_one",
]
process_isolation = "forkserver"
track_dependencies = false
timeout_constant = 20.0
timeout_multiplier = 4.0
"""
KILLED = ("killed", "timeout", "segfault", "caught by type check")


def prepare(folder: Path) -> None:
    """A copy of what is committed, with mutmut's settings."""
    if not folder.exists():
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)  # noqa: S603, S607
    settings = folder / "pyproject.toml"
    text = settings.read_text(encoding="utf-8").partition("\n[tool.mutmut]")[0]
    settings.write_text(text + SETTINGS, encoding="utf-8")


def mutmut(folder: Path, *arguments: str, quiet: bool = False) -> str:
    """What it prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    command = [sys.executable, "-m", "mutmut", *arguments]
    output = subprocess.PIPE if quiet else None
    done = subprocess.run(command, cwd=folder, env=environment, stdout=output, text=True, check=True)  # noqa: S603
    return done.stdout or ""


def outcomes(folder: Path) -> dict[str, str]:
    """Mutant -> what became of it so far."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=400, help="mutants that are tried")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--children", type=int, default=1, help="processes at once")
    parser.add_argument("--folder", type=Path, help="of the copy; by default a temporary one")
    args = parser.parse_args()
    file = ResultFile("mutation")
    file.begin()
    with TemporaryDirectory() as scratch:
        folder = (args.folder or Path(scratch) / "copy").resolve()
        prepare(folder)
        children = ("--max-children", str(args.children))
        if not (folder / "mutants" / "mutmut-stats.json").exists():  # the first run makes all, whatever it tries
            mutmut(folder, "run", *children, "bayes_kf.files.checksums.*")
        known = outcomes(folder)
        chosen = random.Random(args.seed).sample(sorted(known), args.sample)  # noqa: S311 (no secrets)
        mutmut(folder, "run", *children, *chosen)
        found = outcomes(folder)
        for where in ("inference", "evaluation", "all"):
            tried = {name: found[name] for name in chosen if where in ("all", group(name))}
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
    write(file)


if __name__ == "__main__":
    main()
