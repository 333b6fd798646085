"""Split-conformal prediction: sets that hold the truth as often as they should, whatever the model is worth.

They are fitted on examples that the model did not learn from. If those and the new ones are exchangeable (drawn from
the same source, say), a new target is inside with probability at least `level`, and at most `level` + 1/(n + 1) where
no two scores tie; n is the number of examples of the fit. That holds on average over fits and examples, not for each
class or input.
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
from bayes_kf.evaluation.recalibration.vector_scaling import check_num_classes

Score = Literal["lac", "aps"]
SCORES = ("lac", "aps")


class SetCoverage(NamedTuple):
    """What prediction sets did on a test set."""

    coverage: float  # share of labels inside their sets
    mean_size: float  # classes in a set
    empty: float  # share of sets that hold no class


@dataclass(frozen=True)
class ConformalSets:
    """Sets of classes that hold the label with probability `level`. Make it with `fit`.

    A class belongs to the set where its score does not exceed the threshold. Scores: "lac" is 1 − p_c, which makes
    small sets; "aps" is the probability of all classes before c in descending order plus u p_c, u uniform and one for
    each example, which makes sets grow with how hard the input is. Sets of either may be empty. Among classes of equal
    probability the first ones come first.

    Attributes:
        level: Probability that a label is inside.
        score: "lac" or "aps".
        threshold: The ⌈(n + 1) level⌉-th smallest score of the n labels of the fit; infinite where n is too small, and
            sets then hold every class.
        num_classes: C.
        split: Name of the examples of the fit.
        num_examples: n.
        seed: Of the random numbers of "aps"; those of the fit and of the sets differ.

    Reference: lac: Sadinle, Lei, Wasserman 2019; aps: Romano, Sesia, Candès, *Classification with valid and adaptive
    coverage*, 2020; both: Angelopoulos, Bates 2023.
    """

    level: float
    score: Score
    threshold: float
    num_classes: int
    split: str
    num_examples: int
    seed: int

    @classmethod
    def fit(
        cls,
        probs: Array,
        targets: Array,
        *,
        level: float = 0.9,
        score: Score = "lac",
        split: str = "calibration",
        seed: int = 0,
    ) -> "ConformalSets":
        """The threshold from the scores of known labels.

        Args:
            probs: Class probabilities, (N, C).
            targets: Class indices, (N,).
            level: Probability that a label is to be inside its set.
            score: "lac" or "aps".
            split: Name of these examples, for the report.
            seed: Of the random numbers of "aps".

        Raises:
            ValueError: If an argument is malformed.

        Example:
            >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]])
            >>> ConformalSets.fit(probs, torch.tensor([0, 0, 0, 0]), level=0.75).sets(probs).tolist()
            [[True, False], [True, False], [True, True], [True, True]]
        """
        check_fraction(level, "level")
        check_choice(score, "score", SCORES)
        checked = as_probs(probs)
        labels = as_targets(targets, checked)
        of_labels = _scores(checked, score, [seed, 0]).gather(1, labels[:, None])[:, 0]
        return cls(level, score, conformal_threshold(of_labels, level), checked.shape[1], split, len(labels), seed)

    def sets(self, probs: Array) -> Tensor:
        """Which classes belong to each example's set, bool (N, C).

        Every call draws the same random numbers, so hand in all examples of a test at once.

        Args:
            probs: Class probabilities, (N, C).

        Raises:
            ValueError: If they are malformed or of another number of classes.
        """
        return _scores(check_num_classes(probs, self.num_classes), self.score, [self.seed, 1]) <= self.threshold


def coverage_and_size(sets: Array, targets: Array) -> SetCoverage:
    """Share of labels inside their sets, mean number of classes in a set, and share of empty sets.

    Args:
        sets: Which classes belong to each example's set, bool (N, C).
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
    """Lowest and highest coverage that conformal sets or intervals would show on a test set by chance alone.

    With k = ⌈(n + 1) level⌉ and scores that do not tie, the number of targets inside follows the beta-binomial law of k
    and n + 1 − k, whatever the model: the threshold varies with the n examples of the fit, the count with those of the
    test. An end belongs to the band where more than half of its probability does, as in `coverage_null`.

    Args:
        level: Probability that a target is to be inside.
        num_fitted: n, examples of the fit.
        num_examples: Examples of the test.
        probability: That of the band.

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
    chance, tail = scipy.stats.betabinom(num_examples, rank, num_fitted + 1 - rank), (1 - probability) / 2
    low, high = chance.ppf(tail), chance.ppf(1 - tail)
    low += chance.cdf(low) - chance.pmf(low) / 2 < tail
    high -= chance.sf(high) + chance.pmf(high) / 2 < tail
    return float(low) / num_examples, float(high) / num_examples


def conformal_threshold(scores: Tensor, level: float) -> float:
    """The ⌈(n + 1) level⌉-th smallest of the scores (n,); infinite where there are too few."""
    rank = _rank(level, len(scores))
    return scores.kthvalue(rank).values.item() if rank <= len(scores) else math.inf


def coverage_and_sizes(sets: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each label is inside its set, and the size of each set, both float64 (N,)."""
    return sets.gather(1, labels[:, None])[:, 0].double(), sets.sum(dim=1).double()


def _rank(level: float, num_examples: int) -> int:
    """⌈(n + 1) level⌉, at least one; a product a rounding above a whole number is that."""
    return max(1, math.ceil((num_examples + 1) * level - 1e-9))


def _scores(probs: Tensor, score: Score, seed: list[int]) -> Tensor:
    """The score of every class, (N, C)."""
    if score == "lac":
        return 1 - probs
    ordered, order = probs.sort(dim=1, descending=True, stable=True)
    uniform = torch.from_numpy(np.random.default_rng(seed).random(len(probs)))[:, None]
    before = ordered.cumsum(dim=1) - ordered
    return torch.empty_like(probs).scatter_(1, order, before + uniform * ordered)
