"""A rule that answers only where it may: the error rate among its answers is bounded, for any model.

The fit needs held-out examples that the model was not trained on, from the distribution of the new ones. Its promise is
distribution-free: with probability at least `level` over the held-out examples, the error rate among answers is at most
`risk`. The rule answers where the confidence reaches a threshold, and the fit looks for the lowest threshold that it
can promise. For a fixed threshold the errors among n answers are binomial, so the p-value of "the error rate is above
the risk" is P(Binomial(n, risk) ≤ errors). The thresholds are a fixed grid, and are tested downward in fixed sequences
from a few of its points, which share 1 − level (Angelopoulos et al. 2021, *Learn then test*).
"""

import math
from dataclasses import dataclass

import scipy
from torch import Tensor

from bayes_kf.evaluation.inputs import Array, as_vector, check_fraction

THRESHOLDS = 200  # steps of the grid between 0 and 1
STARTS = (199, 196, 190, 180, 160, 140, 100, 50)  # of the sequences, as numbers of the grid


@dataclass(frozen=True)
class AbstentionRule:
    """Answers where the confidence is at least a threshold, abstains elsewhere. Create it with `fit`.

    Attributes:
        risk: Largest error rate among answers.
        level: Probability, over the held-out examples, with which that holds.
        threshold: Least confidence of an answer; infinite if no threshold can be promised, so that the rule abstains.
        answered: Share of the held-out examples that it answers.
        error_rate: Share of wrong ones among these; NaN if there are none.
        num_examples: Number of the held-out examples.

    Reference: Angelopoulos, Bates, Candès, Jordan, Lei, *Learn then test*, 2021; Geifman, El-Yaniv, *Selective
    classification for deep neural networks*, 2017.
    """

    risk: float
    level: float
    threshold: float
    answered: float
    error_rate: float
    num_examples: int

    @classmethod
    def fit(cls, confidence: Array, correct: Array, *, risk: float = 0.05, level: float = 0.9) -> "AbstentionRule":
        """The rule with the lowest threshold that held-out examples allow.

        Args:
            confidence: Of held-out predictions, (N,), between 0 and 1: the probability of the predicted class, or 1
                less an uncertainty of that range.
            correct: Whether each prediction is right, (N,).
            risk: Largest error rate among answers, between 0 and 1.
            level: Probability with which that must hold, between 0 and 1.

        Raises:
            ValueError: If an argument is out of range, the lengths differ, or there are no examples.

        Example:
            >>> import torch
            >>> confidence = torch.linspace(0, 1, 1000)
            >>> rule = AbstentionRule.fit(confidence, confidence > 0.5, risk=0.1)
            >>> round(rule.threshold, 3), round(rule.answered, 2)
            (0.465, 0.54)
        """
        check_fraction(risk, "risk")
        check_fraction(level, "level")
        given, right = _checked(confidence), as_vector(correct, "correct")
        if len(given) != len(right) or not len(given):
            raise ValueError(f"`correct` must be as many as `confidence`, {len(given)}, and some, got {len(right)}.")
        if not bool(((right == 0) | (right == 1)).all()):
            raise ValueError("`correct` must hold 0 and 1 alone, got other numbers.")
        threshold = math.inf
        for start in STARTS:
            for step in range(start, -1, -1):
                candidate = step / THRESHOLDS
                answers = given >= candidate
                errors = float((answers & (right == 0)).sum())
                p_value = float(scipy.stats.binom.cdf(errors, int(answers.sum()), risk))
                if p_value > (1.0 - level) / len(STARTS):
                    break
                threshold = min(threshold, candidate)
        answers = given >= threshold
        wrong = float((right[answers] == 0).double().mean()) if bool(answers.any()) else math.nan
        return cls(risk, level, threshold, float(answers.double().mean()), wrong, len(given))

    def answers(self, confidence: Array) -> Tensor:
        """Whether the rule answers each example, (N,) bool; arguments as for `fit`."""
        return _checked(confidence) >= self.threshold

    @property
    def least_examples(self) -> int:
        """Answers without an error that the fit needs before it can promise anything."""
        return math.ceil(math.log((1.0 - self.level) / len(STARTS)) / math.log(1.0 - self.risk))


def _checked(confidence: Array) -> Tensor:
    given = as_vector(confidence, "confidence")
    if bool(((given < 0) | (given > 1)).any()):
        raise ValueError("`confidence` must lie between 0 and 1, got a number outside.")
    return given
