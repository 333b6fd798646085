"""Figure of the model's entropy against that of people's answers. It draws on `ax` (or a new one) and returns it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bayes_kf.evaluation.classification.entropy import entropy
from bayes_kf.evaluation.classification.human_agreement import check_human
from bayes_kf.evaluation.inputs import Array
from bayes_kf.evaluation.plots.style import axes_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GRID = 24  # hexagons across


def human_entropy_plot(probs: Array, human: Array, *, ax: Axes | None = None) -> Axes:
    """Two-dimensional histogram of the entropies of people's answers and of the prediction; darker cells hold more.

    Args:
        probs: Class probabilities, (N, C).
        human: Shares of people's answers, (N, C), rows sum to one.
        ax: Where to draw.

    Raises:
        ValueError: If an argument is malformed or the shapes differ.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2]])
        >>> ax = human_entropy_plot(probs, probs, ax=Figure().subplots())
        >>> ax.collections[0].get_array().sum().item()
        3.0
    """
    predicted, answers = check_human(probs, human)
    x, y = entropy(answers), entropy(predicted)
    top = max(x.max().item(), y.max().item(), 1e-6)
    ax = axes_or_new(ax)
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
