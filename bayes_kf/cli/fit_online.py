"""``bayes-kf fit --online``: learns labelled texts one at a time from a pipe or a file, one JSON object per line.

Every checkpoint replaces the posterior and ``stream.json`` (number of processed lines, sums of scores, drift detector)
in one atomic step. If you start the command again with the same lines, it skips the processed ones, and the result
equals that of an uninterrupted run to the bit. The exception is a first run with fewer than ``SCALE_EXAMPLES`` lines:
the scale of the prior stays the one measured on them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor
from tqdm.auto import tqdm

from bayes_kf.cli.base_model import BaseModel, load_base, model_folder, restore_head
from bayes_kf.cli.config_flags import read_settings
from bayes_kf.cli.inputs import move, read_device
from bayes_kf.cli.lora_adapters import add_adapter
from bayes_kf.cli.posterior_folder import Labels, read_new_head, save_posterior
from bayes_kf.cli.stream_files import STDIN, STREAM_FILE, Stream, open_lines, read_stream, sigterm_as_interrupt
from bayes_kf.data import encode_labels
from bayes_kf.data.text import text_tokenizer
from bayes_kf.evaluation import DriftDetector
from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import DivergenceError, FilterState
from bayes_kf.inference.fitting.checkpointing import SINGLE_PASS
from bayes_kf.inference.fitting.loader import SCALE_EXAMPLES
from bayes_kf.inference.fitting.progress import shows_progress
from bayes_kf.inference.fitting.selection.filter_bank import Bank, candidates
from bayes_kf.inference.posterior import Posterior
from bayes_kf.models.batch import Inputs


class BadLine(ValueError):
    """A line that is not a labelled text."""


class Line(NamedTuple):
    """The number, text and label index of a line; ``text`` is None for a bad line."""

    number: int
    text: str | None
    label: int = -1


def run_online(args: argparse.Namespace) -> None:
    """``bayes-kf fit --online``."""
    _check(args)
    settings, labels = read_settings(args), Labels(tuple(args.classes), len(args.classes))
    for name, plain in SINGLE_PASS.items():
        if name != "tune" and getattr(settings, name) != plain:
            raise ValueError(f"`--online` learns in one pass, with `{name}` {plain}, got {getattr(settings, name)!r}.")
    folder, device = model_folder(args.model), read_device(args.device)
    stream = read_stream(args)
    base = load_base(folder, "text", labels.num_outputs, settings.seed, args.dtype)
    if stream is not None:
        restore_head(base, read_new_head(args.output), args.output)
    model = move(add_adapter(base, args, settings.seed), device)
    tokenizer, kf, posterior = text_tokenizer(folder), KalmanFilter(model, settings), None
    if stream is not None:
        posterior = Posterior.from_pretrained(args.output, model)
        possible = [settings] if settings.tune is None else candidates(settings, settings.tune)
        changed = min((config.differences(posterior.config) for config in possible), key=len)
        if changed:
            raise ValueError(f"`--output` must hold a stream of the same settings, got another {', '.join(changed)}.")
    learner = _Learner(args, base, labels, tokenizer, kf, posterior, stream or Stream(run_length=args.alarm))
    with open_lines(args.data) as lines, sigterm_as_interrupt():
        learner.run(lines)


class Snapshot(NamedTuple):
    """The stream and the state after a line. One assignment replaces both, so no save mixes two lines."""

    stream: Stream
    state: FilterState | None


class _Learner:
    """Reads lines, updates the filter and the drift detector, and saves checkpoints."""

    def __init__(
        self,
        args: argparse.Namespace,
        base: BaseModel,
        labels: Labels,
        tokenizer: Any,
        kf: KalmanFilter,
        posterior: Posterior | None,
        stream: Stream,
    ) -> None:
        self.args, self.base, self.labels, self.tokenizer = args, base, labels, tokenizer
        self.kf = kf if posterior is None else posterior.kf
        self.snapshot = Snapshot(stream, None if posterior is None else posterior.state)
        self.detector = DriftDetector(stream.run_length, stream.detector)
        tuning = kf.config.tune_examples if kf.config.tune is not None else 0
        self._needed = max(SCALE_EXAMPLES, tuning)  # lines to collect before the first update
        self._saved = stream.lines

    def run(self, lines: TextIO) -> None:
        """Learn all lines. An error or an interrupt saves the lines learned so far."""
        waiting: list[Line] = []  # until they suffice to choose settings and to measure the scale of the prior
        shown = shows_progress(False if self.args.quiet else None)
        bar = tqdm(unit="example", initial=self.snapshot.stream.examples, disable=not shown)
        try:
            with bar:
                for line in self._unprocessed(lines):
                    waiting.append(line)
                    if self.snapshot.state is not None or len(_texts(waiting)) >= self._needed:
                        self._learn_all(waiting, bar)
                self._learn_all(waiting, bar)
        except BadLine as error:
            self._learn_all(waiting, bar)
            raise ValueError(f"{error} The lines before it are saved in {self.args.output}.") from error
        finally:
            self._save()
        if not self.args.quiet:
            print(self.snapshot.stream.summary())

    def _unprocessed(self, lines: TextIO) -> Iterator[Line]:
        """The lines that are neither learned nor skipped yet, without blank lines."""
        for number, line in enumerate(lines, 1):
            if number <= self.snapshot.stream.lines or not line.strip():
                continue
            try:
                parsed = Line(number, *self._parse(number, line))
            except BadLine as error:
                if not self.args.skip_bad:
                    raise
                tqdm.write(f"bayes-kf: warning: {error}", file=sys.stderr)
                parsed = Line(number, None)
            yield parsed

    def _parse(self, number: int, line: str) -> tuple[str, int]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadLine(f"`--data` must hold one JSON object per line, got {error} in line {number}.") from error
        columns = {"--text-column": self.args.text_column, "--label-column": self.args.label_column}
        for option, column in columns.items():
            if not isinstance(row, dict) or column not in row:
                raise BadLine(f"`{option}` must be in every line, got none called {column!r} in line {number}.")
        text, label = row[self.args.text_column], row[self.args.label_column]
        if not isinstance(text, str) or not isinstance(label, str | int):
            raise BadLine(f"`--data` must hold text and a label, got {text!r} and {label!r} in line {number}.")
        try:
            return text, int(encode_labels([label], self.labels.class_names)[0])
        except ValueError as error:
            raise BadLine(
                f"`--classes` must hold every label, got {label!r} in line {number}; they are "
                f"{', '.join(self.labels.class_names)}."
            ) from error

    def _learn_all(self, waiting: list[Line], bar: Any) -> None:
        """Learn the waiting lines and remove them from the list."""
        texts = _texts(waiting)[:SCALE_EXAMPLES]
        if self.snapshot.state is None and texts:
            if self.kf.config.tune is not None:
                self.kf = self._select_filter(waiting, self._tokens(texts))
            self.snapshot = Snapshot(self.snapshot.stream, self.kf.init(self._tokens(texts)))
        while waiting:
            line = waiting.pop(0)
            if line.text is None:
                stream = self.snapshot.stream
                self.snapshot = Snapshot(replace(stream, lines=line.number, bad=stream.bad + 1), self.snapshot.state)
                continue
            self._learn(line.number, line.text, line.label)
            bar.update()
            bar.set_postfix_str(self.snapshot.stream.summary(), refresh=False)
            if self.snapshot.stream.lines - self._saved >= self.args.checkpoint_every:
                self._save()

    def _select_filter(self, lines: Sequence[Line], scaling: Inputs) -> KalmanFilter:
        """The filter with the least prequential log loss on the first lines, as in ``fit``."""
        config = self.kf.config
        assert config.tune is not None
        bank = Bank(self.kf.adapter, candidates(config, config.tune), config.tune_margin)
        state, burnt_in = bank.init(scaling), None
        labelled = [line for line in lines if line.text is not None][: config.tune_examples]
        for num_learned, line in enumerate(labelled):
            if burnt_in is None and num_learned >= config.tune_burn_in * config.tune_examples:
                burnt_in = state
            assert line.text is not None
            try:
                state, _ = bank.update(state, self._tokens([line.text]), torch.tensor([line.label]))
            except DivergenceError as error:
                raise ValueError(_divergence_message(line.number, error)) from error
        return bank.filters[bank.best(state, burnt_in)]

    def _learn(self, number: int, text: str, label: int) -> None:
        """Predict a line, then update the filter and the drift detector with it."""
        stream, state = self.snapshot
        assert state is not None  # the prior, at least
        inputs, targets = self._tokens([text]), torch.tensor([label])
        log_prob = Posterior(self.kf, state).predict(inputs, targets=targets).log_prob
        assert log_prob is not None  # targets were given
        try:
            state, info = self.kf.update(state, inputs, targets)
        except DivergenceError as error:
            raise ValueError(_divergence_message(number, error)) from error
        assert info.correct is not None  # a classifier
        alarm = self.detector.update(min(1.0, float(log_prob.exp())), self.labels.num_outputs)
        stream = replace(
            stream,
            lines=number,
            examples=stream.examples + 1,
            correct=stream.correct + int(info.correct.sum()),
            log_loss=stream.log_loss - float(log_prob),
            alarms=stream.alarms + [number] * alarm,
            detector=self.detector.current,
        )
        self.snapshot = Snapshot(stream, state)
        if alarm:
            tqdm.write(f"drift alarm at line {number}: labels have become unlikelier than predicted", file=sys.stdout)
            sys.stdout.flush()

    def _tokens(self, texts: list[str]) -> Inputs:
        options = {"padding": True, "truncation": True, "max_length": self.args.max_length, "return_tensors": "pt"}
        tokens: dict[str, Tensor] = dict(self.tokenizer(texts, **options))
        return tokens

    def _save(self) -> None:
        """Save a checkpoint if there are new lines since the last one."""
        stream, state = self.snapshot
        if state is None or stream.lines == self._saved:
            return
        content = json.dumps(asdict(stream), indent=2) + "\n"
        posterior = Posterior(self.kf, state)
        save_posterior(posterior, self.args.output, self.labels, self.base.new_head, {STREAM_FILE: content})
        self._saved = stream.lines


def _divergence_message(number: int, error: DivergenceError) -> str:
    return f"`--data` must not make the filter diverge, got line {number}: {error}."


def _texts(lines: Sequence[Line]) -> list[str]:
    return [line.text for line in lines if line.text is not None]


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that ``--online`` excludes, or that it needs and that are missing."""
    if args.data != STDIN and args.data.suffix != ".jsonl":
        raise ValueError(f"`--data` must be a .jsonl file or - with --online, got {args.data}.")
    if not args.classes or len(set(args.classes)) < max(2, len(args.classes)):
        raise ValueError(f"`--classes` must name at least two different classes, got {args.classes or 'none'}.")
    if args.checkpoint_every < 1:
        raise ValueError(f"`--checkpoint-every` must be at least 1, got {args.checkpoint_every}.")
    if not args.alarm > 1:
        raise ValueError(f"`--alarm` must be greater than 1, got {args.alarm!r}.")
    if args.batch_size != 1 or args.start != "prior":
        given = f"--batch-size {args.batch_size} and --start {args.start}"
        raise ValueError(f"`--online` learns one example at a time from the prior, got {given}.")
