"""The page that puts several posteriors, or several sets of predictions, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bayes_kf.evaluation.classification.comparison import COMPARED, ScoreComparison, compare_predictions
from bayes_kf.evaluation.classification.score_summary import LEVEL
from bayes_kf.evaluation.inputs import Array, as_probs, as_targets, check_positive_int
from bayes_kf.evaluation.online.prequential import prequential_log_loss, running_accuracy
from bayes_kf.evaluation.plots.comparison import forest_plot, online_comparison
from bayes_kf.evaluation.posterior_report import class_predictions
from bayes_kf.evaluation.protocols import PosteriorLike
from bayes_kf.evaluation.report.html_page import fingerprint, label_of, number, table_text
from bayes_kf.evaluation.report.report import FigureSpec, Report, Sections, Table
from bayes_kf.evaluation.resampling.null_test import NullSettings, check_simulation
from bayes_kf.evaluation.sections.classification import score_section
from bayes_kf.evaluation.sections.online import even_steps, window_of
from bayes_kf.evaluation.sections.verdicts import comparison_verdict, quoted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_DIAGRAMS = 6
SUFFIXES = ("", "_low", "_high", "_null_mean", "_null_low", "_null_high", "_p_value")
SHOWN = ("accuracy", "nll", "brier", "ece", "ece_debiased", "confidence_gap")


def compare(
    posteriors: Mapping[str, PosteriorLike | Array],
    loader: Any,
    *,
    method: str = "linearized",
    num_samples: int = 64,
    num_bins: int = 15,
    num_simulations: int = 1000,
    title: str | None = None,
    seed: int = 0,
) -> Report:
    """Report on several posteriors side by side: which is better at what, by how much, and where they are tied.

    Args:
        posteriors: Name to posterior (see `PosteriorLike`), or to class probabilities (N, C) that somebody else
            predicted for the loader's examples in its order; at least two.
        loader: Known inputs with their targets; gone through once for each posterior, so no iterator that runs dry.
        method: How to predict, as the posteriors name it.
        num_samples: Draws for each prediction.
        num_bins: Number of bins of all calibration errors.
        num_simulations: Number of simulated data sets behind each null band, at least 39.
        title: Title of the page.
        seed: Seed of the predictions' draws and the simulations.

    Raises:
        ValueError: If there are fewer than two posteriors, the loader is an iterator or gives each of them other
            targets, or one predicts no class probabilities.
    """
    if len(posteriors) < 2:
        raise ValueError(f"`posteriors` must hold at least two, got {len(posteriors)}.")
    if isinstance(loader, Iterator):
        raise ValueError("`loader` must be something to go through more than once, got an iterator.")
    probs: dict[str, Array] = {}
    histories: dict[str, Mapping[str, Tensor]] = {}
    targets: Tensor | None = None
    for name, posterior in posteriors.items():
        if isinstance(posterior, Tensor | np.ndarray):
            probs[name] = posterior
            continue
        generator = torch.Generator().manual_seed(seed)
        predicted = posterior.predict_loader(loader, method=method, num_samples=num_samples, generator=generator)
        probs[name], found = class_predictions(posterior, predicted, f"posteriors[{name!r}]")
        if targets is not None and not torch.equal(targets, found):
            raise ValueError(f"`loader` must give the same targets every time, got others for posteriors[{name!r}].")
        targets = found
        histories |= {name: posterior.history} if posterior.history else {}
    if targets is None:
        raise ValueError(
            "`posteriors` must hold at least one posterior to read the targets with, got predictions only."
        )
    report = report_comparison(
        probs,
        targets,
        histories=histories,
        num_bins=num_bins,
        num_simulations=num_simulations,
        title=title,
        seed=seed,
    )
    return replace(report, config={"method": method, "num_samples": str(num_samples)} | report.config)


def report_comparison(
    probs: Mapping[str, Array],
    targets: Array,
    *,
    histories: Mapping[str, Mapping[str, Array]] | None = None,
    num_bins: int = 15,
    num_simulations: int = 1000,
    config: Mapping[str, object] | None = None,
    title: str | None = None,
    seed: int = 0,
) -> Report:
    """Report on several models' class probabilities for the same examples, wherever they come from.

    Args:
        probs: Name to class probabilities, (N, C), of at least two models.
        targets: Class indices, (N,).
        histories: Name to series of the stream that a model learned from, "log_loss" and "correct" for each example.
        num_bins: Number of bins of all calibration errors.
        num_simulations: Number of simulated data sets behind each null band, at least 39.
        config: Settings to print.
        title: Title of the page.
        seed: Seed of the simulations.

    Returns:
        A report whose scores are named "model/score".

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
        >>> report = report_comparison({"a": probs, "b": probs.flip(0)}, torch.tensor([0, 1, 1]))
        >>> round(report.scores["a/accuracy"], 3), report.scores["b/nll"] > report.scores["a/nll"]
        (0.667, True)
    """
    check_positive_int(num_bins, "num_bins")
    check_simulation(num_simulations, LEVEL)
    comparisons = compare_predictions(probs, targets)
    checked = {str(name): as_probs(values, f"probs[{name!r}]") for name, values in probs.items()}
    chance = NullSettings(num_bins, num_simulations, seed)
    single = {name: score_section(p, as_targets(targets, p), None, chance) for name, p in checked.items()}
    sections = _comparison_section(comparisons, single) + _diagrams(single) + _courses(histories or {})
    settings = {**(config or {}), "models": ", ".join(checked), **vars(chance)}
    prints = {f"predictions of {name}": fingerprint(values) for name, values in checked.items()}
    return Report(
        title=title or "Comparison of classifiers",
        config={name: str(value) for name, value in settings.items()},
        sections=sections,
        fingerprints=prints | {"targets": fingerprint(targets)},
    )


def _comparison_section(comparisons: Mapping[str, ScoreComparison], single: Mapping[str, Sections]) -> Sections:
    """Verdicts, the table of models, differences and their forest plots."""
    sections = Sections(sizes=next(iter(single.values())).sizes)
    for name, section in single.items():
        sections.scores |= {f"{name}/{score}": value for score, value in section.scores.items() if _is_shown(score)}
    sections.verdict = [comparison_verdict(comparison) for comparison in comparisons.values()]
    sections.tables.append(_overview(comparisons, single))
    sections.drawings |= {f"differences_{score}": _forest(comparison) for score, comparison in comparisons.items()}
    return sections


def _forest(comparison: ScoreComparison) -> FigureSpec:
    """The differences of one score as a figure, and as its table."""
    label, _ = label_of(comparison.score)

    def draw(ax: Axes) -> Axes:
        return forest_plot(
            comparison.differences, label="difference\n(all intervals of the page hold together at 95 %)", ax=ax
        )

    height = 1.6 + 0.32 * len(comparison.differences)
    table = _difference_table(label, comparison)
    return FigureSpec(f"{label}: differences", comparison_verdict(comparison), draw, height, table)


def _is_shown(score: str) -> bool:
    """Whether a model's score, or a number that belongs to it, is on the page."""
    return score in {f"{name}{suffix}" for name in SHOWN for suffix in SUFFIXES}


