"""Split-conformal intervals of real values; what they promise stands in `conformal`."""

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
    """Intervals mean ± threshold · scale that hold a real target with probability `level`. Make it with `fit`.

    Attributes:
        level: Probability that a target is inside.
        threshold: The ⌈(n + 1) level⌉-th smallest |target − mean|/scale of the fit; infinite where n is too small.
        is_scaled: Whether a scale was given for each example.
        split: Name of the examples of the fit.
        num_examples: n.

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
        """The threshold from the errors of known targets.

        Args:
            mean: Predicted means, (N,).
            targets: What came, (N,).
            scale: Positive widths, (N,), for example predictive standard deviations; all one by default.
            level: Probability that a target is to be inside its interval.
            split: Name of these examples, for the report.

        Raises:
            ValueError: If an argument is malformed.

        Example:
            >>> found = ConformalIntervals.fit(torch.zeros(4), torch.tensor([1.0, -3.0, 2.0, 0.5]), level=0.75)
            >>> found.intervals(torch.tensor([5.0]))
            Bounds(low=tensor([2.], dtype=torch.float64), high=tensor([8.], dtype=torch.float64))
        """
        check_fraction(level, "level")
        centre, widths = _centre_and_widths(mean, scale)
        observed = as_vector(targets, "targets")
        _check_length(observed, centre, "targets")
        scores = (observed - centre).abs() / widths
        return cls(level, conformal_threshold(scores, level), scale is not None, split, len(scores))

    def intervals(self, mean: Array, scale: Array | None = None) -> Bounds:
        """Lower and upper ends, each (N,).

        Args:
            mean: Predicted means, (N,).
            scale: Positive widths, (N,), just where the fit had them.

        Raises:
            ValueError: If an argument is malformed.
        """
        if (scale is not None) != self.is_scaled:
            wanted, got = ("given", "none") if self.is_scaled else ("left out", "one")
            raise ValueError(f"`scale` must be {wanted} as it was for the fit, got {got}.")
        centre, widths = _centre_and_widths(mean, scale)
        return Bounds(centre - self.threshold * widths, centre + self.threshold * widths)


def _centre_and_widths(mean: Array, scale: Array | None) -> tuple[Tensor, Tensor]:
    """Means and positive widths, each (N,)."""
    centre = as_vector(mean, "mean")
    if scale is None:
        return centre, torch.ones_like(centre)
    widths = as_vector(scale, "scale")
    _check_length(widths, centre, "scale")
    if widths.min() <= 0:
        raise ValueError(f"`scale` must be positive, got {widths.min().item():.3g}.")
    return centre, widths


def _check_length(values: Tensor, mean: Tensor, name: str) -> None:
    """Refuses a vector of another length than the means."""
    if len(values) != len(mean):
        raise ValueError(f"`{name}` must have shape ({len(mean)},) as `mean` has, got ({len(values)},).")
