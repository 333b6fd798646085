"""Sections of a report that compares models: scores and differences, reliability diagrams, streams."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from bayes_kf.evaluation.inputs import Array
from bayes_kf.evaluation.online.prequential import prequential_log_loss, running_accuracy
from bayes_kf.evaluation.plots.comparison import comparison_plot, online_comparison
from bayes_kf.evaluation.report.contents import FigureSpec, Sections
from bayes_kf.evaluation.report.score_labels import label_of
from bayes_kf.evaluation.report.sortable_tables import Cell, CellContent, Table, make_table, range_cell
from bayes_kf.evaluation.score import Score
from bayes_kf.evaluation.score_comparison import ScoreComparison
from bayes_kf.evaluation.sections.online import even_steps, window_of
from bayes_kf.evaluation.sections.verdicts.comparison import comparison_headlines, comparison_verdict
from bayes_kf.evaluation.sections.verdicts.phrases import quoted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_DIAGRAMS = 6
SCORES = ("accuracy", "nll", "brier", "ece", "ece_debiased", "confidence_gap", "rmse", "crps", "coverage_95")  # shown
FURTHER = ("ece", "coverage_95")  # in the table without a comparison


def comparison_section(
    comparisons: Mapping[str, ScoreComparison],
    models: Mapping[str, Sections],
    cost: Mapping[str, float] | None = None,
) -> Sections:
    """Verdicts, the table of models, and the differences with their forest plots.

    Args:
        comparisons: Score to its comparison over all models.
        models: Name of a model to its `score_section`.
        cost: Name of a model to its cost, in any unit.
    """
    sections = Sections(sizes=next(iter(models.values())).sizes)
    for name, model in models.items():
        sections.scores |= {f"{name}/{score}": value for score, value in model.scores.items() if score in SCORES}
    for score, comparison in comparisons.items():
        sections.scores |= {
            f"{name}/{score}": Score(value)
            for name, value in comparison.values.items()
            if f"{name}/{score}" not in sections.scores
        }
    sections.headline = comparison_headlines(comparisons.values())
    if cost:
        leaders = dict.fromkeys(name for comparison in comparisons.values() for name in comparison.best)
        sections.headline.append(f"Cost: {', '.join(f'{quoted(name)} {cost[name]:g}' for name in leaders)}.")
    sections.verdict = [comparison_verdict(comparison) for comparison in comparisons.values()]
    sections.tables.append(_model_table(comparisons, models, cost or {}))
    sections.drawings |= {f"differences_{score}": _forest(comparison) for score, comparison in comparisons.items()}
    return sections


def diagram_section(models: Mapping[str, Sections]) -> Sections:
    """The reliability diagrams of the first models."""
    drawings = {}
    for name, model in list(models.items())[:MAX_DIAGRAMS]:
        spec = model.drawings["reliability"]
        drawings[f"reliability_{name}"] = replace(
            spec, title=f"Reliability of {quoted(name)}", alt=f"{quoted(name)}: {spec.alt}"
        )
    return Sections(drawings=drawings)


def coverage_figures(models: Mapping[str, Sections]) -> Sections:
    """The figures of the coverage of the first regressions' intervals."""
    drawings = {}
    for name, model in list(models.items())[:MAX_DIAGRAMS]:
        for key, spec in model.drawings.items():
            title = f"{spec.title}, {quoted(name)}"
            drawings[f"{key}_{name}"] = replace(spec, title=title, alt=f"{quoted(name)}: {spec.alt}")
    return Sections(drawings=drawings)


def stream_comparison_section(histories: Mapping[str, Mapping[str, Array]]) -> Sections:
    """Accuracy and log loss of the streams that the models were fitted to."""
    sections = Sections()
    for series, title in (("correct", "Learning online: accuracy"), ("log_loss", "Learning online: log loss")):
        runs = {name: history for name, history in histories.items() if series in history and len(history[series])}
        if runs:
            sections.drawings[f"online_{series}"] = _curves(runs, series, title)
    return sections


def _forest(comparison: ScoreComparison) -> FigureSpec:
    """The differences of one score as a figure, with their table."""
    label = label_of(comparison.score).name

    def draw(ax: Axes) -> Axes:
        return comparison_plot(comparison, ax=ax)

    height = 1.5 + 0.34 * len(comparison.values)
    title = f"{label}: differences to the best model, with joint 95 % intervals of all on this page"
    return FigureSpec(title, comparison_verdict(comparison), draw, height, _difference_table(label, comparison))


def _model_table(
    comparisons: Mapping[str, ScoreComparison], models: Mapping[str, Sections], cost: Mapping[str, float]
) -> Table:
    """A row for each model: every compared score, and its place; the ECE of classifiers, and the cost."""
    further = [name for name in FURTHER if all(name in model.scores for model in models.values())]
    header = ["Model"]
    for score in comparisons:
        header += [label_of(score).name, "place"]
    header += [label_of(name).name for name in further] + (["Cost"] if cost else [])
    places = {score: {rank.name: rank.place for rank in c.ranking} for score, c in comparisons.items()}
    rows = []
    for name, model in models.items():
        row: list[CellContent] = [name]
        for score, comparison in comparisons.items():
            row += [comparison.values[name], places[score][name]]
        row += [model.scores[further_name].value for further_name in further]
        rows.append([*row, Cell(f"{cost[name]:g}", cost[name])] if cost else row)
    caption = "Models side by side; place 1: no model is clearly better"
    return make_table(caption, header, rows, is_open=True)


def _difference_table(label: str, comparison: ScoreComparison) -> Table:
    """The differences of every pair of models."""
    rows = [
        (f"{d.first} − {d.second}", d.value, range_cell(d.low, d.high), "no" if d.is_clear else "yes")
        for d in comparison.differences
    ]
    return make_table(f"{label}: differences", ("Pair", "Difference", "Interval", "Tied"), rows)


def _curves(runs: Mapping[str, Mapping[str, Array]], series: str, title: str) -> FigureSpec:
    """One series of several runs."""
    window = window_of(min(len(history[series]) for history in runs.values()))
    cumulative = running_accuracy if series == "correct" else prequential_log_loss
    final = ", ".join(f"{cumulative(history[series])[-1]:.3f} for {quoted(name)}" for name, history in runs.items())
    return FigureSpec(
        title=title,
        alt=f"Curves of {len(runs)} runs. Their means over the whole stream are {final}.",
        draw=lambda ax: online_comparison(runs, series, window=window, ax=ax),
        table=_curve_table(runs, series, title),
    )


def _curve_table(runs: Mapping[str, Mapping[str, Array]], series: str, title: str) -> Table:
    """Cumulative means at even steps of the shortest run."""
    cumulative = running_accuracy if series == "correct" else prequential_log_loss
    curves = {name: cumulative(history[series]) for name, history in runs.items()}
    rows = [
        (k + 1, *(curve[k].item() for curve in curves.values()))
        for k in even_steps(min(len(curve) for curve in curves.values()))
    ]
    return make_table(f"{title}, mean from the start", ("Examples seen", *curves), rows)
