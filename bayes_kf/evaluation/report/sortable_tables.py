"""Tables of the page: each cell has its text and, if it is a number, the value that sorts it."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np


class Cell(NamedTuple):
    """Text of a cell, with the number that sorts it."""

    text: str
    value: float | None = None  # None: the cell is text; NaN: a number that is not defined, sorted last
    note: str = ""
    is_outside: bool = False  # outside the null band

    @property
    def sort_key(self) -> str:
        """The value as JavaScript reads it, empty for text and NaN.

        Example:
            >>> [Cell("", value).sort_key for value in (1200.0, 0.1, float("-inf"), float("nan"), None)]
            ['1200', '0.1', '-Infinity', '', '']
        """
        if self.value is None or math.isnan(self.value):
            return ""
        if math.isinf(self.value):
            return "Infinity" if self.value > 0 else "-Infinity"
        return repr(float(self.value)).removesuffix(".0")


CellContent: TypeAlias = Cell | float | int | str
EMPTY = Cell("", math.nan)


class Column(NamedTuple):
    """Heading of a column."""

    name: str
    is_number: bool


@dataclass(frozen=True)
class Table:
    """A table, folded at the end of the page; an open one stands before the scores."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    is_open: bool = False

    def __post_init__(self) -> None:
        """Refuse a row whose length differs from the header's."""
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(
                    f"`rows` must hold {len(self.header)} cells each, as the header of {self.caption!r} does, "
                    f"got {len(row)}."
                )

    @property
    def columns(self) -> tuple[Column, ...]:
        """Columns of which every cell has a value, and some cell one that is not NaN, are columns of numbers."""
        return tuple(Column(name, _are_numbers([row[i] for row in self.rows])) for i, name in enumerate(self.header))

    def to_markdown(self) -> str:
        r"""The table for a Markdown page.

        Example:
            >>> print(make_table("Sizes", ("Name", "Size"), [("a|b", 1200)]).to_markdown())
            | Name | Size |
            | --- | ---: |
            | a\|b | 1,200 |
        """
        rule = ["---:" if column.is_number else "---" for column in self.columns]
        rows = [[cell.text.replace("|", "\\|") for cell in row] for row in self.rows]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in [list(self.header), rule, *rows])

    def to_latex(self) -> str:
        r"""The table for a paper, with the rules of the package booktabs.

        Example:
            >>> print(make_table("Sizes", ("Name", "Size"), [("a_b", 0.5)]).to_latex())
            \begin{tabular}{lr}
            \toprule
            Name & Size \\
            \midrule
            a\_b & 0.5000 \\
            \bottomrule
            \end{tabular}
        """
        columns = "".join("r" if column.is_number else "l" for column in self.columns)
        head, *rows = (
            " & ".join(map(_latex, cells)) + r" \\"
            for cells in [self.header, *([cell.text for cell in row] for row in self.rows)]
        )
        lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *rows, r"\bottomrule"]
        return "\n".join([*lines, r"\end{tabular}"])


def make_table(
    caption: str, header: Iterable[str], rows: Iterable[Sequence[CellContent]], *, is_open: bool = False
) -> Table:
    """A table of numbers and texts.

    Args:
        caption: Title of the table.
        header: Name of each column.
        rows: A number or text for each column; a `Cell` where the text of a number is special.
        is_open: Whether the table stands unfolded before the scores.

    Raises:
        ValueError: If a row has more or fewer cells than the header.

    Example:
        >>> table = make_table("Sizes", ("Name", "Size"), [("b", 1200), ("a", float("nan"))])
        >>> table.columns[1].is_number, [row[1].text for row in table.rows], [row[1].sort_key for row in table.rows]
        (True, ['1,200', 'not defined'], ['1200', ''])
    """
    return Table(caption, tuple(header), tuple(tuple(_cell(content) for content in row) for row in rows), is_open)


def range_cell(low: float, high: float, *, decimals: int | None = None, note: str = "") -> Cell:
    """A range such as "0.1000 to 0.2000", sorted by its lower end.

    Args:
        low: Lower end.
        high: Upper end.
        decimals: Number of decimals; without it both ends are written as `number` writes them.
        note: Remark under the range.
    """
    if math.isnan(low) and math.isnan(high):
        return Cell(number(math.nan), math.nan, note)
    ends = [number(end) if decimals is None else f"{end:.{decimals}f}" for end in (low, high)]
    return Cell(" to ".join(ends), low, note)


def number(value: float) -> str:
    """A number with four decimals (fewer for large ones, two digits of small ones), or words for what is not finite.

    Values up to 1e-9 are written as zero because sums of scores are no more exact.

    Example:
        >>> number(0.12345), number(1234.5), number(0.0000123), number(float("inf")), number(float("nan"))
        ('0.1235', '1234', '0.000012', '∞', 'not defined')
    """
    if math.isnan(value):
        return "not defined"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.4f}" if abs(value) < 100 else f"{value:.0f}"
    if 1e-9 < abs(value) < 1e-3:
        text = np.format_float_positional(value, precision=2, fractional=False, trim="-")
    return (text if float(text) else text.lstrip("-")).replace("-", "−")


def _cell(content: CellContent) -> Cell:
    """A number or text as a cell."""
    if isinstance(content, Cell):
        return content
    if isinstance(content, str):
        return Cell(content)
    return Cell(f"{content:,}" if isinstance(content, int) else number(content), content)


def _latex(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    special = {character: f"\\{character}" for character in "&%$#_{}"}
    special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {"−": "$-$", "∞": r"$\infty$", "\u00a0": "~"}
    return "".join(special.get(character, character) for character in text)


def _are_numbers(cells: Sequence[Cell]) -> bool:
    """Whether all cells have a value and one of them is not NaN."""
    values = [cell.value for cell in cells]
    return all(value is not None for value in values) and any(
        value is not None and not math.isnan(value) for value in values
    )
