"""A report: scores, verdicts, figures, examples and tables, and the files it is saved to."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayes_kf.evaluation.report.files import PAGE_MARK, SHEET_MARK, check_page, write_page
from bayes_kf.evaluation.report.html_page import figure_uri, render_page, versions
from bayes_kf.evaluation.report.score_table import score_table
from bayes_kf.evaluation.report.sortable_tables import TableView, table_view

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 5.4
Drawing = Callable[["Axes"], "Axes"]


@dataclass(frozen=True)
class Table:
    """A table of text. It stands folded at the end of the page; an open one before the scores."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    is_open: bool = False


@dataclass(frozen=True)
class FigureSpec:
    """A figure that is drawn when somebody looks at it."""

    title: str
    alt: str  # what it shows, in words and numbers
    draw: Drawing
    height: float = 3.9  # inches; all have the same width
    table: Table | None = None  # its data, folded under it


@dataclass(frozen=True)
class Picture:
    """An image as it is shown."""

    uri: str
    width: int  # of the place it is shown in, in pixels
    height: int
    is_enlarged: bool


@dataclass(frozen=True)
class Example:
    """An example with what was predicted of it; either `text` or `image` shows it."""

    index: int
    label: str
    prediction: str
    is_right: bool
    label_probability: float
    probability: float  # of the prediction
    entropy: float  # nats
    text: str = ""
    image: Picture | None = None


@dataclass(frozen=True)
class Gallery:
    """Examples worth looking at."""

    title: str
    note: str
    examples: tuple[Example, ...]


@dataclass
class Sections:
    """Parts of a report, put together one after the other."""

    scores: dict[str, float] = field(default_factory=dict)
    verdict: list[str] = field(default_factory=list)  # sentences
    sizes: dict[str, int] = field(default_factory=dict)
    drawings: dict[str, FigureSpec] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    galleries: list[Gallery] = field(default_factory=list)

    def __add__(self, other: Sections) -> Sections:
        """Both, in this order."""
        return Sections(
            self.scores | other.scores,
            self.verdict + other.verdict,
            self.sizes | other.sizes,
            self.drawings | other.drawings,
            self.tables + other.tables,
            self.galleries + other.galleries,
        )


HEADLINES = ("accuracy", "rmse", "mae", "nll", "crps", "ece")  # scores that a report's repr shows


