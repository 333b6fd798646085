"""Comparison of several models on one test set: paired differences with simultaneous intervals, and a ranking."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import scipy
import torch
from torch import Tensor

from bayes_kf.evaluation.calibration.intervals import (
    MIN_LOSSES,
    bounded_interval,
    difference_interval,
    skewed_interval,
)
from bayes_kf.evaluation.calibration.rank_intervals import auroc_parts
from bayes_kf.evaluation.classification.entropy import entropy, max_probability
from bayes_kf.evaluation.classification.scores import brier_scores, log_losses
from bayes_kf.evaluation.classification.selective import aurc_influence
from bayes_kf.evaluation.inputs import Array, as_probs, as_targets, check_fraction
from bayes_kf.evaluation.score import Interval
from bayes_kf.evaluation.score_comparison import Difference, ScoreComparison, ranked_comparison

COMPARED = ("nll", "brier", "accuracy")
SELECTIVE = "aurc"
MIN_INPUTS = 10  # fewer of either kind have no clear difference of AUROCs


def compare_predictions(
    probs: Mapping[str, Array],
    targets: Array,
    *,
    scores: Sequence[str] = COMPARED,
    ood: Mapping[str, Mapping[str, Array]] | None = None,
    level: float = 0.95,
) -> dict[str, ScoreComparison]:
    """Pairwise comparison of several models' class probabilities for the same examples.

    Differences are paired by example. The intervals of all pairs and scores hold *simultaneously* with probability
    `level` (Bonferroni): if all models are equally good, a clear difference appears in at most 1 − `level` of data
    sets. Two models whose interval contains zero are tied. With fewer than 50 examples, log losses differ clearly only
    if one of them is infinite.

    Calibration errors are not compared: nominal 95 % bootstrap intervals of the difference of two ECEs covered the true
    difference in 47 to 93 % of simulated data sets.

    Args:
        probs: Name of at least two models to class probabilities, (N, C); C may differ.
        targets: Class indices, (N,).
        scores: Any of "nll", "brier", "accuracy" and "aurc", the area under the risk-coverage curve of the
            confidence, with intervals by its influence function.
        ood: Name of a set of out-of-distribution inputs to the class probabilities of each model for them, (M, C). The
            AUROC of their detection by entropy is compared by DeLong's test for paired curves.
        level: Probability that all intervals cover.

    Returns:
        Name of the score to its comparison. A difference from an infinite loss is infinite, or NaN between two of them.

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> import torch
        >>> sharp = torch.tensor([[0.9, 0.1]] * 80)
        >>> labels = torch.tensor([0] * 72 + [1] * 8)
        >>> comparisons = compare_predictions({"sharp": sharp, "uniform": torch.full((80, 2), 0.5)}, labels)
        >>> comparisons["nll"].best, comparisons["accuracy"].best
        (('sharp',), ('sharp', 'uniform'))
    """
    if len(probs) < 2:
        raise ValueError(f"`probs` must hold at least two models, got {len(probs)}.")
    known = (*COMPARED, SELECTIVE)
    unknown = [name for name in scores if name not in known]
    if unknown or not scores:
        raise ValueError(f"`scores` must be among {', '.join(known)}, got {', '.join(unknown) or 'none'}.")
    check_fraction(level, "level")
    checked = {str(name): as_probs(values, f"probs[{name!r}]") for name, values in probs.items()}
    labels = {name: as_targets(targets, values) for name, values in checked.items()}
    pairs = list(combinations(checked, 2))
    foreign = _checked_ood(ood or {}, checked)
    pair_level = 1 - (1 - level) / (len(pairs) * (len(set(scores)) + len(foreign)))
    comparisons = {}
    for score in scores:
        per_example = {name: _example_scores(score, checked[name], labels[name]) for name in checked}
        values = {name: column.mean().item() for name, column in per_example.items()}
        differences = []
        for i, j in pairs:
            interval = _interval(score, per_example[i] - per_example[j], checked[i], checked[j], pair_level)
            differences.append(Difference(i, j, values[i] - values[j], *interval))
        comparisons[score] = ranked_comparison(score, values, differences)
    for set_name, models in foreign.items():
        parts = {name: auroc_parts(entropy(checked[name]), entropy(own)) for name, own in models.items()}
        values = {name: above.mean().item() for name, (_, above) in parts.items()}
        differences = [
            Difference(i, j, values[i] - values[j], *_auroc_interval(parts[i], parts[j], pair_level)) for i, j in pairs
        ]
        score = f"ood_{set_name}_auroc"
        comparisons[score] = ranked_comparison(score, values, differences)
    return comparisons


def _checked_ood(ood: Mapping[str, Mapping[str, Array]], models: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Class probabilities of every set and model."""
    found = {}
    for name, given in ood.items():
        if {str(model) for model in given} != set(models):
            raise ValueError(f"`ood[{name!r}]` must hold the models {', '.join(models)}, got {', '.join(given)}.")
        own = {str(model): as_probs(values, f"ood[{name!r}][{model!r}]") for model, values in given.items()}
        if len({len(values) for values in own.values()}) > 1:
            raise ValueError(f"`ood[{name!r}]` must hold the same inputs for every model, got different numbers.")
        found[str(name)] = own
    return found


def _auroc_interval(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], level: float) -> Interval:
    """Interval of a difference of paired AUROCs (DeLong et al. 1988), with Student's t of the smaller number."""
    inside, outside = first[0] - second[0], first[1] - second[1]
    value, fewest = outside.mean().item(), min(len(inside), len(outside))
    if fewest < MIN_INPUTS:
        return Interval(-1.0, 1.0)
    variance = sum(part.var().item() / len(part) for part in (inside, outside))
    half = float(scipy.stats.t.ppf((1 + level) / 2, fewest - 1)) * math.sqrt(variance)
    return Interval(value - half, value + half)


def _example_scores(score: str, probs: Tensor, labels: Tensor) -> Tensor:
    """The score of each example for checked probabilities, (N,); of the AURC, the AURC plus its influence function."""
    if score == "nll":
        return log_losses(probs, labels)
    if score == SELECTIVE:
        return aurc_influence(max_probability(probs), probs.argmax(dim=1) == labels)
    return brier_scores(probs, labels) if score == "brier" else (probs.argmax(dim=1) == labels).double()


def _interval(score: str, change: Tensor, first: Tensor, second: Tensor, level: float) -> Interval:
    """Interval of the mean of paired differences (N,)."""
    mean = change.mean().item()
    if not change.isfinite().all():  # a loss is infinite
        return Interval(mean, mean)
    if torch.equal(first, second):
        return Interval(0.0, 0.0)
    if score == "nll":
        return difference_interval(change, first, second, level)
    if score == SELECTIVE:
        return skewed_interval(change, level)
    if score == "accuracy" or len(change) < MIN_LOSSES or first.shape != second.shape:
        bound = 1.0 if score == "accuracy" else 2.0
        return bounded_interval(change.sum().item(), change.square().sum().item(), len(change), -bound, bound, level)
    shift = first.square().sum(dim=1) - second.square().sum(dim=1)
    possible = shift[:, None] - 2 * (first - second)  # (N, C): the difference if this class were the label
    below, above = possible.amin(dim=1).mean().item(), possible.amax(dim=1).mean().item()
    return skewed_interval(change, level, below=below, above=above)
