"""The `Report`: its scores, figures and files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayes_kf.evaluation.report.contents import Card, FigureSpec, Sections
from bayes_kf.evaluation.report.figures import draw_figure, draw_sheet, draw_with_parts
from bayes_kf.evaluation.report.files import PAGE_MARK, SHEET_MARK, check_page, write_page
from bayes_kf.evaluation.report.html_page import render_page
from bayes_kf.evaluation.report.inline_figures import figure_markup
from bayes_kf.evaluation.report.provenance import versions
from bayes_kf.evaluation.report.score_labels import size_label
from bayes_kf.evaluation.report.score_strips import score_strips
from bayes_kf.evaluation.report.score_table import score_table
from bayes_kf.evaluation.report.sortable_tables import Table
from bayes_kf.evaluation.score import Score, flatten_scores
from bayes_kf.validation import did_you_mean

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

HEADLINES = ("accuracy", "rmse", "mae", "nll", "crps", "ece")  # scores that a report's repr shows


@dataclass(frozen=True, repr=False)
class Report:
    """The result of an evaluation, as `evaluate`, `compare` and the functions for plain predictions return it.

    Attributes:
        title: Title of the page.
        config: Settings printed on the page.
        sections: Scores, verdicts, figures, tables and examples.
        fingerprints: Name of a data set to its SHA-256.
    """

    title: str
    config: dict[str, str]
    sections: Sections
    fingerprints: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Title, sizes and main scores.

        Example:
            >>> scores = {"nll": Score(0.25), "mine": Score(1.0)}
            >>> Report("Mine", {}, Sections(scores=scores, sizes={"examples": 1200}))
            Report('Mine', examples: 1,200, nll: 0.25, 1 more score)
        """
        sizes = [f"{name}: {size:,}" for name, size in list(self.sections.sizes.items())[:2]]
        scores = self.sections.scores
        shown = [f"{name}: {scores[name].value:.4g}" for name in HEADLINES if name in scores]
        rest = len(scores) - len(shown)
        more = [f"{rest:,} more score{'s' if rest != 1 else ''}"] if rest else []
        return f"Report({', '.join([repr(self.title), *sizes, *shown, *more])})"

    @property
    def scores(self) -> dict[str, float]:
        """Every number by its name, in a new dictionary.

        Beside a score `x` stand, if they are known, its 95 % interval (`x_low`, `x_high`), the mean and the ends of its
        null band (`x_null_mean`, `x_null_low`, `x_null_high`) and its p-value (`x_p_value`).
        """
        return flatten_scores(self.sections.scores)

    def score(self, name: str) -> Score:
        """A score with its interval, null band and p-value.

        Args:
            name: Name of the score, for example "ece".

        Raises:
            ValueError: If the report has no such score.

        Example:
            >>> Report("Mine", {}, Sections(scores={"nll": Score(0.25)})).score("nll").value
            0.25
        """
        scores = self.sections.scores
        if name not in scores:
            raise ValueError(f"`name` must be a score of this report, got {name!r}{did_you_mean(name, scores) or '.'}")
        return scores[name]

    @property
    def tables(self) -> dict[str, Table]:
        """Every table of the page by its caption; each has `to_markdown` and `to_latex`."""
        under_figures = (spec.table for spec in self.sections.drawings.values() if spec.table is not None)
        return {table.caption: table for table in (*self.sections.tables, *under_figures)}

    def to_pandas(self) -> pandas.DataFrame:
        """The scores as a table: a row for each, with value, interval, null band and p-value, NaN where unknown.

        Example:
            >>> table = Report("Mine", {}, Sections(scores={"nll": Score(0.25, p_value=0.5)})).to_pandas()
            >>> table.loc["nll", ["value", "p_value"]].tolist()
            [0.25, 0.5]
        """
        import pandas

        columns = {"value": "", **{end: f"_{end}" for end in ("low", "high", "null_mean", "null_low", "null_high")}}
        columns["p_value"] = "_p_value"
        rows = {
            name: [score.flat(name).get(name + end, math.nan) for end in columns.values()]
            for name, score in self.sections.scores.items()
        }
        return pandas.DataFrame.from_dict(rows, orient="index", columns=list(columns))

    def _repr_html_(self) -> str:
        """The page in a frame of its own, for notebooks."""
        page = escape(self.to_html(), quote=True)
        style = "width: 100%; height: 900px; border: 1px solid #999"
        return f'<iframe title="{escape(self.title, quote=True)}" srcdoc="{page}" style="{style}"></iframe>'

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """Name to matplotlib figure, drawn on first use."""
        return {name: draw_figure(spec) for name, spec in self.sections.drawings.items()}

    def save(self, path: str | Path) -> Path:
        """Write the page, its numbers (.json) and all figures on one sheet (.png) under the same name.

        The page embeds its figures and loads nothing over the network. In the JSON, a number that is not finite is null
        and is listed under `not_finite`. A report without figures has no sheet. Files of an earlier report of that name
        are replaced one by one; each replacement is atomic.

        Args:
            path: Path of the page; must end in .html. Missing folders are created.

        Returns:
            The path of the page.

        Raises:
            ValueError: If the path does not end in .html, or one of the three files exists and belongs to no report.
                Nothing has changed then.
        """
        page = Path(path)
        check_page(page)
        writers = {".html": _text_writer(self.to_html() + "\n" + PAGE_MARK), ".json": _text_writer(self.to_json())}
        if self.sections.drawings:
            sheet = draw_sheet(self.title, self.sections.drawings)
            writers[".png"] = lambda file: sheet.savefig(file, dpi=110, metadata={"Software": SHEET_MARK})
        write_page(page, writers)
        return page

    @property
    def headline(self) -> list[str]:
        """The result in a few short sentences."""
        return [card.headline for card in self.sections.cards if card.headline] + self.sections.headline

    @property
    def _ranks_errors(self) -> bool:
        """Whether a threshold of confidence leaves errors out."""
        cards = {card.topic: card for card in self.sections.cards}
        return bool(self.sections.thresholds) and ("errors" not in cards or cards["errors"].answer != "no")

    def to_html(self) -> str:
        """The page as one self-contained HTML document."""
        sections = self.sections
        under_figures = [spec.table for spec in sections.drawings.values()]
        tables = [table for table in sections.tables if table not in under_figures]
        figures = [self._figure(name, spec) for name, spec in sections.drawings.items()]
        return render_page(
            title=self.title,
            lead=sections.lead,
            headline=[card.headline for card in sections.cards if _is_headline(card)] + sections.headline,
            cards=sections.cards,
            findings=sections.findings,
            advice=sections.advice,
            threshold=sections.threshold,
            thresholds=json.dumps([list(step) for step in sections.thresholds]) if self._ranks_errors else "",
            main_figure=figures[0] if figures else None,
            strips=score_strips(sections.scores, sections.tested),
            verdict=sections.verdict,
            open_tables=[table for table in tables if table.is_open],
            scores=score_table(sections.scores, sections.tested),
            num_scores=len(sections.scores),
            figures=figures[1:],
            galleries=sections.galleries,
            tables=[table for table in tables if not table.is_open],
            config=self.config | {size_label(name): f"{size:,}" for name, size in sections.sizes.items()},
            fingerprints=self._provenance(),
        )

    def _figure(self, name: str, spec: FigureSpec) -> dict[str, Any]:
        """A figure for the page."""
        parts = spec.parts
        markup = figure_markup(draw_with_parts(spec) if parts else self.figures[name], spec.alt, name)
        if parts and not markup.startswith("<svg"):  # an image of pixels shows all data
            markup, parts = figure_markup(self.figures[name], spec.alt, name), ()
        return {"title": spec.title, "table": spec.table, "markup": markup, "parts": parts, "key": name}

    def to_json(self) -> str:
        """Scores, verdicts, sizes, indices of the examples shown, configuration and fingerprints as strict JSON."""
        scores = self.scores
        content: dict[str, Any] = {
            "title": self.title,
            "headline": self.headline,
            "cards": [{"question": card.question, "answer": card.answer} for card in self.sections.cards],
            "findings": [f"{finding.where}: {finding.what}" for finding in self.sections.findings],
            "advice": [f"{advice.what}: {advice.gain}" for advice in self.sections.advice],
            "scores": {name: value if math.isfinite(value) else None for name, value in scores.items()},
            "not_finite": {name: str(value) for name, value in scores.items() if not math.isfinite(value)},
            "verdict": list(self.sections.verdict),
            "sizes": self.sections.sizes,
            "examples": {
                gallery.title: [example.index for example in gallery.examples] for gallery in self.sections.galleries
            },
            "config": self.config,
            "fingerprints": self._provenance(),
        }
        return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"

    def _provenance(self) -> dict[str, str]:
        """Fingerprints of the data, and versions of the software that computed the report."""
        return self.fingerprints | {name: text for name, text in versions().items() if name not in self.fingerprints}


def _is_headline(card: Card) -> bool:
    """Whether the page says it in large type: about probabilities always, about others if something is wrong."""
    return bool(card.headline) and (card.topic == "probabilities" or card.answer == "no")


def _text_writer(text: str) -> Callable[[Path], None]:
    """A function that writes the text to a file."""
    content = text.encode("utf-8", errors="backslashreplace")  # file names may hold lone surrogates

    def write(file: Path) -> None:
        file.write_bytes(content)

    return write
