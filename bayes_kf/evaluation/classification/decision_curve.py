"""Decision curves: what acting on a probability is worth, against acting always and never."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.evaluation.inputs import Array, as_probs, as_targets, as_vector

THRESHOLDS = tuple(percent / 100 for percent in range(1, 100))


class DecisionCurve(NamedTuple):
    """Net benefit at each threshold, in true positives per example; all fields are (K,)."""

    thresholds: Tensor
    net_benefit: Tensor  # of acting where the probability reaches the threshold
    always: Tensor  # of acting on every example; never acting is worth 0


def decision_curve(
    probs: Array, targets: Array, positive: int = 1, thresholds: Sequence[float] = THRESHOLDS
) -> DecisionCurve:
    """Net benefit of acting on the examples whose probability of one class reaches a threshold.

    At the threshold t a false alarm costs t/(1 − t) of what a hit is worth, so the net benefit is
    TP/N − FP/N · t/(1 − t).

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).
        positive: The class on which one acts.
        thresholds: Each above 0 and below 1.

    Raises:
        ValueError: If an argument is malformed.

    Reference: Vickers, Elkin, *Decision curve analysis*, 2006.

    Example:
        >>> curve = decision_curve(torch.tensor([0.9, 0.6, 0.2]), torch.tensor([1, 0, 0]), thresholds=[0.5, 0.8])
        >>> [round(value, 3) for value in curve.net_benefit.tolist()]
        [0.0, 0.333]
    """
    checked = as_probs(probs)
    labels = as_targets(targets, checked)
    if not 0 <= positive < checked.shape[1]:
        raise ValueError(f"`positive` must be a class in 0..{checked.shape[1] - 1}, got {positive!r}.")
    levels = as_vector(torch.as_tensor(thresholds, dtype=torch.float64), "thresholds")
    if levels.min() <= 0 or levels.max() >= 1:
        raise ValueError(
            f"`thresholds` must lie between 0 and 1, got values in {levels.min():.3g}..{levels.max():.3g}."
        )
    cost = levels / (1 - levels)
    is_positive = labels == positive
    ordered = [checked[chosen, positive].sort().values for chosen in (is_positive, ~is_positive)]
    hits, alarms = (len(values) - torch.searchsorted(values, levels) for values in ordered)
    prevalence = is_positive.double().mean()
    count = len(labels)
    return DecisionCurve(levels, hits / count - alarms / count * cost, prevalence - (1 - prevalence) * cost)
