"""Recalibration: maps of class probabilities, fitted on held-out examples (neither training nor test data).

The fits maximize the likelihood. They need probabilities only: log p replaces the logits, which differ from it by a
constant per example. Probabilities below 1.4e-45, the smallest positive float32, count as 1.4e-45. On the examples of
the fit, no map has a higher log loss than the original probabilities.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import scipy
import torch
from torch import Tensor

from bayes_kf.evaluation.inputs import Array, as_probs, as_targets
from bayes_kf.evaluation.recalibration.log_probs import (
    check_num_classes,
    describe_fit,
    log_probs,
    log_probs_and_labels,
    mean_cross_entropy,
)
from bayes_kf.evaluation.recalibration.vector_scaling import VectorScaling

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0


class Recalibration(Protocol):
    """A fitted map of class probabilities."""

    @property
    def split(self) -> str:
        """Name of the examples of the fit."""

    @property
    def num_examples(self) -> int:
        """Number of examples of the fit."""

    @classmethod
    def fit(cls, probs: Array, targets: Array, split: str = "calibration") -> "Recalibration":
        """The map fitted to class probabilities, (N, C), and class indices, (N,)."""

    def __call__(self, probs: Array) -> Tensor:
        """Recalibrated probabilities, (N, C), float64."""

    def describe(self) -> str:
        """One sentence for the report."""


@dataclass(frozen=True)
class TemperatureScaling:
    """Probabilities p_c^(1/T), normalized: less confident if T > 1, more if T < 1. Create it with `fit`.

    Attributes:
        temperature: T, from 1/100 to 100; 1/100 if every label is the most probable class.
        split: Name of the examples of the fit.
        num_examples: Their number.

    Reference: Guo et al., *On calibration of modern neural networks*, 2017.
    """

    temperature: float
    split: str
    num_examples: int

    @classmethod
    def fit(cls, probs: Array, targets: Array, split: str = "calibration") -> "TemperatureScaling":
        """The temperature that minimizes the log loss, which is convex in 1/T.

        Args:
            probs: Class probabilities, (N, C).
            targets: Class indices, (N,).
            split: Name of these examples, for the report.

        Raises:
            ValueError: If an argument is malformed.

        Example:
            >>> scaling = TemperatureScaling.fit(torch.tensor([[0.9, 0.1]] * 4), torch.tensor([0, 0, 0, 1]))
            >>> round(scaling.temperature, 4)
            2.0
        """
        logs, labels = log_probs_and_labels(probs, targets)
        label_logs = logs.gather(1, labels[:, None])[:, 0]

        def slope(inverse: float) -> float:  # of the mean log loss; increases with 1/T
            scaled = (inverse * logs).softmax(dim=1)
            return ((scaled * logs).sum(dim=1) - label_logs).mean().item()

        low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
        if slope(low) >= 0:
            inverse = low
        elif slope(high) <= 0:
            inverse = high
        else:
            inverse = float(scipy.optimize.brentq(slope, low, high, xtol=1e-14, rtol=1e-14))
        if mean_cross_entropy(inverse * logs, labels) > mean_cross_entropy(logs, labels):  # rounding only
            inverse = 1.0
        return cls(1 / inverse, split, len(labels))

    def __call__(self, probs: Array) -> Tensor:
        """Recalibrated probabilities, (N, C), float64."""
        return (log_probs(as_probs(probs)) / self.temperature).softmax(dim=1)

    def describe(self) -> str:
        """One sentence for the report."""
        effect = "makes predictions less sure" if self.temperature > 1 else "makes predictions surer"
        if self.temperature == 1:
            effect = "changes nothing"
        fit = describe_fit(self.split, self.num_examples)
        return f"Temperature scaling, {fit}: T = {self.temperature:.3f}, which {effect}."


@dataclass(frozen=True, eq=False)
class IsotonicCalibration:
    """A non-decreasing map of each class's probability, then normalization. Create it with `fit`.

    If every class of an example maps to zero, the example keeps its original probabilities. The maps often start at
    exactly zero, so on new examples a label may get probability zero and the log loss may be infinite.

    Attributes:
        curves: Points (x, y) of each class's piecewise linear map.
        split: Name of the examples of the fit.
        num_examples: Their number.

    Reference: Zadrozny, Elkan, *Transforming classifier scores into accurate multiclass probability estimates*, 2002.
    """

    curves: tuple[tuple[np.ndarray, np.ndarray], ...]
    split: str
    num_examples: int

    @classmethod
    def fit(cls, probs: Array, targets: Array, split: str = "calibration") -> "IsotonicCalibration":
        """The isotonic regression of [label = c] on the probability of class c, for every class c.

        Isotonic regression also maximizes Σ (y log q − q) over all non-decreasing maps, and normalization by sums whose
        mean is one can only increase the likelihood. So the log loss on the fitted examples is never worse.

        Args:
            probs: Class probabilities, (N, C).
            targets: Class indices, (N,).
            split: Name of these examples, for the report.

        Raises:
            ValueError: If an argument is malformed.

        Example:
            >>> probs, targets = torch.tensor([[0.9, 0.1]] * 4), torch.tensor([0, 0, 0, 1])
            >>> IsotonicCalibration.fit(probs, targets)(probs[:1])
            tensor([[0.7500, 0.2500]], dtype=torch.float64)
        """
        from sklearn.isotonic import IsotonicRegression

        checked = as_probs(probs)
        labels = as_targets(targets, checked)
        curves = []
        for c, column in enumerate(checked.unbind(dim=1)):
            curve = IsotonicRegression(y_min=0, y_max=1).fit(column.numpy(), (labels == c).double().numpy())
            curves.append((curve.X_thresholds_, curve.y_thresholds_))
        return cls(tuple(curves), split, len(labels))

    def __call__(self, probs: Array) -> Tensor:
        """Recalibrated probabilities, (N, C), float64."""
        checked = check_num_classes(probs, len(self.curves))
        columns = [np.interp(p.numpy(), *curve) for p, curve in zip(checked.unbind(dim=1), self.curves, strict=True)]
        mapped = torch.from_numpy(np.stack(columns, axis=1))
        total = mapped.sum(dim=1, keepdim=True)
        return torch.where(total > 0, mapped / total, checked / checked.sum(dim=1, keepdim=True))

    def describe(self) -> str:
        """One sentence for the report."""
        return f"Isotonic calibration, {describe_fit(self.split, self.num_examples)}: a rising curve for each class."


RECALIBRATIONS: dict[str, type[Recalibration]] = {
    "temperature": TemperatureScaling,
    "vector": VectorScaling,
    "isotonic": IsotonicCalibration,
}
