"""Labelled text from CSV or JSON lines, in batches for a transformers model."""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bayes_kf.data.csv_rows import read_csv
from bayes_kf.data.labels import LabelledData, encode_labels, make_loader

TEXT_SUFFIXES = (".csv", ".tsv", ".jsonl")


def text_data(
    path: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase,
    *,
    class_names: Sequence[str] | None = None,
    text_column: str = "text",
    label_column: str = "label",
    numeric: bool = False,
    max_length: int = 512,
    batch_size: int = 1,
    shuffle: bool = False,
    seed: int = 0,
) -> LabelledData:
    """Batches that are mappings (input_ids, attention_mask, ..., labels) from a `.csv`, `.tsv` or `.jsonl` file.

    Files are UTF-8. The first line of a CSV or TSV file names its columns; a JSON-lines file has one object per line.

    Args:
        path: the file.
        tokenizer: a tokenizer, or a Hugging Face model folder with one.
        class_names: the classes in order; None: the sorted distinct labels (see `encode_labels`).
        text_column: name of the text column.
        label_column: name of the column of labels, which are integers or strings.
        numeric: whether the labels are regression targets, in float32.
        max_length: most tokens of a text; longer texts are truncated.
        batch_size: examples per batch, padded to the longest.
        shuffle: whether every pass has a new random order.
        seed: seed of the order.

    Returns:
        The loader and the class names; no names if `numeric`.

    Raises:
        ValueError: if the file or the tokenizer cannot be read, a column is missing or a label is unknown. The message
            gives the line if there is one.
    """
    file = Path(path)
    texts, labels = _read_columns(file, text_column, label_column)
    try:
        targets, names = (_numbers(labels), ()) if numeric else encode_labels(labels, class_names)
    except ValueError as error:
        raise ValueError(f"{str(error).removesuffix('.')} of column {label_column!r} in {file}.") from error
    collate = _collate(text_tokenizer(tokenizer), max_length)
    rows = [(text, target) for text, target in zip(texts, targets, strict=True)]
    return LabelledData(make_loader(rows, batch_size, shuffle, seed, collate), names)  # type: ignore[arg-type]


def text_tokenizer(source: str | os.PathLike[str] | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer with a padding token: ``source``, or the tokenizer in that folder."""
    if isinstance(source, PreTrainedTokenizerBase):
        tokenizer = source
    else:
        if not Path(source).is_dir():
            raise ValueError(f"`tokenizer` must be a Hugging Face model folder with a tokenizer, got {source}.")
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(source), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"`tokenizer` must be a Hugging Face model folder with a tokenizer, got {source}: {error}."
            ) from error
    if tokenizer.pad_token is None:
        raise ValueError(f"`tokenizer` must have a padding token, got {type(tokenizer).__name__} without one.")
    return tokenizer


def _collate(
    tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Callable[[list[tuple[str, torch.Tensor]]], Mapping[str, torch.Tensor]]:
    """A function from (text, target) pairs to a padded batch with `labels`."""

    def collate(rows: list[tuple[str, torch.Tensor]]) -> Mapping[str, torch.Tensor]:
        texts, targets = zip(*rows, strict=True)
        batch = tokenizer(list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        return {**batch, "labels": torch.stack(targets)}

    return collate


def _numbers(labels: Sequence[int | float | str]) -> torch.Tensor:
    """Finite regression targets (N,) in float32."""
    values = []
    for position, label in enumerate(labels):
        try:
            values.append(float(label))
        except ValueError as error:
            raise ValueError(f"`labels` must be numbers, got {label!r} at position {position}.") from error
    numbers = torch.tensor(values, dtype=torch.float32)
    if not numbers.isfinite().all():
        raise ValueError(f"`labels` must be finite, got {numbers[~numbers.isfinite()][0].item()}.")
    return numbers


def _read_columns(file: Path, text_column: str, label_column: str) -> tuple[list[str], list[Any]]:
    """The texts and labels of a file."""
    texts: list[str] = []
    labels: list[Any] = []
    with naming_unreadable(file):
        for line, row in read_rows(file):
            for option, column in (("text_column", text_column), ("label_column", label_column)):
                if column not in row:
                    columns = ", ".join(map(str, row))
                    raise ValueError(
                        f"`{option}` must be a column of {file}, got {column!r}; line {line} has {columns}."
                    )
            text, label = row[text_column], row[label_column]
            if not isinstance(text, str):
                raise ValueError(f"`path` must hold text in column {text_column!r}, got {text!r} in line {line}.")
            if not isinstance(label, str | int | float) or str(label).strip() == "":
                raise ValueError(f"`path` must hold a label in column {label_column!r}, got {label!r} in line {line}.")
            texts.append(text)
            labels.append(label)
    if not texts:
        raise ValueError(f"`path` must hold at least one row, got none in {file}.")
    return texts, labels


def read_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and rows of a `.jsonl`, `.csv` or `.tsv` file."""
    yield from read_json_lines(file) if file.suffix == ".jsonl" else read_csv(file)


@contextlib.contextmanager
def naming_unreadable(file: Path) -> Iterator[None]:
    """Errors of a file that cannot be read name ``path``."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"`path` must be UTF-8 text, got byte {error.object[error.start]:#04x} in {file}.") from error
    except (OSError, csv.Error) as error:
        raise ValueError(f"`path` must be a readable file, got {file}: {error}.") from error


def read_json_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects; blank lines are skipped."""
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"`path` must hold one JSON object per line, got {error} in line {number}.") from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"`path` must hold one JSON object per line, got {type(row).__name__} in line {number}."
                )
            yield number, row
