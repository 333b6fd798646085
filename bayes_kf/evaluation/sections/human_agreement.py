"""The part of a report on agreement with people."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bayes_kf.evaluation.classification.entropy import entropy
from bayes_kf.evaluation.classification.human_agreement import check_human, human_agreement, rounded_entropy
from bayes_kf.evaluation.classification.score_summary import LEVEL
from bayes_kf.evaluation.inputs import Array
from bayes_kf.evaluation.plots.reliability import _axes
from bayes_kf.evaluation.report.html_page import table_text
from bayes_kf.evaluation.report.report import FigureSpec, Sections, Table
from bayes_kf.evaluation.score import Score, flatten_scores
from bayes_kf.evaluation.sections.verdicts import doubt_verdict, human_verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GRID = 24  # hexagons across
GROUPS = 10


def human_section(probs: Array, human: Array) -> Sections:
    """Scores against people's answers with intervals, verdicts, and the figure of both entropies.

    Args:
        probs: Class probabilities, (N, C).
        human: Shares of people's answers, (N, C), rows sum to one.

    Raises:
        ValueError: If an argument is malformed or the shapes differ.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2]])
        >>> section = human_section(probs, probs)
        >>> section.scores["human_tv"], round(section.scores["human_entropy_spearman"], 4)
        (0.0, 1.0)
    """
    predicted, answers = check_human(probs, human)
    found = human_agreement(predicted, answers, level=LEVEL)
    scores = flatten_scores(
        {
            "human_nll": found.nll.score(),
            "human_entropy": Score(entropy(answers).mean().item()),
            "human_kl": found.kl.score(),
            "human_tv": found.total_variation.score(),
            "human_entropy_spearman": found.entropy_spearman.score(),
            "human_entropy_pearson": Score(found.entropy_pearson),
        }
    )
    sentence = doubt_verdict(scores)
    figure = FigureSpec(
        title="Doubt of people and of the model",
        alt=f"Entropy of the prediction against entropy of people's answers for {len(answers):,} examples. {sentence}",
        draw=lambda ax: human_entropy_plot(predicted, answers, ax=ax),
        table=_doubt_table(predicted, answers),
    )
    return Sections(
        scores=scores,
        verdict=[human_verdict(scores), sentence],
        drawings={"human_entropy": figure},
    )


def human_entropy_plot(probs: Array, human: Array, *, ax: Axes | None = None) -> Axes:
    """How many examples have which entropy of people's answers and of the prediction; darker cells hold more.

    Args:
        probs: Class probabilities, (N, C).
        human: Shares of people's answers, (N, C), rows sum to one.
        ax: Where to draw.

    Raises:
        ValueError: If an argument is malformed or the shapes differ.

    Example:
        >>> from matplotlib.figure import Figure
        >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2]])
        >>> ax = human_entropy_plot(probs, probs, ax=Figure().subplots())
        >>> ax.collections[0].get_array().sum().item()
        3.0
    """
    predicted, answers = check_human(probs, human)
    x, y = entropy(answers), entropy(predicted)
    top = max(x.max().item(), y.max().item(), 1e-6)
    ax = _axes(ax)
    cells = ax.hexbin(
        x.numpy(),
        y.numpy(),
        gridsize=GRID,
        extent=(0, top, 0, top),
        mincnt=1,
        bins="log",
        cmap="cividis_r",
        linewidths=0.2,
    )
    ax.plot([0, top], [0, top], color="black", linestyle="--", linewidth=1)
    ax.set(xlabel="entropy of people's answers (nats)", ylabel="entropy of the prediction (nats)")
    ax.figure.colorbar(cells, ax=ax, label="examples")
    return ax


def _doubt_table(probs: torch.Tensor, human: torch.Tensor) -> Table:
    """Mean entropies in groups of equal size by people's entropy."""
    theirs, own = rounded_entropy(human), rounded_entropy(probs)
    order = theirs.sort(stable=True).indices
    rows = [
        (f"{k + 1}", len(part), theirs[part].mean().item(), own[part].mean().item())
        for k, part in enumerate(order.tensor_split(min(GROUPS, len(order))))
    ]
    header = (
        "From least to most doubted by people",
        "Examples",
        "Entropy of people's answers",
        "Entropy of the prediction",
    )
    return Table("Doubt of people and of the model", header, tuple(table_text(row) for row in rows))
