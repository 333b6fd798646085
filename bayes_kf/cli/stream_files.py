"""Where a stream of lines is: what its folder says, how it is opened, how it is ended."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from bayes_kf.cli.posterior_folder import check_output, read_labels, recover_output
from bayes_kf.evaluation import DriftDetector
from bayes_kf.files.checksums import is_listed
from bayes_kf.inference.saving.file_names import STATE_FILE
from bayes_kf.inference.saving.file_names import STREAM_FILE as STREAM_FILE

STDIN = Path("-")


@dataclass
class Stream:
    """Where a stream is.

    Attributes:
        lines: that are behind, learned or skipped as bad.
        bad: of these, skipped.
        examples: learned.
        correct: of these, predicted rightly before they were.
        log_loss: sum of −log p(label) before that, in nats.
        alarms: lines that raised a drift alarm.
        run_length: of the detector.
        detector: its numbers.
    """

    lines: int = 0
    bad: int = 0
    examples: int = 0
    correct: int = 0
    log_loss: float = 0.0
    alarms: list[int] = field(default_factory=list)
    run_length: float = 10_000.0
    detector: list[float] | None = None

    def summary(self) -> str:
        """The counts and scores in one line of text."""
        seen = max(1, self.examples)
        scores = f"accuracy {self.correct / seen:.3f}, log loss {self.log_loss / seen:.3f} nats before learning"
        bad = f", {self.bad:,} bad lines skipped" if self.bad else ""
        return f"{self.examples:,} examples{bad}: {scores}; drift alarms: {len(self.alarms)}"


def where(args: argparse.Namespace) -> Stream | None:
    """Where an earlier run in the output folder was; None where there is none."""
    recover_output(args.output)
    if not (args.output / STATE_FILE).is_file():
        check_output(args.output)
        return None
    path = args.output / STREAM_FILE
    if not is_listed(args.output, STREAM_FILE):
        raise ValueError(
            f"`--output` must be new or a stream's, got a posterior without {STREAM_FILE} in {args.output}."
        )
    try:
        found = Stream(**json.loads(path.read_text(encoding="utf-8")))
        counts = (found.lines, found.bad, found.examples, found.correct)
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"counts must be whole numbers >= 0, not {counts}")
        found.log_loss = float(found.log_loss)
        found.alarms = [int(line) for line in found.alarms]
        DriftDetector(found.run_length, found.detector)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"`--output` must hold a sound {STREAM_FILE}, got {path}: {error}") from error
    labels = read_labels(args.output)
    if labels is None or labels.class_names != tuple(args.classes):
        names = "none" if labels is None else ", ".join(labels.class_names)
        raise ValueError(
            f"`--classes` must be those of {args.output}, which are {names}, got {', '.join(args.classes)}."
        )
    if found.run_length != args.alarm:
        raise ValueError(f"`--alarm` must be that of {args.output}, {found.run_length:g}, got {args.alarm:g}.")
    check_output(args.output)
    return found


@contextlib.contextmanager
def opened(path: Path) -> Iterator[TextIO]:
    """Lines of a file, or of standard input."""
    if path == STDIN:
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")  # type: ignore[union-attr]
        yield sys.stdin
        return
    with path.open(encoding="utf-8") as file:
        yield file


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """A request to end (SIGTERM) ends like Ctrl-C: with a checkpoint."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
