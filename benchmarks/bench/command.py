"""The command line that both benches share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.bench.networks.base import KINDS
from benchmarks.bench.registry.optimizers import Row, found_rows
from benchmarks.bench.registry.problems import Problem, found_problems
from benchmarks.bench.runner import Plan, run
from benchmarks.bench.tables.entries import write_csv
from benchmarks.common import result_files
from benchmarks.common.result_files import ResultFile


def main(
    bench: ModuleType,
    title: str,
    description: str | None,
    render: Callable[..., list[str]],
    draw: Callable[..., None],
    arguments: list[str] | None = None,
) -> None:
    """Run what is missing, and write table, figure and CSV from what is there.

    Args:
        bench: the online or the optimizer bench.
        title: of the table.
        description: of the command.
        render: cells, rows and problems as Markdown.
        draw: the figure.
        arguments: in place of the command line's.

    Raises:
        SystemExit: with one sentence where data or weights are not there.
    """
    args = parser(bench, description).parse_args(arguments)
    torch.set_num_threads(1)
    if args.results is not None:
        result_files.RESULTS = args.results
    rows, problems = chosen(args, bench)
    marks = [
        f"limit{args.limit}" * bool(args.limit),
        args.adapter or "",
        args.backbone or "",
        "random" * args.random_weights,
    ]
    file = ResultFile("-".join([f"bench_{bench.NAME}", *filter(None, marks)]))
    if not args.table:
        adamw = found_rows(bench.NAME).get("adamw")
        try:
            run(Plan(bench, rows, problems, args.seeds, adamw, args.limit, args.adapter, args.redo), file)
        except FileNotFoundError as error:  # data or weights
            raise SystemExit(str(error)) from error
    everything = argparse.Namespace(**vars(args) | {"rows": None, "problems": None})
    rows, problems = chosen(everything, bench, every=True)
    body = [line.replace("{stem}", file.path.stem) for line in render(file.cells, rows, problems)]
    print(file.write_markdown(title, body))
    write_csv(file.path.with_suffix(".csv"), file.cells)
    draw(file.cells, rows, problems, file.path.with_suffix(".png"))


def chosen(args: Any, bench: ModuleType, every: bool = False) -> tuple[list[Row], list[Problem]]:
    """Rows and problems that the command line names; by default all that belong to the bench, or all there are.

    Raises:
        SystemExit: for a name that there is not, as argparse does.
    """
    rows = found_rows(bench.NAME, args.extra)
    problems = found_problems(args.extra, args.backbone, args.random_weights)
    own = {name: problem for name, problem in problems.items() if every or bench.NAME in problem.sizes}
    return _named("rows", args.rows, rows, rows), _named("problems", args.problems, problems, own)


def _named(option: str, names: list[str] | None, known: dict[str, Any], default: dict[str, Any]) -> list[Any]:
    if names is None:
        return list(default.values())
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"`--{option}` must be among {', '.join(known)}; got {', '.join(unknown)}.")
    return [known[name] for name in names]


def parser(bench: ModuleType, description: str | None) -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--problems", nargs="+", metavar="NAME", help="files of benchmarks/bench/problems")
    found.add_argument("--rows", nargs="+", metavar="NAME", help="files of benchmarks/bench/optimizers, in this order")
    found.add_argument("--seeds", type=int, default=3, help="number of seeds")
    found.add_argument("--limit", type=int, help="examples of any stream at most; results go to a file of their own")
    found.add_argument("--adapter", choices=KINDS, help="for every row that takes it, in a file of its own")
    found.add_argument("--backbone", help="network in place of the problems' own, as densenet121 or roberta-base")
    found.add_argument("--random-weights", action="store_true", help="networks that were not trained, to try the code")
    found.add_argument("--extra", type=Path, help="a folder with further `optimizers` or `problems`")
    found.add_argument("--results", type=Path, help="folder of the results; by default benchmarks/results")
    found.add_argument("--redo", action="store_true", help="run again what is already there")
    found.add_argument("--table", action="store_true", help="run nothing; write table, figure and CSV again")
    return found
