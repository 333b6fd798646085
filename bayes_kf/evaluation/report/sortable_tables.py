"""Tables as the page shows them: text in cells, beside it the number that sorts them."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

MISSING = ("", "not defined", "–", "—")
NUMBER = re.compile(
    r"(?:[<>≈] ?)?"
    r"(?P<sign>[+−-]?)(?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|∞)(?:[eE](?P<power>[+−-]?\d+))?"
    r"(?: ?%)?"
    r"(?: (?:to|±|\().*)?"  # the further end of an interval
)


class Cell(NamedTuple):
    """What a cell shows."""

    text: str
    value: str = ""  # the number that sorts it, as JavaScript reads it; none where it is not defined
    note: str = ""
    is_outside: bool = False


class Column(NamedTuple):
    """Heading of a column."""

    name: str
    is_number: bool


class TableView(NamedTuple):
    """A table ready for the template."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]


def table_view(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> TableView:
    """The table with what sorts it: a column of numbers, or of cells that start with one, by number, others by text.

    Example:
        >>> view = table_view("Sizes", ("Name", "Size"), [("b", "1,200"), ("a", "not defined")])
        >>> view.columns[1].is_number, [row[1].value for row in view.rows]
        (True, ['1200', ''])
    """
    lines = [tuple(row) for row in rows]
    wrong = [len(line) for line in lines if len(line) != len(header)]
    if wrong:
        raise ValueError(
            f"`rows` must hold {len(header)} cells each, as the header of {caption!r} does, got {wrong[0]}."
        )
    columns = [_sort_values([line[place] for line in lines]) for place in range(len(header))]
    return TableView(
        caption,
        tuple(Column(name, values is not None) for name, values in zip(header, columns, strict=True)),
        tuple(
            tuple(Cell(text, "" if values is None else values[i]) for text, values in zip(line, columns, strict=True))
            for i, line in enumerate(lines)
        ),
    )


def sort_value(value: float) -> str:
    """A number as JavaScript reads it, nothing for NaN.

    Example:
        >>> sort_value(1200.0), sort_value(0.1), sort_value(float("-inf")), sort_value(float("nan"))
        ('1200', '0.1', '-Infinity', '')
    """
    if math.isnan(value):
        return ""
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return repr(float(value)).removesuffix(".0")


def _sort_values(texts: Sequence[str]) -> list[str] | None:
    """What sorts the cells of a column, or None where one of them is no number."""
    values = [math.nan if text.strip() in MISSING else _read(text.strip()) for text in texts]
    if any(value is None for value in values) or all(text.strip() in MISSING for text in texts):
        return None
    return [sort_value(value) for value in values if value is not None]


def _read(text: str) -> float | None:
    """The number that a text starts with, or None."""
    found = NUMBER.fullmatch(text)
    if found is None:
        return None
    digits = found["digits"]
    size = math.inf if digits == "∞" else float(digits.replace(",", ""))
    if found["power"]:
        size *= 10.0 ** int(found["power"].replace("−", "-"))
    return -size if found["sign"] in ("-", "−") else size
