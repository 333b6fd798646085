"""Drift detection for classifiers whose accuracy falls below their confidence, with a bound on false alarms."""

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.evaluation.inputs import Array, as_probs, as_targets

MIXTURES = (0.05, 0.2, 0.8)  # ε_j: weights of the uniform distribution in the alternatives
MAX_STATISTIC = sys.float_info.max


class DriftAlarm(NamedTuple):
    """The statistic of a drift detector over a stream of T examples, and its alarms.

    Attributes:
        statistic: R after each example, (T,), at most three times the threshold. It restarts from zero after an alarm.
        threshold: Value of R that raises an alarm; a lower bound on the mean number of examples between false alarms.
        alarms: Indices of the examples that raised an alarm, (A,).
    """

    statistic: Tensor
    threshold: float
    alarms: Tensor


class DriftDetector:
    """The detector of `drift_alarm` for one example at a time.

    Args:
        run_length: A, a lower bound on the mean number of examples between false alarms.
        current: Statistics R_j of an earlier detector to continue from, (3,); zeros by default.

    Raises:
        ValueError: If `run_length` is not above one or `current` is not three finite numbers >= 0.

    Example:
        >>> detector = DriftDetector(run_length=50.0)
        >>> [detector.update(0.01, 2) for _ in range(3)]
        [False, True, False]
    """

    def __init__(self, run_length: float = 10_000.0, current: Sequence[float] | None = None) -> None:
        if not run_length > 1:
            raise ValueError(f"`run_length` must be above one, got {run_length!r}.")
        start = [0.0] * len(MIXTURES) if current is None else [float(value) for value in current]
        if len(start) != len(MIXTURES) or not all(0 <= value < math.inf for value in start):
            raise ValueError(f"`current` must be {len(MIXTURES)} finite numbers >= 0, got {current!r}.")
        self.run_length, self.current = float(run_length), start

    @property
    def statistic(self) -> float:
        """The Shiryaev-Roberts statistic R, averaged over the alternatives."""
        return sum(self.current) / len(self.current)

    def update(self, prob: float, num_classes: int) -> bool:
        """Whether this example raises an alarm; after an alarm, the next example restarts the statistic from zero.

        Args:
            prob: Predicted probability of the observed label.
            num_classes: The number of classes, C.

        Raises:
            ValueError: If `prob` is not a probability.
        """
        if not 0 <= prob <= 1 + 1e-6:
            raise ValueError(f"`prob` must be a probability, got {prob!r}.")
        before = [0.0] * len(MIXTURES) if self.statistic >= self.run_length else self.current
        if prob == 0:
            self.current = [min(self.run_length, MAX_STATISTIC)] * len(MIXTURES)
        else:
            ratios = [1 - share + share / num_classes / prob for share in MIXTURES]
            limit = min(len(MIXTURES) * self.run_length, MAX_STATISTIC)  # one R_j at the limit raises the alarm alone
            self.current = [min((value + 1) * ratio, limit) for value, ratio in zip(before, ratios, strict=True)]
        return self.statistic >= self.run_length


def drift_alarm(probs: Array, labels: Array, run_length: float = 10_000.0) -> DriftAlarm:
    """Alarms of a Shiryaev-Roberts detector for labels that are less probable than predicted.

    Example t has likelihood ratios e_j = ((1 − ε_j) π_t(y_t) + ε_j/C) / π_t(y_t): mixtures of the prediction π_t with
    the uniform distribution against the prediction. If the labels follow the predictions, every e_j has conditional
    mean one. Then R_t = mean_j R_jt with R_jt = (R_j,t−1 + 1) e_j has mean t, so an alarm at R ≥ A occurs at most once
    in A examples on average, and within T examples with probability at most T/A. The bound needs no assumption about
    the stream or the model. An alarm without a change of the stream means that the predictions were over-confident.

    Args:
        probs: Probabilities predicted before the update with each label, (T, C).
        labels: Class indices, (T,).
        run_length: A, a lower bound on the mean number of examples between false alarms.

    Raises:
        ValueError: If shapes do not fit, rows are not distributions, or `run_length` is not above one.

    References: Roberts, *A Comparison of Some Control Chart Procedures*, Technometrics 1966; the bound on false alarms:
    Shin, Ramdas, Rinaldo, *E-detectors*, 2022 (arXiv:2203.03532).

    Example:
        >>> probs = torch.tensor([[0.99, 0.01]]).repeat(40, 1)
        >>> drift_alarm(probs, torch.zeros(40, dtype=torch.int64), run_length=500.0).alarms
        tensor([], dtype=torch.int64)
        >>> drift_alarm(probs, torch.arange(40) // 20, run_length=500.0).alarms[0]
        tensor(21)
    """
    detector = DriftDetector(run_length)
    predicted = as_probs(probs)
    observed = as_targets(labels, predicted, "labels")
    label_probs = (predicted / predicted.sum(1, keepdim=True)).gather(1, observed.unsqueeze(1)).squeeze(1)
    statistic, alarms = torch.empty(len(label_probs), dtype=predicted.dtype), []
    for t, prob in enumerate(label_probs.tolist()):
        if detector.update(prob, predicted.shape[1]):
            alarms.append(t)
        statistic[t] = detector.statistic
    return DriftAlarm(statistic, detector.run_length, torch.tensor(alarms, dtype=torch.int64))
