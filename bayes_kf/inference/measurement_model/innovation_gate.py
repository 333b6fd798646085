"""The Mahalanobis gate: less precision for an observation whose innovation is too large."""

from __future__ import annotations

from bayes_kf.inference.covariance.observation import Observation

MAX_INNOVATION_RATIO = 16.0  # innovation over its degrees of freedom, above which an estimated σ² is not trusted


def gate_precision(observation: Observation, quantile: float | None, variance_is_estimated: bool) -> float:
    """The factor on the precision of an observation: bound/ν if ν is above a bound, otherwise 1.

    ν = uᵀS⁻¹u is the normalized innovation squared, the squared Mahalanobis distance of the observation from its
    prediction.

    Args:
        observation: with ν and its degrees of freedom.
        quantile: of χ² with these degrees of freedom, the bound; None for no such gate.
        variance_is_estimated: whether σ² is estimated; the bound is then ``MAX_INNOVATION_RATIO`` times the degrees of
            freedom, unless there is a quantile.
    """
    if quantile is not None:
        from scipy.special import gammaincinv

        bound = 2.0 * float(gammaincinv(0.5 * observation.degrees_of_freedom, quantile))  # of χ²
    elif variance_is_estimated:
        bound = MAX_INNOVATION_RATIO * observation.degrees_of_freedom
    else:
        return 1.0
    return min(1.0, bound / max(observation.innovation, bound))
