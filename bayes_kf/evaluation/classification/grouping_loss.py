"""Grouping loss: examples of one confidence that differ in accuracy, which calibration cannot see."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayes_kf.evaluation.classification.ood_detection import as_correct
from bayes_kf.evaluation.inputs import Array, as_float, as_vector, check_positive_int
from bayes_kf.evaluation.resampling.binning import EDGE_TOLERANCE, bin_index, equal_width_edges

MIN_IN_BIN = 20  # a bin with fewer examples has no groups
MIN_IN_GROUP = 10  # examples of the fitted half


class GroupingLoss(NamedTuple):
    """The part of the Brier score of "is it right?" that groups of the features explain beyond the confidence.

    `value` is `explained` minus `bias`, what groups without a difference would explain on so few examples; it may be
    slightly negative.
    """

    value: float
    explained: float
    bias: float


def grouping_loss(
    confidence: Array, correct: Array, features: Array, *, num_bins: int = 15, num_groups: int = 8, seed: int = 0
) -> GroupingLoss:
    """A lower bound of the grouping loss: how much accuracies differ between examples of the same confidence.

    In each bin of the confidence a decision tree on the features finds groups on one half of the examples, and the
    variance of their accuracies is measured on the other half, without the variance of the sampling. A calibrated model
    can have a large grouping loss: it is over-confident for some inputs and under-confident for others.

    Args:
        confidence: Probability of the predicted class, (N,).
        correct: One (or True) for each correct prediction, else zero, (N,).
        features: What may tell the examples apart, (N, D), for example the model's last hidden layer.
        num_bins: Number of bins of equal width.
        num_groups: Largest number of groups in a bin.
        seed: Seed of the halves.

    Raises:
        ValueError: If an argument is malformed.

    Reference: Perez-Lebel, Le Morvan, Varoquaux, *Beyond calibration: estimating the grouping loss of modern neural
    networks*, 2023.

    Example:
        >>> side = torch.arange(400) % 2  # half of them are always right, half never, all at a confidence of 0.5
        >>> round(grouping_loss(torch.full((400,), 0.5), side, side[:, None]).value, 2)
        0.25
    """
    from sklearn.tree import DecisionTreeClassifier

    sure = as_vector(confidence, "confidence")
    right = as_correct(correct, len(sure), "confidence").numpy()
    columns = as_float(features, "features")
    if columns.ndim != 2 or len(columns) != len(sure):
        raise ValueError(f"`features` must have shape ({len(sure)}, D), got {tuple(columns.shape)}.")
    check_positive_int(num_bins, "num_bins")
    check_positive_int(num_groups, "num_groups")
    places = bin_index(sure + EDGE_TOLERANCE, equal_width_edges(num_bins))
    order = torch.randperm(len(sure), generator=torch.Generator().manual_seed(seed))
    explained = bias = 0.0
    for own in (_members(places, order, b) for b in places.unique().tolist()):
        if len(own) < MIN_IN_BIN:
            continue
        fitted, tested = own[::2], own[1::2]
        tree = DecisionTreeClassifier(
            max_leaf_nodes=max(2, num_groups), min_samples_leaf=MIN_IN_GROUP, random_state=seed
        )
        tree.fit(columns[fitted].numpy(), right[fitted])
        leaves = np.unique(tree.apply(columns[tested].numpy()), return_inverse=True)[1]
        counts, hits = np.bincount(leaves), np.bincount(leaves, right[tested])
        accuracy, overall = hits / counts, hits.sum() / counts.sum()
        share, total = len(own) / len(sure), counts.sum()
        explained += share * float((counts * (accuracy - overall) ** 2).sum() / total)
        sampling = counts * accuracy * (1 - accuracy) / np.maximum(counts - 1, 1)  # of the accuracy of each group
        bias += share * float(sampling.sum() / total - overall * (1 - overall) / max(total - 1, 1))
    return GroupingLoss(explained - bias, explained, bias)


def _members(places: Tensor, order: Tensor, which: int) -> Tensor:
    """The examples of a bin in a random order."""
    return order[places[order] == which]
