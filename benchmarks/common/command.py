"""The command line that the benchmarks share, and the loop over the cells of a results file.

Example:
    >>> command = Command("A benchmark.").names("--data", ("usps", "digits")).seeds(3).redo().table()
    >>> args = command.parse(["--seeds", "2"])
    >>> args.data, args.seeds, args.redo, args.table
    (['usps', 'digits'], [0, 1], None, False)
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from benchmarks.common import result_files
from benchmarks.common.result_files import ResultFile

Cell = dict[str, Any]


class Command:
    """The options of a benchmark; every method adds one and returns the command.

    Every benchmark has ``--results`` and ``--threads``.

    Args:
        description: the script's docstring.
        threads: that torch uses by default.
    """

    def __init__(self, description: str | None, threads: int = 1) -> None:
        style = argparse.RawDescriptionHelpFormatter
        self.parser = argparse.ArgumentParser(description=description, formatter_class=style)
        self.option("--results", type=Path, metavar="FOLDER", help="folder of the results (benchmarks/results)")
        self.option("--threads", type=int, default=threads, help="threads of torch (%(default)s)")

    def option(self, *names: str, **settings: Any) -> Command:
        """Any option; arguments are those of ``ArgumentParser.add_argument``."""
        self.parser.add_argument(*names, **settings)
        return self

    def names(
        self, option: str, allowed: Iterable[str], default: Iterable[str] | None = None, text: str = ""
    ) -> Command:
        """One or several of the ``allowed`` names; all of them by default."""
        allowed = list(allowed)
        shown = f"{text or 'what to run'} (all)" if default is None else text or None
        chosen = allowed if default is None else list(default)
        return self.option(
            option, nargs="+", choices=allowed, default=chosen, metavar="NAME", help=_listing(shown, allowed)
        )

    def numbers(self, option: str, default: Sequence[int], text: str) -> Command:
        """One or several whole numbers."""
        return self.option(
            option, nargs="+", type=int, default=list(default), metavar="N", help=f"{text} (%(default)s)"
        )

    def seeds(self, number: int) -> Command:
        """The seeds: a number N means 0 to N − 1, a list such as ``0,2`` means these."""
        text = f"number of seeds, or a list of them as 0,2 ({number})"
        return self.option("--seeds", type=seeds_of, default=seeds_of(str(number)), metavar="N", help=text)

    def limit(self, text: str, default: int | None = None) -> Command:
        """The largest number of examples; a shorter stream has a results file of its own."""
        return self.option("--limit", type=int, default=default, metavar="N", help=f"{text} ({default or 'all'})")

    def redo(self) -> Command:
        """Cells to run again: those whose key matches a regular expression, or all."""
        text = "run cells again whose key matches; all without a REGEX"
        return self.option("--redo", nargs="?", const="", metavar="REGEX", help=text)

    def table(self) -> Command:
        """Whether to run nothing and to write the table from the results that exist."""
        return self.option("--table", action="store_true", help="run nothing; write the table from existing results")

    def hidden(self, *names: str, **settings: Any) -> Command:
        """Options that the benchmark gives to its own subprocesses."""
        for name in names:
            self.option(name, help=argparse.SUPPRESS, **settings)
        return self

    def parse(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """The parsed options; threads and the folder of the results are set."""
        args = self.parser.parse_args(arguments)
        torch.set_num_threads(args.threads)
        if args.results is not None:
            result_files.RESULTS = args.results
        return args


def run_cells(
    file: ResultFile,
    cells: Mapping[str, Callable[[], Cell]],
    redo: str | None = None,
    show: Callable[[Cell], str] = str,
    is_stale: Callable[[str, Cell], bool] = lambda key, cell: False,
) -> int:
    """The number of cells that were run: those that are missing, stale or to be run again. Each is written at once.

    Args:
        file: the results.
        cells: key -> function that measures.
        redo: regular expression of the keys to run again; None: none.
        show: a measured cell in one line.
        is_stale: whether an existing cell no longer fits today's settings.
    """
    file.begin()
    due = [key for key in cells if is_due(file, key, redo) or is_stale(key, file.cells[key])]
    for key in tqdm(due, unit="cell", disable=not sys.stderr.isatty()):
        file.put(key, cells[key]())
        tqdm.write(f"{key}: {show(file.cells[key])}", file=sys.stderr)
    return len(due)


def is_due(file: ResultFile, key: str, redo: str | None) -> bool:
    """Whether a cell is missing, or matches the regular expression of those to run again."""
    return key not in file.cells or (redo is not None and re.search(redo, key) is not None)


def seeds_of(text: str) -> list[int]:
    """The seeds that a number or a list means.

    Example:
        >>> seeds_of("3"), seeds_of("0,2"), seeds_of("2,")
        ([0, 1, 2], [0, 2], [2])
    """
    parts = [int(part) for part in text.split(",") if part]
    return parts if "," in text else list(range(parts[0]))


def _listing(text: str | None, allowed: Sequence[str]) -> str:
    return f"{text}: {', '.join(allowed)}" if text else ", ".join(allowed)
