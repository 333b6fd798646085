"""Posteriors on many data sets: the half for development, and the half that is sealed until the end.

Classifications of images and texts with pre-trained networks, and regressions from scratch. Rows: AdamW as careful
practitioners use it (``strong.py``), an ensemble of three such runs, scikit-learn's models for regressions, and this
package. ``benchmarks/bench/registry/data_split.py`` says how the data sets were split, before any row ran on them.
Sealed sets are refused without ``--open-sealed``; they are opened once, and their table is printed as it comes. Every
cell runs in its own process, and is written when it is measured. Data and weights as for ``quality.run``.

    python -m benchmarks.quality.split.run                                  # development sets; a stopped run continues
    python -m benchmarks.quality.split.run --data fashion trec6 boston --rows strong default --seeds 1
    python -m benchmarks.quality.split.run --table                          # the table from existing results
    python -m benchmarks.quality.split.run --keep-default-as 0.1            # before the default changes: keep its cells
    python -m benchmarks.quality.split.run --open-sealed                    # once, at the end
    python -m benchmarks.quality.split.run --open-sealed 2                  # once: the second sealed sets
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.bench.registry.data_split import part
from benchmarks.common.command import Command, run_cells
from benchmarks.common.data import REPOSITORY
from benchmarks.common.result_files import ResultFile
from benchmarks.common.subprocesses import alarmed, run_in_process
from benchmarks.quality.split import regression_rows, rows
from benchmarks.quality.split.cells import PROBLEMS, measure, rows_of
from benchmarks.quality.split.table import render

ROWS = tuple(dict.fromkeys([*rows.ROWS, *regression_rows.ROWS]))


def run(data: str, row: str, seed: int, cap: float, commit: str) -> dict[str, Any]:
    """A measured cell, with the commit of the code."""
    cell = run_in_process(measure, data, row, seed, cap)
    if isinstance(cell, dict):
        return cell | {"commit": commit}
    if cell > 0:  # an error of a row is its result; this one is ours
        raise RuntimeError(f"the process of {data}/{row}/{seed} ended with {cell}")
    return {"skipped": f"more than {cap:g} s" if alarmed(cell) else f"ended with {cell}", "commit": commit}


def checked_data(names: Sequence[str] | None, open_sealed: int) -> list[str]:
    """The data sets to run: those named, or all of one part of the split.

    Raises:
        SystemExit: if a sealed set is named without ``--open-sealed``, or a development set with it.
    """
    allowed = [name for name, problem in PROBLEMS.items() if problem.sealed == open_sealed]
    if wrong := [name for name in names or () if name not in allowed]:
        if open_sealed:
            which = part(open_sealed)
            raise SystemExit(f"`--data` must name {which} sets with `--open-sealed`, got {', '.join(wrong)}.")
        raise SystemExit(
            f"`--data` must name development sets, got {', '.join(wrong)}: sealed sets are opened once, at the end,"
            " with `--open-sealed`."
        )
    return list(names or allowed)


def keep_default(file: ResultFile, name: str) -> int:
    """The number of cells of the row ``default`` that get the name ``default-NAME``, beside which it is measured again.

    Raises:
        SystemExit: if there are cells of that name.
    """
    if not re.fullmatch(r"[\w.]+", name):
        raise SystemExit(f"`--keep-default-as` must be letters, digits, dots and underscores, got {name!r}.")
    kept = {key.replace("/default/", f"/default-{name}/"): key for key in file.cells if "/default/" in key}
    if taken := [key for key in kept if key in file.cells]:
        raise SystemExit(f"`--keep-default-as` must be a new name, got {name}, which {len(taken)} cells have.")
    for new, old in kept.items():
        file.cells[new] = file.cells.pop(old)
    file.save()
    return len(kept)


def commit() -> str:
    """The commit of the code, with "-dirty" if other files than results differ from it; "unknown" without Git."""
    head = _git("rev-parse", "--short", "HEAD")
    if head.returncode:
        return "unknown"
    changed = _git("diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/results").returncode
    return head.stdout.strip() + "-dirty" * bool(changed)


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)  # noqa: S603, S607


def show(cell: Mapping[str, Any]) -> str:
    """A measured cell in one line."""
    names = ("accuracy", "rmse", "nll", "ece", "ood_auroc", "coverage_90", "seconds", "predict_seconds")
    return cell.get("skipped") or "  ".join(f"{name} {cell[name]:.4f}" for name in names if name in cell)


def main() -> None:
    """The command line."""
    command = Command(__doc__).names("--rows", ROWS, text="rows; each where it applies").seeds(3)
    command.option("--data", nargs="+", choices=list(PROBLEMS), metavar="NAME", help="data sets (all of one part)")
    text = "run the sealed sets, 2: the second ones; once, when no setting is left to choose"
    command.option("--open-sealed", nargs="?", type=int, const=1, default=0, choices=(1, 2), help=text)
    command.option("--keep-default-as", metavar="NAME", help="run nothing; rename the row default to default-NAME")
    command.option("--cap", type=float, default=1800.0, help="seconds that a cell may take (%(default)s)")
    args = command.redo().table().parse()
    data = checked_data(args.data, args.open_sealed)
    file = ResultFile(f"quality_{part(args.open_sealed)}".replace(" ", "_"))
    if args.keep_default_as is not None:
        print(f"{keep_default(file, args.keep_default_as)} cells have a new name.")
    elif not args.table:
        version = commit()
        places = [(d, row, seed) for seed in args.seeds for d in data for row in args.rows if row in rows_of(d)]
        work = {f"{d}/{row}/{seed}": partial(run, d, row, seed, args.cap, version) for d, row, seed in places}
        run_cells(file, work, args.redo, show)
    title = f"How good the posteriors are: {part(args.open_sealed)} sets"
    print(file.write_markdown(title, render(file.cells, PROBLEMS, args.open_sealed)))


if __name__ == "__main__":
    main()