@dataclass(frozen=True, repr=False)
class Report:
    """What an evaluation found. Made by `evaluate`, `compare` and their siblings that take plain predictions.

    `scores` is flat: beside a score `x` stand, where they are known, its 95 % interval `x_low`, `x_high`, and
    what chance alone would show, `x_null_mean`, `x_null_low`, `x_null_high` and `x_p_value`. `fingerprints` says of
    what data it was made, name to `fingerprint`.
    """

    title: str
    config: dict[str, str]
    sections: Sections
    fingerprints: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Title, sizes and main scores.

        Example:
            >>> Report("Mine", {}, Sections(scores={"nll": 0.25, "mine": 1.0}, sizes={"examples": 1200}))
            Report('Mine', examples: 1,200, nll: 0.25, 1 more score)
        """
        sizes = [f"{name}: {size:,}" for name, size in list(self.sections.sizes.items())[:2]]
        shown = [name for name in HEADLINES if name in self.scores]
        rest = len(self.scores) - len(shown)
        more = [f"{rest:,} more score{'s' if rest != 1 else ''}"] if rest else []
        return f"Report({', '.join([repr(self.title), *sizes, *(f'{n}: {self.scores[n]:.4g}' for n in shown), *more])})"

    @property
    def scores(self) -> dict[str, float]:
        """Every score by its name."""
        return self.sections.scores

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """Name to matplotlib figure, drawn on first use."""
        return {name: _draw(spec) for name, spec in self.sections.drawings.items()}

    def save(self, path: str | Path) -> Path:
        """Writes the page, and beside it the same name with .json (scores) and .png (all figures on one sheet).

        The page holds its figures and asks for nothing over the network. In the JSON a number that is not finite is
        null, and named under `not_finite`. Without figures there is no sheet. An earlier report of that name is
        replaced, file by file, each of them whole or not at all.

        Args:
            path: Where the page goes; must end in .html. Missing folders are made.

        Returns:
            The path of the page.

        Raises:
            ValueError: If the path does not end in .html, or one of the three files is there and is not of a report;
                nothing has changed then.
        """

        def write(text: str) -> Callable[[Path], None]:
            content = text.encode("utf-8", errors="backslashreplace")  # file names may hold lone surrogates
            return lambda file: _write(file, content)

        page = Path(path)
        check_page(page)
        writers = {".html": write(self.to_html() + "\n" + PAGE_MARK), ".json": write(self.to_json())}
        if self.sections.drawings:
            sheet = _sheet(self.title, self.sections.drawings)
            writers[".png"] = lambda file: sheet.savefig(file, dpi=110, metadata={"Software": SHEET_MARK})
        write_page(page, writers)
        return page

    def to_html(self) -> str:
        """The page as one self-contained HTML document."""
        sections = self.sections
        of_figures = [spec.table for spec in sections.drawings.values()]
        tables = [table for table in sections.tables if table not in of_figures]
        return render_page(
            title=self.title,
            verdict=sections.verdict,
            open_tables=[_view(table) for table in tables if table.is_open],
            scores=score_table(self.scores),
            figures=[
                {
                    "title": spec.title,
                    "alt": spec.alt,
                    "uri": figure_uri(self.figures[name]),
                    "table": _view(spec.table),
                }
                for name, spec in sections.drawings.items()
            ],
            galleries=sections.galleries,
            tables=[_view(table) for table in tables if not table.is_open],
            config=self.config | {name: f"{size:,}" for name, size in sections.sizes.items()},
            fingerprints=self._origin(),
        )

    def to_json(self) -> str:
        """Scores, verdicts, sizes, places of the examples shown, configuration and fingerprints as strict JSON."""
        finite = {name: value if math.isfinite(value) else None for name, value in self.scores.items()}
        content: dict[str, Any] = {
            "title": self.title,
            "scores": finite,
            "not_finite": {name: str(value) for name, value in self.scores.items() if not math.isfinite(value)},
            "verdict": list(self.sections.verdict),
            "sizes": self.sections.sizes,
            "examples": {
                shown.title: [example.index for example in shown.examples] for shown in self.sections.galleries
            },
            "config": self.config,
            "fingerprints": self._origin(),
        }
        return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"

    def _origin(self) -> dict[str, str]:
        """Fingerprints of the data, and the versions of what computed the report."""
        return self.fingerprints | {name: text for name, text in versions().items() if name not in self.fingerprints}


def _write(file: Path, content: bytes) -> None:
    file.write_bytes(content)


def _view(table: Table | None) -> TableView | None:
    """The table ready for the template."""
    return None if table is None else table_view(table.caption, table.header, table.rows)


def _draw(spec: FigureSpec) -> Figure:
    """The figure alone; made without pyplot, so that no window or global list holds it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, spec.height), layout="constrained")
    spec.draw(figure.subplots())
    return figure


def _sheet(title: str, drawings: Mapping[str, FigureSpec]) -> Figure:
    """All figures on one sheet, two in a row, each laid out by itself: long labels of one narrow no other."""
    from matplotlib.figure import Figure

    columns, specs = min(2, len(drawings)), list(drawings.values())
    heights = [max(s.height for s in specs[first : first + columns]) for first in range(0, len(specs), columns)]
    figure = Figure(figsize=(WIDTH * columns, sum(heights) + 0.4), layout="constrained")
    figure.suptitle(title, parse_math=False)
    parts = figure.subfigures(len(heights), columns, squeeze=False, height_ratios=heights).flatten()
    for part, spec in zip(parts, specs, strict=False):
        ax = part.subplots()
        spec.draw(ax)
        ax.set_xlabel(ax.get_xlabel() + "\n" + spec.title.replace("$", r"\$"))
    return figure
