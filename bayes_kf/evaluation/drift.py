"""An alarm for classifiers that have become less right than they say, with a guaranteed rate of false alarms."""

from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.evaluation._inputs import Array, as_probs, as_targets

MIXTURES = (0.05, 0.2, 0.8)  # shares of the uniform distribution in the alternatives


class DriftAlarm(NamedTuple):
    """A detector's course over a stream of T examples.

    Attributes:
        statistic: R after each example, (T,); it starts again at zero after an alarm.
        threshold: at which an alarm is raised, the least mean number of examples between false alarms.
        alarms: indices of the examples that raised one, (A,).
    """

    statistic: Tensor
    threshold: float
    alarms: Tensor


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
    if not run_length > 1:
        raise ValueError(f"`run_length` must be above one, got {run_length!r}.")
    predicted = as_probs(probs)
    observed = as_targets(labels, predicted, "labels")
    chosen = (predicted / predicted.sum(1, keepdim=True)).gather(1, observed.unsqueeze(1))  # (T, 1)
    shares = torch.tensor(MIXTURES, dtype=predicted.dtype)
    flat = shares / predicted.shape[1]
    ratios = torch.where(chosen > 0, 1 - shares + flat / chosen, torch.inf)  # (T, J)
    current, statistic, alarms = torch.zeros_like(shares), torch.empty(len(ratios), dtype=predicted.dtype), []
    for t, ratio in enumerate(ratios):
        current = (current + 1) * ratio
        statistic[t] = current.mean()
        if bool(statistic[t] >= run_length):
            alarms.append(t)
            current = torch.zeros_like(shares)
    return DriftAlarm(statistic, float(run_length), torch.tensor(alarms, dtype=torch.int64))
