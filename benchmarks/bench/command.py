"""The command line of both loops of the bench."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.bench.networks.base import KINDS
from benchmarks.bench.registry.optimizers import Row, found_rows
from benchmarks.bench.registry.problems import Problem, found_problems
from benchmarks.bench.runner import Plan, run
from benchmarks.bench.tables.entries import write_csv
from benchmarks.common.command import Command
from benchmarks.common.result_files import ResultFile


def main(
    bench: ModuleType,
    title: str,
    description: str | None,
    render: Callable[..., list[str]],
    draw: Callable[..., None],
    arguments: Sequence[str] | None = None,
) -> None:
    """Run the missing cells, and write table, figure and CSV of all cells.

    Args:
        bench: the module ``online`` or ``epochs``.
        title: of the table.
        description: of the command.
        render: returns cells, rows and problems as Markdown.
        draw: writes the figure.
        arguments: in the place of the command line's.

    Raises:
        SystemExit: with one sentence, if data or weights are missing.
    """
    args = parse(description, arguments)
    rows, problems = chosen(args, bench)
    marks = [f"limit{args.limit}" * bool(args.limit), args.adapter or "", args.backbone or ""]
    marks.append("random" * args.random_weights)
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
    """Rows and problems that the command line names; by default all of the bench, or with ``every`` all that exist.

    Raises:
        SystemExit: for an unknown name, as argparse does.
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


def parse(description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options. ``--rows`` and ``--problems`` may also name files in ``--extra``, so they are checked later."""
    command = Command(description).seeds(3).limit("examples of any stream; results have a file of their own")
    command.option("--problems", nargs="+", metavar="NAME", help="files of benchmarks/bench/problems")
    command.option("--rows", nargs="+", metavar="NAME", help="files of benchmarks/bench/optimizers, in this order")
    command.option("--adapter", choices=KINDS, help="for every row that accepts it; results have a file of their own")
    command.option("--backbone", help="network in the place of the problems' own, as densenet121 or roberta-base")
    command.option("--random-weights", action="store_true", help="untrained networks, to try the code")
    command.option("--extra", type=Path, help="a folder with further `optimizers` or `problems`")
    return command.redo().table().parse(arguments)
