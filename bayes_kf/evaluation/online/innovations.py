"""Consistency of a filter: normalized innovations squared (NIS) and their whiteness."""

from typing import NamedTuple

import numpy as np
import scipy
import torch
from torch import Tensor

from bayes_kf.evaluation.inputs import Array, as_vector, check_fraction, check_positive_int
from bayes_kf.evaluation.online.prequential import check_window


class InnovationHealth(NamedTuple):
    """Windowed innovation ratio with its null band (consistent filter); every field is (T − window + 1,)."""

    step: Tensor  # number of updates at the end of the window
    ratio: Tensor  # about one for a consistent filter
    low: Tensor
    high: Tensor


def innovation_health(nis: Array, dof: Array | int, window: int = 100, level: float = 0.95) -> InnovationHealth:
    """Windowed normalized innovation squared per degree of freedom, with its null band (consistent filter).

    For a consistent linear-Gaussian filter ν_k = uᵀS⁻¹u is χ² with d_k degrees of freedom, independently over k, so
    Σν / Σd over a window has the distribution χ²(Σd) / Σd. Above the band the filter is over-confident, below it
    under-confident. Windows overlap, so neighbouring ratios are strongly dependent.

    Args:
        nis: ν of each update, (T,).
        dof: Degrees of freedom of each update, (T,), or one number for all.
        window: Number of updates in a window, at most T.
        level: Probability of the band at each step.

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
    low, high = (torch.as_tensor(scipy.stats.chi2.ppf(q, window_dof.numpy())) / window_dof for q in (tail, 1 - tail))
    return InnovationHealth(torch.arange(window, len(innovations) + 1), ratio, low, high)


class Whiteness(NamedTuple):
    """Ljung and Box's test of independent innovations."""

    autocorrelation: Tensor  # of the ranks, lag 1 first, (lags,)
    statistic: float  # Q
    p_value: float


def innovation_whiteness(nis: Array, dof: Array | int = 1, lags: int = 10) -> Whiteness:
    """Ljung and Box's test that the squared innovations of a filter are independent of each other.

    The innovations of a consistent filter are white: earlier ones do not predict later ones. A small p-value means that
    the dynamics are too slow or too fast, or that similar examples follow each other. The test uses ranks, because the
    innovations of classifiers have heavy tails; each ν is first transformed by its own χ² distribution.

    Args:
        nis: ν of each update, (T,).
        dof: Degrees of freedom of each update, (T,), or one number for all.
        lags: Number of autocorrelations, at most T − 2.

    Raises:
        ValueError: If a value is negative or not finite, a shape differs, or there are too few updates for the lags.

    References:
        Ljung, Box, *On a measure of lack of fit in time series models*, Biometrika 1978; for ranks: Dufour, Roy,
        *Some robust exact results on sample autocorrelations and tests of randomness*, J. of Econometrics 1985.

    Example:
        >>> drawn = torch.distributions.Chi2(4.0).sample((500,))
        >>> innovation_whiteness(drawn, 4).autocorrelation.shape
        torch.Size([10])
        >>> innovation_whiteness(drawn.sort().values, 4).p_value
        0.0
    """
    innovations, degrees = _checked(nis, dof)
    check_positive_int(lags, "lags")
    length = len(innovations)
    if length <= lags + 1:
        raise ValueError(f"`lags` must be below the number of updates less one, {length - 1}, got {lags}.")
    ranks = torch.as_tensor(_ranks(innovations.numpy(), degrees.numpy()))
    ranks = ranks - ranks.mean()
    total = ranks.square().sum().clamp_min(1e-300)  # avoids 0/0 if all ranks are equal
    autocorrelation = torch.stack([(ranks[lag:] * ranks[:-lag]).sum() for lag in range(1, lags + 1)]) / total
    num_pairs = length - torch.arange(1, lags + 1, dtype=torch.float64)
    statistic = length * (length + 2) * (autocorrelation.square() / num_pairs).sum().item()
    return Whiteness(autocorrelation, statistic, float(scipy.stats.chi2.sf(statistic, lags)))


def _ranks(nis: np.ndarray, dof: np.ndarray) -> np.ndarray:
    """Ranks of the innovations, each transformed by its own χ² distribution.

    If all degrees of freedom are equal, these are the ranks of the values. In the far tail, where probabilities
    underflow to zero, Wilson and Hilferty's normal approximation decides.
    """
    if dof.min() == dof.max():
        return np.asarray(scipy.stats.rankdata(nis))
    below, above = scipy.stats.chi2.cdf(nis, dof), scipy.stats.chi2.sf(nis, dof)
    with np.errstate(divide="ignore"):
        exact = np.where(below < above, np.log(below), -np.log(above))
    normal = (np.cbrt(nis / dof) - (1 - 2 / (9 * dof))) / np.sqrt(2 / (9 * dof))
    tail = np.where(np.isfinite(exact), 0.0, normal)
    order = np.unique(np.stack([exact, tail], axis=1), axis=0, return_inverse=True)[1]
    return np.asarray(scipy.stats.rankdata(order.ravel()))


def _checked(nis: Array, dof: Array | int) -> tuple[Tensor, Tensor]:
    """NIS and degrees of freedom as float64 (T,); raises a ValueError if they are malformed."""
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
