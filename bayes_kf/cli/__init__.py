"""The command line: ``bayes-kf fit``, ``evaluate`` and ``compare``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

from bayes_kf.cli.parser import build_parser

BAD_INPUT, INTERRUPTED = 2, 130

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status of a command: 0, 2 after one line on stderr about bad input, or 130 after an interrupt.

    Args:
        argv: the arguments; None: those of the process.
    """
    args = build_parser().parse_args(argv)
    from bayes_kf.cli.commands import COMMANDS  # --help and bad arguments do not wait for PEFT
    from bayes_kf.models.zoo import quiet_transformers

    with warnings.catch_warnings(), quiet_transformers():
        warnings.simplefilter("ignore", FutureWarning)  # libraries address them to their callers, not to users
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.showwarning = _print_warning
        try:
            COMMANDS[args.command](args)
        except (ValueError, OSError, ArithmeticError, ImportError, MemoryError, RuntimeError) as error:
            print(f"bayes-kf: error: {_one_line(error)}", file=sys.stderr)
            return BAD_INPUT
        except KeyboardInterrupt:
            print("bayes-kf: interrupted", file=sys.stderr)
            return INTERRUPTED
    return 0


def _one_line(error: BaseException) -> str:
    """The message in one line. Errors not written for users, such as those of torch, have their class name in front."""
    text = " ".join(str(error).split())
    names_class = isinstance(error, RuntimeError | MemoryError) or not text
    return f"{type(error).__name__}: {text}" if names_class else text


def _print_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning as one line on stderr."""
    print(f"bayes-kf: warning: {' '.join(str(message).split())}", file=sys.stderr)
