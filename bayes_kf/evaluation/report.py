"""A report: scores, verdicts, figures and tables, and the files it is saved to."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bayes_kf.evaluation.page import figure_uri, render_page, score_rows

WIDTH = 5.4
Drawing = Callable[[Axes], Axes]


@dataclass(frozen=True)
class FigureSpec:
    """A figure that is drawn when somebody looks at it."""

    title: str
    alt: str  # what it shows, in words and numbers
    draw: Drawing
    height: float = 3.9  # inches; all have the same width


@dataclass(frozen=True)
class Table:
    """A table that stands folded at the end of the page."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass
class Sections:
    """Parts of a report, put together one after the other."""

    scores: dict[str, float] = field(default_factory=dict)
    verdict: list[str] = field(default_factory=list)  # sentences
    sizes: dict[str, int] = field(default_factory=dict)
    drawings: dict[str, FigureSpec] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)

    def __add__(self, other: "Sections") -> "Sections":
        """Both, in this order."""
        return Sections(
            self.scores | other.scores,
            self.verdict + other.verdict,
            self.sizes | other.sizes,
            self.drawings | other.drawings,
            self.tables + other.tables,
        )


@dataclass(frozen=True)
class Report:
    """What an evaluation found. Made by `evaluate`, `evaluate_predictions` and `evaluate_regression`.

    `scores` is flat: a score that has a band of what chance alone would show stands beside its `_null_mean`,
    `_null_low`, `_null_high` and `_p_value`.
    """

    title: str
    config: dict[str, str]
    sections: Sections

    @property
    def scores(self) -> dict[str, float]:
        """Name to number."""
        return self.sections.scores

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """Name to matplotlib figure, drawn on first use."""
        return {name: _draw(spec) for name, spec in self.sections.drawings.items()}

    def save(self, path: str | Path) -> Path:
        """Writes the page, and beside it the same name with .json (scores) and .png (all figures on one sheet).

        The page holds its figures and asks for nothing over the network. In the JSON a number that is not finite is
        null, and named under `not_finite`.

        Args:
            path: Where the page goes; must end in .html. Missing folders are made.

        Returns:
            The path of the page.

        Raises:
            ValueError: If the path does not end in .html.
        """
        page = Path(path)
        if page.suffix != ".html":
            raise ValueError(f"`path` must end in .html, got {str(path)!r}.")
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(self.to_html(), encoding="utf-8")
        page.with_suffix(".json").write_text(self.to_json(), encoding="utf-8")
        _sheet(self.title, self.sections.drawings).savefig(page.with_suffix(".png"), dpi=110)
        return page

    def to_html(self) -> str:
        """The page as one self-contained HTML document."""
        figures = [
            {"title": spec.title, "alt": spec.alt, "uri": figure_uri(self.figures[name])}
            for name, spec in self.sections.drawings.items()
        ]
        return render_page(
            title=self.title,
            verdict=self.sections.verdict,
            scores=score_rows(self.scores),
            figures=figures,
            tables=self.sections.tables,
            config=self.config | {name: f"{size:,}" for name, size in self.sections.sizes.items()},
        )

    def to_json(self) -> str:
        """Scores, verdicts, sizes and configuration as strict JSON."""
        finite = {name: value if math.isfinite(value) else None for name, value in self.scores.items()}
        content: dict[str, Any] = {
            "title": self.title,
            "scores": finite,
            "not_finite": {name: str(value) for name, value in self.scores.items() if not math.isfinite(value)},
            "verdict": list(self.sections.verdict),
            "sizes": self.sections.sizes,
            "config": self.config,
        }
        return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _draw(spec: FigureSpec) -> Figure:
    """The figure alone; made without pyplot, so that no window or global list holds it."""
    figure = Figure(figsize=(WIDTH, spec.height), layout="constrained")
    spec.draw(figure.subplots())
    return figure


def _sheet(title: str, drawings: Mapping[str, FigureSpec]) -> Figure:
    """All figures on one sheet, two in a row."""
    columns = min(2, len(drawings))
    rows = -(-len(drawings) // columns)
    height = max(spec.height for spec in drawings.values())
    figure = Figure(figsize=(WIDTH * columns, height * rows + 0.4), layout="constrained")
    figure.suptitle(title, parse_math=False)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, spec in zip(axes, drawings.values(), strict=False):
        spec.draw(ax)
        ax.set_xlabel(f"{ax.get_xlabel()}\n{spec.title}")
    for ax in axes[len(drawings) :]:
        ax.axis("off")
    return figure
