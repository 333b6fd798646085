"""Split-conformal intervals of real targets, with the coverage that `conformal_sets` describes."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.evaluation.inputs import Array, as_vector, check_fraction
from bayes_kf.evaluation.recalibration.conformal_sets import conformal_threshold


class Bounds(NamedTuple):
    """Ends of intervals, each (N,)."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class ConformalIntervals:
    """Intervals mean ± threshold · scale that contain a real target with probability `level`. Create it with `fit`.

    Attributes:
        level: Probability that a target is in its interval.
        threshold: The ⌈(n + 1) level⌉-th smallest |target − mean|/scale of the fit; infinite if n is too small.
        is_scaled: Whether the fit had a scale for each example.
        split: Name of the examples of the fit.
        num_examples: Their number, n.

    Reference: Lei et al., *Distribution-free predictive inference for regression*, 2018.
    """

    level: float
    threshold: float
    is_scaled: bool
    split: str
    num_examples: int

    @classmethod
    def fit(
        cls,
        mean: Array,
        targets: Array,
        scale: Array | None = None,
        *,
        level: float = 0.9,
        split: str = "calibration",
    ) -> "ConformalIntervals":
        """The intervals whose threshold is the conformal quantile of the scaled errors.

        Args:
            mean: Predicted means, (N,).
            targets: Observed targets, (N,).
            scale: Positive scales, (N,), for example predictive standard deviations; ones by default.
            level: Required probability that a target is in its interval.
            split: Name of these examples, for the report.

        Raises:
            ValueError: If an argument is malformed.

        Example:
            >>> conformal = ConformalIntervals.fit(torch.zeros(4), torch.tensor([1.0, -3.0, 2.0, 0.5]), level=0.75)
            >>> conformal.intervals(torch.tensor([5.0]))
            Bounds(low=tensor([2.], dtype=torch.float64), high=tensor([8.], dtype=torch.float64))
        """
        check_fraction(level, "level")
        center, scales = _center_and_scales(mean, scale)
        observed = as_vector(targets, "targets")
        _check_length(observed, center, "targets")
        scores = (observed - center).abs() / scales
        return cls(level, conformal_threshold(scores, level), scale is not None, split, len(scores))

    def intervals(self, mean: Array, scale: Array | None = None) -> Bounds:
        """Lower and upper ends, each (N,).

        Args:
            mean: Predicted means, (N,).
            scale: Positive scales, (N,); required if the fit had them, not allowed otherwise.

        Raises:
            ValueError: If an argument is malformed.
        """
        if (scale is not None) != self.is_scaled:
            needed, got = ("given", "none") if self.is_scaled else ("left out", "one")
            raise ValueError(f"`scale` must be {needed} as it was for the fit, got {got}.")
        center, scales = _center_and_scales(mean, scale)
        return Bounds(center - self.threshold * scales, center + self.threshold * scales)


def _center_and_scales(mean: Array, scale: Array | None) -> tuple[Tensor, Tensor]:
    """Means and positive scales, each (N,)."""
    center = as_vector(mean, "mean")
    if scale is None:
        return center, torch.ones_like(center)
    scales = as_vector(scale, "scale")
    _check_length(scales, center, "scale")
    if scales.min() <= 0:
        raise ValueError(f"`scale` must be positive, got {scales.min().item():.3g}.")
    return center, scales


def _check_length(values: Tensor, mean: Tensor, name: str) -> None:
    """Raises a ValueError unless the vector has the length of the means."""
    if len(values) != len(mean):
        raise ValueError(f"`{name}` must have shape ({len(mean)},) as `mean` has, got ({len(values)},).")
