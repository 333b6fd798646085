"""Comparison of several models' predictions of real values on the same examples."""

from collections.abc import Mapping, Sequence
from itertools import combinations

from torch import Tensor

from bayes_kf.evaluation.calibration.intervals import skewed_interval
from bayes_kf.evaluation.score_comparison import Difference, ScoreComparison, ranked_comparison


def compare_losses(losses: Mapping[str, Mapping[str, Tensor]], *, level: float = 0.95) -> dict[str, ScoreComparison]:
    """Pairwise comparison of losses of the same examples; lower is better.

    The intervals of all pairs and scores hold simultaneously (Bonferroni), as in `compare_predictions`, by Student's
    interval with Hall's correction for skewness; fewer than 50 examples have no clear difference.

    Args:
        losses: Name of a score to the losses of each model, (N,).
        level: Probability that all intervals cover.
    """
    models = list(next(iter(losses.values())))
    pairs: Sequence[tuple[str, str]] = list(combinations(models, 2))
    pair_level = 1 - (1 - level) / (len(pairs) * len(losses))
    comparisons = {}
    for score, columns in losses.items():
        values = {name: column.mean().item() for name, column in columns.items()}
        differences = [
            Difference(i, j, values[i] - values[j], *skewed_interval(columns[i] - columns[j], pair_level))
            for i, j in pairs
        ]
        comparisons[score] = ranked_comparison(score, values, differences)
    return comparisons