def _overview(comparisons: Mapping[str, ScoreComparison], single: Mapping[str, Sections]) -> Table:
    """A row for each model: every compared score, and its place."""
    header = ["Model"]
    for score in COMPARED:
        header += [label_of(score)[0], "place"]
    header.append(label_of("ece")[0])
    places = {s: {rank.name: rank.place for rank in found.ranking} for s, found in comparisons.items()}
    rows = []
    for name in single:
        cells: list[float | int | str] = [name]
        for score in COMPARED:
            cells += [comparisons[score].values[name], places[score][name]]
        cells.append(single[name].scores["ece"])
        rows.append(table_text(cells))
    caption = "Models side by side; place 1: no model is clearly better"
    return Table(caption, tuple(header), tuple(rows), is_open=True)


def _difference_table(label: str, comparison: ScoreComparison) -> Table:
    """The table of the differences of every pair of models."""
    rows = [
        (
            f"{d.first} − {d.second}",
            number(d.value),
            f"{number(d.low)} to {number(d.high)}",
            "no" if d.is_clear else "yes",
        )
        for d in comparison.differences
    ]
    return Table(f"{label}: differences", ("Pair", "Difference", "Interval", "Tied"), tuple(rows))


def _diagrams(single: Mapping[str, Sections]) -> Sections:
    """The first models' reliability diagrams."""
    drawings = {}
    for name, section in list(single.items())[:MOST_DIAGRAMS]:
        spec = section.drawings["reliability"]
        drawings[f"reliability_{name}"] = replace(
            spec, title=f"Reliability of {quoted(name)}", alt=f"{quoted(name)}: {spec.alt}"
        )
    return Sections(drawings=drawings)


def _courses(histories: Mapping[str, Mapping[str, Array]]) -> Sections:
    """The streams that the models learned from."""
    sections = Sections()
    for series, title in (("correct", "Learning online: accuracy"), ("log_loss", "Learning online: log loss")):
        runs = {name: history for name, history in histories.items() if series in history and len(history[series])}
        if runs:
            sections.drawings[f"online_{series}"] = _course(runs, series, title)
    return sections


def _course(runs: Mapping[str, Mapping[str, Array]], series: str, title: str) -> FigureSpec:
    """One series of several runs."""
    window = window_of(min(len(history[series]) for history in runs.values()))
    final = running_accuracy if series == "correct" else prequential_log_loss
    ends = ", ".join(f"{final(history[series])[-1]:.3f} for {quoted(name)}" for name, history in runs.items())
    return FigureSpec(
        title=title,
        alt=f"Curves of {len(runs)} runs; their means over the whole stream are {ends}.",
        draw=lambda ax: online_comparison(runs, series, window=window, ax=ax),
        table=_course_table(runs, series, title),
    )


def _course_table(runs: Mapping[str, Mapping[str, Array]], series: str, title: str) -> Table:
    """Means from the start at even steps of the shortest run."""
    mean = running_accuracy if series == "correct" else prequential_log_loss
    courses = {name: mean(history[series]) for name, history in runs.items()}
    rows = [
        table_text((k + 1, *(course[k].item() for course in courses.values())))
        for k in even_steps(min(len(course) for course in courses.values()))
    ]
    return Table(f"{title}, mean from the start", ("Examples seen", *courses), tuple(rows))
