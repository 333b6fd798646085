"""Is a filter's uncertainty consistent with the errors it makes?"""

from typing import NamedTuple

import torch
from scipy.stats import chi2
from torch import Tensor

from bayes_kf.evaluation._inputs import Array, as_vector, check_fraction
from bayes_kf.evaluation.online import check_window


class InnovationHealth(NamedTuple):
    """Windowed innovation ratio and its band; every field (T − window + 1,)."""

    step: Tensor  # number of updates seen at the end of the window
    ratio: Tensor  # about one for a consistent filter
    low: Tensor
    high: Tensor


def innovation_health(nis: Array, dof: Array | int, window: int = 100, level: float = 0.95) -> InnovationHealth:
    """Windowed normalized innovation squared per degree of freedom, with the band of a consistent filter.

    For a consistent linear-Gaussian filter ν_k = uᵀS⁻¹u is χ² with d_k degrees of freedom, independently over k, so
    Σν / Σd over a window lies between the quantiles of χ²(Σd) / Σd. Above the band the filter is surer than its
    errors allow; below, less sure. Windows overlap, so neighbouring ratios are strongly dependent.

    Args:
        nis: ν of each update, (T,).
        dof: Degrees of freedom of each update, (T,), or one number for all.
        window: Updates in a window, at most T.
        level: Probability that a consistent filter stays in the band, at each step.

    Raises:
        ValueError: If a value is negative or not finite, a shape differs, or the window does not fit.

    Reference: Bar-Shalom, Li, Kirubarajan, *Estimation with Applications to Tracking and Navigation*, section 5.4.

    Example:
        >>> health = innovation_health(torch.tensor([1.0, 3.0, 2.0]), dof=2, window=3)
        >>> health.ratio.item(), round(health.low.item(), 3), round(health.high.item(), 3)
        (1.0, 0.206, 2.408)
    """
    innovations, degrees = _checked(nis, dof)
    check_window(window, len(innovations))
    check_fraction(level, "level")
    window_dof = degrees.unfold(0, window, 1).sum(dim=1)
    ratio = innovations.unfold(0, window, 1).sum(dim=1) / window_dof
    tail = (1 - level) / 2
    low, high = (torch.as_tensor(chi2.ppf(q, window_dof.numpy())) / window_dof for q in (tail, 1 - tail))
    return InnovationHealth(torch.arange(window, len(innovations) + 1), ratio, low, high)


def _checked(nis: Array, dof: Array | int) -> tuple[Tensor, Tensor]:
    """Both as float64 (T,)."""
    innovations = as_vector(nis, "nis")
    if innovations.min() < 0:
        raise ValueError(f"`nis` must not be negative, got {innovations.min().item():.3g}.")
    degrees = torch.as_tensor(dof, dtype=torch.float64)
    degrees = as_vector(degrees.expand(len(innovations)) if degrees.ndim == 0 else degrees, "dof")
    if len(degrees) != len(innovations):
        raise ValueError(f"`dof` must be one number or {len(innovations)} as `nis` has, got {len(degrees)}.")
    if degrees.min() <= 0:
        raise ValueError(f"`dof` must be positive, got {degrees.min().item():.3g}.")
    return innovations, degrees
