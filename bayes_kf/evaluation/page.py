"""The page of a report: numbers made readable, figures embedded, everything escaped."""

import base64
import io
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure

LABELS = {
    "accuracy": ("Accuracy", "share of right predictions"),
    "nll": ("Negative log-likelihood", "nats per target; lower is better"),
    "brier": ("Brier score", "0 to 2; lower is better"),
    "confidence": ("Mean confidence", "probability of the predicted class"),
    "confidence_gap": ("Confidence − accuracy", "above zero: over-confident"),
    "ece": ("ECE", "top label, bins of equal width"),
    "ece_equal_mass": ("ECE, equal mass", "top label, bins of equal counts"),
    "ece_classwise": ("ECE, classwise", "mean over the classes"),
    "mce": ("MCE", "the worst bin, however small"),
    "entropy": ("Predictive entropy", "nats, mean"),
    "aleatoric": ("… of it aleatoric", "nats; what more data cannot remove"),
    "epistemic": ("… of it epistemic", "nats; what more data would remove"),
    "rmse": ("RMSE", "in the target's unit; lower is better"),
    "online_accuracy": ("Online accuracy", "each example predicted before it was learned"),
    "prequential_log_loss": ("Prequential log loss", "nats per example; lower is better"),
    "innovation_ratio": ("Innovation² / degrees of freedom", "one for a consistent filter"),
    "innovation_whiteness_p": ("Whiteness of innovations, p value", "small where large ones come in runs"),
}
OOD_LABELS = {
    "auroc": ("AUROC", "0.5 is chance, 1 is perfect"),
    "aupr": ("AUPR", "chance is the share of foreign inputs"),
    "fpr95": ("FPR@95", "known inputs flagged when 95 % of the foreign are; lower is better"),
}
NULL_SUFFIXES = ("_null_mean", "_null_low", "_null_high", "_p_value")


class ScoreRow(NamedTuple):
    """One line of the table of scores, as text."""

    label: str
    value: str
    band: str
    p_value: str
    remark: str
    outside: bool


def render_page(**content: Any) -> str:
    """The page as HTML; every text is escaped by the template engine."""
    environment = Environment(
        loader=PackageLoader("bayes_kf.evaluation", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(**content)


def figure_uri(figure: Figure) -> str:
    """The figure as a data URI of an SVG image: sharp at any size, isolated from the page's own markup."""
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "bayes_kf"}):  # the same report gives the same bytes
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def score_rows(scores: Mapping[str, float]) -> list[ScoreRow]:
    """One row for each score, with its band of chance where it has one."""
    return [_row(name, scores) for name in scores if not name.endswith(NULL_SUFFIXES)]


def number(value: float) -> str:
    """A number with four decimals (fewer for large ones), or words for what is not finite.

    Example:
        >>> number(0.12345), number(1234.5), number(float("inf")), number(float("nan"))
        ('0.1235', '1234', '∞', 'not defined')
    """
    if math.isnan(value):
        return "not defined"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.4f}" if abs(value) < 100 else f"{value:.0f}"
    return text.replace("-", "−")


def table_text(values: Iterable[float | int | str]) -> tuple[str, ...]:
    """A row of a table as text."""
    return tuple(v if isinstance(v, str) else f"{v:,}" if isinstance(v, int) else number(v) for v in values)


def _row(name: str, scores: Mapping[str, float]) -> ScoreRow:
    """The row of one score."""
    label, remark = _label(name)
    value = scores[name]
    low, high = scores.get(f"{name}_null_low"), scores.get(f"{name}_null_high")
    if low is None or high is None:
        return ScoreRow(label, number(value), "", "", remark, False)
    p_value = scores.get(f"{name}_p_value")
    p_text = "" if p_value is None else f"{p_value:.3f}"
    return ScoreRow(label, number(value), f"{number(low)} to {number(high)}", p_text, remark, not low <= value <= high)


def _label(name: str) -> tuple[str, str]:
    """Name of a score for people, and a remark."""
    if name.startswith("ood_"):
        data_set, _, measure = name.removeprefix("ood_").rpartition("_")
        label, remark = OOD_LABELS[measure]
        return f"Foreign “{data_set}”: {label}", remark
    if name.startswith("coverage_"):
        return f"Coverage of {name.removeprefix('coverage_')} % intervals", "share of targets inside"
    return LABELS[name]
