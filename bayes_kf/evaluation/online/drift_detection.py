"""An alarm for classifiers that have become less right than they say, with a guaranteed rate of false alarms."""

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.evaluation.inputs import Array, as_probs, as_targets

MIXTURES = (0.05, 0.2, 0.8)  # shares of the uniform distribution in the alternatives
LARGEST = sys.float_info.max


class DriftAlarm(NamedTuple):
    """A detector's course over a stream of T examples.

    Attributes:
        statistic: R after each example, (T,), at most three times the threshold. It starts again at zero after an
            alarm.
        threshold: at which an alarm is raised, the least mean number of examples between false alarms.
        alarms: indices of the examples that raised one, (A,).
    """

    statistic: Tensor
    threshold: float
    alarms: Tensor


class DriftDetector:
    """The detector of :func:`drift_alarm`, one example at a time.

    Args:
        run_length: as there.
        current: R_j of an earlier one to go on from, (3,); zero by default.

    Raises:
        ValueError: if ``run_length`` is not above one, or ``current`` is not three finite numbers >= 0.

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
        """Take in the probability that was predicted for a label that came; whether that raises an alarm.

        After one the statistic starts again at zero, with the next example.
        """
        if not 0 <= prob <= 1 + 1e-6:
            raise ValueError(f"`prob` must be a probability, got {prob!r}.")
        before = [0.0] * len(MIXTURES) if self.statistic >= self.run_length else self.current
        if prob == 0:
            self.current = [min(self.run_length, LARGEST)] * len(MIXTURES)
        else:
            ratios = [1 - share + share / num_classes / prob for share in MIXTURES]
            most = min(len(MIXTURES) * self.run_length, LARGEST)  # one alone that reaches it raises an alarm
            self.current = [min((value + 1) * ratio, most) for value, ratio in zip(before, ratios, strict=True)]
        return self.statistic >= self.run_length


def drift_alarm(probs: Array, labels: Array, run_length: float = 10_000.0) -> DriftAlarm:
    """A Shiryaev-Roberts detector of labels that the predictions made too unlikely.

    Example t has likelihood ratios e_j = ((1 − ε_j) π_t(y_t) + ε_j/C) / π_t(y_t) of mixtures of the prediction with the
    uniform distribution to the prediction itself. If labels follow the predictions, each e_j has mean one whatever the
    past, R_t = mean_j R_jt with R_jt = (R_j,t−1 + 1) e_j has mean t, and so an alarm at R ≥ A comes at most once in A
    examples on average, and with probability at most T/A within T. Nothing is assumed of the stream or the model. An
    alarm without a change means that the predictions were overconfident all along.

    Args:
        probs: probabilities predicted before each label was learned from, (T, C).
        labels: (T,).
        run_length: A, least mean number of examples between false alarms.

    Raises:
        ValueError: if shapes do not fit, rows are no distributions, or ``run_length`` is not above one.

    References:
        Roberts, *A Comparison of Some Control Chart Procedures*, Technometrics 1966; the bound on false alarms for
        ratios of mean one: Shin, Ramdas, Rinaldo, *E-detectors*, 2022 (arXiv:2203.03532).

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
    chosen = (predicted / predicted.sum(1, keepdim=True)).gather(1, observed.unsqueeze(1)).squeeze(1)
    statistic, alarms = torch.empty(len(chosen), dtype=predicted.dtype), []
    for t, prob in enumerate(chosen.tolist()):
        if detector.update(prob, predicted.shape[1]):
            alarms.append(t)
        statistic[t] = detector.statistic
    return DriftAlarm(statistic, detector.run_length, torch.tensor(alarms, dtype=torch.int64))
