"""The position and scores of a stream of lines, its saved file, and its input."""

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
    """Position and scores of a stream.

    Attributes:
        lines: number of processed lines, learned or skipped.
        bad: number of bad lines, which were skipped.
        examples: number of learned examples.
        correct: number of examples predicted correctly before their update.
        log_loss: sum of −log p(label) before each update, in nats.
        alarms: numbers of the lines that raised a drift alarm.
        run_length: run length of the drift detector.
        detector: state of the drift detector.
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
        count = max(1, self.examples)
        scores = f"accuracy {self.correct / count:.3f}, log loss {self.log_loss / count:.3f} nats before learning"
        bad = f", {self.bad:,} bad lines skipped" if self.bad else ""
        return f"{self.examples:,} examples{bad}: {scores}; drift alarms: {len(self.alarms)}"


def read_stream(args: argparse.Namespace) -> Stream | None:
    """The stream of an earlier run in the output folder; None if there is none.

    Raises:
        ValueError: if the folder holds other files, a damaged stream, or a stream with other classes or alarm.
    """
    recover_output(args.output)
    if not (args.output / STATE_FILE).is_file():
        check_output(args.output)
        return None
    path = args.output / STREAM_FILE
    if not is_listed(args.output, STREAM_FILE):
        raise ValueError(
            f"`--output` must be new or hold a stream, got a posterior without {STREAM_FILE} in {args.output}."
        )
    try:
        stream = Stream(**json.loads(path.read_text(encoding="utf-8")))
        counts = (stream.lines, stream.bad, stream.examples, stream.correct)
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"counts must be whole numbers >= 0, not {counts}")
        stream.log_loss = float(stream.log_loss)
        stream.alarms = [int(line) for line in stream.alarms]
        DriftDetector(stream.run_length, stream.detector)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"`--output` must hold a sound {STREAM_FILE}, got {path}: {error}") from error
    labels = read_labels(args.output)
    if labels is None or labels.class_names != tuple(args.classes):
        names = "none" if labels is None else ", ".join(labels.class_names)
        raise ValueError(
            f"`--classes` must be those of {args.output}, which are {names}, got {', '.join(args.classes)}."
        )
    if stream.run_length != args.alarm:
        raise ValueError(f"`--alarm` must be that of {args.output}, {stream.run_length:g}, got {args.alarm:g}.")
    check_output(args.output)
    return stream


@contextlib.contextmanager
def open_lines(path: Path) -> Iterator[TextIO]:
    """The lines of a file, or of standard input."""
    if path == STDIN:
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")  # type: ignore[union-attr]
        yield sys.stdin
        return
    with path.open(encoding="utf-8") as file:
        yield file


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt inside, as Ctrl-C does, so the run saves a checkpoint."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # Python sets signal handlers only in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
