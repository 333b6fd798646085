"""Rows of .csv and .tsv files."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path


def read_csv(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line numbers and rows. Blank lines are skipped.

    Raises:
        ValueError: if a line and the header differ in the number of fields, or the header names a column twice.
        csv.Error: if the file is not a CSV file.
        UnicodeDecodeError: if the file is not UTF-8.
    """
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise ValueError(f"`path` must name each column once, got {', '.join(header)} in {file}.")
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(header):
                raise ValueError(
                    f"`path` must have the header's {len(header)} fields in every line,"
                    f" got {len(fields)} in line {reader.line_num} of {file}."
                )
            yield reader.line_num, dict(zip(header, fields, strict=True))
