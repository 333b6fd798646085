"""Split-conformal prediction sets, whose coverage is valid for any model.

The fit needs held-out examples that the model was not trained on. If they and the new examples are exchangeable (for
example drawn from the same distribution), a new label is in its set with probability at least `level`, and at most
`level` + 1/(n + 1) if no scores tie; n is the number of examples of the fit. This coverage is marginal: it holds on
average over fits and examples, not for each class or input.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import scipy
import torch
from torch import Tensor

from bayes_kf.evaluation.inputs import (
    Array,
    as_probs,
    as_targets,
    check_choice,
    check_fraction,
    check_positive_int,
)
from bayes_kf.evaluation.recalibration.log_probs import check_num_classes

ConformityScore = Literal["lac", "aps", "raps"]
SCORES = ("lac", "aps", "raps")


class SetCoverage(NamedTuple):
    """Coverage and size of prediction sets on a test set."""

    coverage: float  # share of labels that are in their sets
    mean_size: float  # mean number of classes in a set
    empty: float  # share of empty sets


@dataclass(frozen=True)
class ConformalSets:
    """Sets of classes that contain the label with probability `level`. Create it with `fit`.

    A class is in the set if its conformity score is at most the threshold. The score "lac" is 1 − p_c and gives small
    sets. The score "aps" is the total probability of the classes before c in descending order plus u p_c, with one
    uniform number u per example; its sets grow with the difficulty of the input. The score "raps" adds `penalty` for
    every place of c in that order after the first `free` ones, which keeps sets small where there are many classes. All
    may give empty sets. Classes of equal probability are ordered by their index.

    Attributes:
        level: Probability that a label is in its set.
        score: "lac", "aps" or "raps".
        threshold: The ⌈(n + 1) level⌉-th smallest score of the n labels of the fit. If n is too small it is infinite,
            and every set contains every class.
        num_classes: The number of classes, C.
        split: Name of the examples of the fit.
        num_examples: Their number, n.
        seed: Seed of the uniform numbers of "aps" and "raps"; the fit and the sets use different numbers.
        penalty: Of "raps", for every place.
        free: Of "raps", places without a penalty.

    Reference: lac: Sadinle, Lei, Wasserman 2019; aps: Romano, Sesia, Candès, *Classification with valid and adaptive
    coverage*, 2020; raps: Angelopoulos, Bates, Malik, Jordan, *Uncertainty sets for image classifiers*, 2021;
    all: Angelopoulos, Bates 2023.
    """

    level: float
    score: ConformityScore
    threshold: float
    num_classes: int
    split: str
    num_examples: int
    seed: int
    penalty: float = 0.0
    free: int = 0

    @classmethod
    def fit(
        cls,
        probs: Array,
        targets: Array,
        *,
        level: float = 0.9,
        score: ConformityScore = "lac",
        split: str = "calibration",
        seed: int = 0,
        penalty: float = 0.01,
        free: int = 1,
    ) -> "ConformalSets":
        """The sets whose threshold is the conformal quantile of the labels' scores.

        Args:
            probs: Class probabilities, (N, C).
            targets: Class indices, (N,).
            level: Required probability that a label is in its set.
            score: "lac", "aps" or "raps".
            split: Name of these examples, for the report.
            seed: Seed of the uniform numbers of "aps" and "raps".
            penalty: Of "raps", for every place after the first `free` ones; not negative.
            free: Of "raps".

        Raises:
            ValueError: If an argument is malformed.

        Example:
            >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]])
            >>> ConformalSets.fit(probs, torch.tensor([0, 0, 0, 0]), level=0.75).sets(probs).tolist()
            [[True, False], [True, False], [True, True], [True, True]]
        """
        check_fraction(level, "level")
        check_choice(score, "score", SCORES)
        if penalty < 0 or free < 0:
            raise ValueError(f"`penalty` and `free` must not be negative, got {penalty!r} and {free!r}.")
        checked = as_probs(probs)
        labels = as_targets(targets, checked)
        penalty, free = (penalty, free) if score == "raps" else (0.0, 0)
        label_scores = _scores(checked, score, [seed, 0], penalty, free).gather(1, labels[:, None])[:, 0]
        threshold = conformal_threshold(label_scores, level)
        return cls(level, score, threshold, checked.shape[1], split, len(labels), seed, penalty, free)

    def sets(self, probs: Array) -> Tensor:
        """Membership of each class in each example's set, bool (N, C).

        Every call draws the same uniform numbers, so pass all test examples in one call.

        Args:
            probs: Class probabilities, (N, C).

        Raises:
            ValueError: If they are malformed or have another number of classes than the fit.
        """
        checked = check_num_classes(probs, self.num_classes)
        return _scores(checked, self.score, [self.seed, 1], self.penalty, self.free) <= self.threshold


def coverage_and_size(sets: Array, targets: Array) -> SetCoverage:
    """Share of labels in their sets, mean number of classes in a set, and share of empty sets.

    Args:
        sets: Membership of each class in each example's set, bool (N, C).
        targets: Class indices, (N,).

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> coverage_and_size(torch.tensor([[True, True], [False, False]]), torch.tensor([1, 1]))
        SetCoverage(coverage=0.5, mean_size=1.0, empty=0.5)
    """
    members = torch.as_tensor(sets).detach().cpu()
    if members.dtype != torch.bool or members.ndim != 2 or members.numel() == 0:
        raise ValueError(f"`sets` must be a boolean (N, C), got {members.dtype} of shape {tuple(members.shape)}.")
    covered, size = coverage_and_sizes(members, as_targets(targets, members))
    return SetCoverage(covered.mean().item(), size.mean().item(), (size == 0).double().mean().item())


def conformal_coverage_null(
    level: float, num_fitted: int, num_examples: int, probability: float = 0.95
) -> tuple[float, float]:
    """Null band of the coverage of conformal sets or intervals on a test set: lowest and highest value.

    If no scores tie, the number of covered targets has a beta-binomial distribution with parameters k = ⌈(n + 1) level⌉
    and n + 1 − k for any model: the threshold varies with the n examples of the fit, the count with the test examples.
    An end is in the band if more than half of its probability is, as in `coverage_null`.

    Args:
        level: Required probability that a target is covered.
        num_fitted: n, number of examples of the fit.
        num_examples: Number of test examples.
        probability: Probability of the band.

    Raises:
        ValueError: If a number is not positive or a level not between 0 and 1.

    Reference: Vovk 2012; Angelopoulos, Bates 2023.

    Example:
        >>> conformal_coverage_null(0.9, num_fitted=500, num_examples=1000)
        (0.867, 0.93)
    """
    check_fraction(level, "level")
    check_positive_int(num_fitted, "num_fitted")
    check_positive_int(num_examples, "num_examples")
    check_fraction(probability, "probability")
    rank = _rank(level, num_fitted)
    if rank > num_fitted:
        return 1.0, 1.0
    covered, tail = scipy.stats.betabinom(num_examples, rank, num_fitted + 1 - rank), (1 - probability) / 2
    low, high = covered.ppf(tail), covered.ppf(1 - tail)
    low += covered.cdf(low) - covered.pmf(low) / 2 < tail
    high -= covered.sf(high) + covered.pmf(high) / 2 < tail
    return float(low) / num_examples, float(high) / num_examples


def conformal_threshold(scores: Tensor, level: float) -> float:
    """The ⌈(n + 1) level⌉-th smallest of the scores (n,); infinite if n is too small."""
    rank = _rank(level, len(scores))
    return scores.kthvalue(rank).values.item() if rank <= len(scores) else math.inf


def coverage_and_sizes(sets: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each label is in its set, and the size of each set, both float64 (N,)."""
    return sets.gather(1, labels[:, None])[:, 0].double(), sets.sum(dim=1).double()


def _rank(level: float, num_examples: int) -> int:
    """⌈(n + 1) level⌉, at least one; a product within rounding of a whole number is not rounded up."""
    return max(1, math.ceil((num_examples + 1) * level - 1e-9))


def _scores(probs: Tensor, score: ConformityScore, seed: list[int], penalty: float, free: int) -> Tensor:
    """The conformity score of every class, (N, C)."""
    if score == "lac":
        return 1 - probs
    ordered, order = probs.sort(dim=1, descending=True, stable=True)
    uniform = torch.from_numpy(np.random.default_rng(seed).random(len(probs)))[:, None]
    before = ordered.cumsum(dim=1) - ordered
    extra = penalty * (torch.arange(1, probs.shape[1] + 1, dtype=torch.float64) - free).clamp_min(0)
    return torch.empty_like(probs).scatter_(1, order, before + uniform * ordered + extra)
