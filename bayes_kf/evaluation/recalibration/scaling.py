"""Recalibration: maps of class probabilities, fitted on examples that are neither learned from nor tested on.

Fits take the largest likelihood from probabilities alone: log p stands for logits, which differ from it by a number
that is equal for all classes of an example. Probabilities below 1.4e-45, the smallest that float32 can tell from zero,
count as that. On the examples of the fit no map's log loss exceeds that of the probabilities as they came, divided by
their sum.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import scipy
import torch
from torch import Tensor

from bayes_kf.evaluation.inputs import Array, as_probs, as_targets
from bayes_kf.evaluation.recalibration.vector_scaling import (
    VectorScaling,
    check_num_classes,
    describe_fit,
    log_probs,
    log_probs_and_labels,
    mean_cross_entropy,
)

COLDEST, HOTTEST = 0.01, 100.0


class Recalibration(Protocol):
    """What every recalibration offers."""

    @property
    def split(self) -> str:
        """Name of the examples of the fit."""

    @property
    def num_examples(self) -> int:
        """Number of the examples of the fit."""

    @classmethod
    def fit(cls, probs: Array, targets: Array, split: str = "calibration") -> "Recalibration":
        """Fitted to class probabilities, (N, C), and class indices, (N,)."""

    def __call__(self, probs: Array) -> Tensor:
        """Recalibrated probabilities, (N, C), float64."""

    def describe(self) -> str:
        """One sentence for the report."""


@dataclass(frozen=True)
class TemperatureScaling:
    """Probabilities p_c^(1/T), divided by their sum: less sure with T above one, surer below. Make it with `fit`.

    Attributes:
        temperature: T, from 1/100 to 100; where every label is the most probable class it is 1/100, the surest allowed.
        split: Name of the examples of the fit.
        num_examples: Their number.

    Reference: Guo et al., *On calibration of modern neural networks*, 2017.
    """

    temperature: float
    split: str
    num_examples: int

    @classmethod
    def fit(cls, probs: Array, targets: Array, split: str = "calibration") -> "TemperatureScaling":
        """The temperature of least log loss, which is convex in 1/T.

        Args:
            probs: Class probabilities, (N, C).
            targets: Class indices, (N,).
            split: Name of these examples, for the report.

        Raises:
            ValueError: If an argument is malformed.

        Example:
            >>> found = TemperatureScaling.fit(torch.tensor([[0.9, 0.1]] * 4), torch.tensor([0, 0, 0, 1]))
            >>> round(found.temperature, 4)
            2.0
        """
        logs, labels = log_probs_and_labels(probs, targets)
        chosen = logs.gather(1, labels[:, None])[:, 0]

        def slope(inverse: float) -> float:  # of the mean log loss; it rises with 1/T
            scaled = (inverse * logs).softmax(dim=1)
            return ((scaled * logs).sum(dim=1) - chosen).mean().item()

        low, high = 1 / HOTTEST, 1 / COLDEST
        if slope(low) >= 0:
            inverse = low
        elif slope(high) <= 0:
            inverse = high
        else:
            inverse = float(scipy.optimize.brentq(slope, low, high, xtol=1e-14, rtol=1e-14))
        if mean_cross_entropy(inverse * logs, labels) > mean_cross_entropy(logs, labels):  # by rounding only
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
        where = describe_fit(self.split, self.num_examples)
        return f"Temperature scaling, {where}: T = {self.temperature:.3f}, which {effect}."


@dataclass(frozen=True, eq=False)
class IsotonicCalibration:
    """Each class's probability through a rising curve of its own, then divided by the sum. Make it with `fit`.

    A row in which every class becomes zero keeps the probabilities as they came. Curves often start at exactly zero, so
    on other examples some label may have probability zero, and the log loss be infinite.

    Attributes:
        curves: Places and heights of each class's curve, straight in between.
        split: Name of the examples of the fit.
        num_examples: Their number.

    Reference: Zadrozny, Elkan, *Transforming classifier scores into accurate multiclass probability estimates*, 2002.
    """

    curves: tuple[tuple[np.ndarray, np.ndarray], ...]
    split: str
    num_examples: int

    @classmethod
    def fit(cls, probs: Array, targets: Array, split: str = "calibration") -> "IsotonicCalibration":
        """For every class, the rising curve nearest to whether the label is that class.

        Such curves also have the largest Σ (y log q − q) of all rising ones, for each class, and dividing by the sums,
        whose mean is one, can only gain: that is why the log loss of the fit is never worse.

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
        heights = torch.from_numpy(np.stack(columns, axis=1))
        total = heights.sum(dim=1, keepdim=True)
        return torch.where(total > 0, heights / total, checked / checked.sum(dim=1, keepdim=True))

    def describe(self) -> str:
        """One sentence for the report."""
        return f"Isotonic calibration, {describe_fit(self.split, self.num_examples)}: a rising curve for each class."


RECALIBRATIONS: dict[str, type[Recalibration]] = {
    "temperature": TemperatureScaling,
    "vector": VectorScaling,
    "isotonic": IsotonicCalibration,
}
