"""Parts of a report: cards, findings, advice, scores, sentences, figures, tables and example galleries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from bayes_kf.evaluation.report.sortable_tables import Table
from bayes_kf.evaluation.score import Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Drawing = Callable[["Axes"], "Axes"]
TIPS = "tips:"  # begins the identifier of a drawn artist whose marks have tips, a JSON list
PART = "part:"  # comes before that, with the number of the part of the data and a semicolon
Topic = Literal["probabilities", "errors", "unseen", "classes"]
Answer = Literal["yes", "partly", "no", "too few", "not tested"]


@dataclass(frozen=True)
class Card:
    """One of the questions at the top of the page, answered by one test."""

    topic: Topic
    question: str
    answer: Answer
    reason: str  # the numbers, in one or two sentences
    headline: str  # the answer as a short sentence; empty if nothing was tested


@dataclass(frozen=True)
class Finding:
    """A part of the data for which the predictions should not be trusted, beyond chance."""

    where: str
    what: str
    direction: int = 0  # of a range of confidence: 1 if it is too sure, −1 if it is right more often than it says


@dataclass(frozen=True)
class Advice:
    """What would help."""

    what: str
    gain: str  # what it would bring, measured on these examples
    call: str = ""  # Python code


@dataclass(frozen=True)
class DataPart:
    """A part of the data that a figure can show in the place of all."""

    name: str
    note: str  # its content in words and numbers
    draw: Drawing  # on the axes of the figure


@dataclass(frozen=True)
class FigureSpec:
    """A figure, drawn when it is first needed."""

    title: str
    alt: str  # text alternative: the content in words and numbers
    draw: Drawing
    height: float = 3.9  # inches; all have the same width
    table: Table | None = None  # the data, folded under the figure
    parts: tuple[DataPart, ...] = ()  # one of which the reader of a page picks


@dataclass(frozen=True)
class Picture:
    """An image at its displayed size."""

    uri: str
    width: int  # pixels on the page
    height: int
    is_enlarged: bool


@dataclass(frozen=True)
class Example:
    """An example with its prediction; it is shown by either `text` or `image`."""

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
class ColouredText:
    """A text whose tokens have the colour of their uncertainty."""

    index: int
    tokens: tuple[tuple[str, float, str, bool], ...]  # text, depth of the colour from 0 to 1, tip, underlined
    caption: str


@dataclass(frozen=True)
class Gallery:
    """Examples under one heading, of one kind."""

    title: str
    note: str
    examples: tuple[Example, ...] | tuple[ColouredText, ...]


@dataclass
class Sections:
    """Contents of a report, or of a part of one; `+` concatenates two parts."""

    lead: str = ""  # the accuracy and the number of examples, in a sentence
    headline: list[str] = field(default_factory=list)  # sentences, after those of the cards
    cards: list[Card] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    advice: list[Advice] = field(default_factory=list)
    thresholds: list[tuple[float, float, float]] = field(default_factory=list)  # confidence, answered, wrong of these
    threshold: int = 0  # the one to begin with, as its number in `thresholds`
    scores: dict[str, Score] = field(default_factory=dict)
    tested: list[str] = field(default_factory=list)  # names of the scores that a verdict tests
    verdict: list[str] = field(default_factory=list)  # sentences
    sizes: dict[str, int] = field(default_factory=dict)
    drawings: dict[str, FigureSpec] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    galleries: list[Gallery] = field(default_factory=list)

    def __add__(self, other: Sections) -> Sections:
        """Both parts, in this order."""
        return Sections(
            " ".join(part for part in (self.lead, other.lead) if part),
            self.headline + other.headline,
            self.cards + other.cards,
            self.findings + other.findings,
            self.advice + other.advice,
            self.thresholds + other.thresholds,
            self.threshold or other.threshold,
            self.scores | other.scores,
            self.tested + other.tested,
            self.verdict + other.verdict,
            self.sizes | other.sizes,
            self.drawings | other.drawings,
            self.tables + other.tables,
            self.galleries + other.galleries,
        )
