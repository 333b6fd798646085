"""The table of covariance structures, by the names that ``KalmanConfig(covariance=...)`` takes."""

from __future__ import annotations

from bayes_kf.inference.covariance.block_diagonal import BlockDiagonalGaussian
from bayes_kf.inference.covariance.diagonal import (
    DiagonalGaussian,
    DiagonalInformationGaussian,
    DiagonalMixedGaussian,
)
from bayes_kf.inference.covariance.full import FullGaussian
from bayes_kf.inference.covariance.gaussian_belief import GaussianBelief
from bayes_kf.inference.covariance.low_rank import LowRankGaussian

STRUCTURES: dict[str, type[GaussianBelief]] = {
    "diagonal": DiagonalGaussian,
    "diagonal_information": DiagonalInformationGaussian,
    "diagonal_mixed": DiagonalMixedGaussian,
    "low_rank": LowRankGaussian,
    "block_diagonal": BlockDiagonalGaussian,
    "full": FullGaussian,
}

METHODS = tuple(name for name, member in vars(GaussianBelief).items() if name[0] != "_" and name != "mean")


def register_structure(name: str, structure: type[GaussianBelief]) -> None:
    """Add a covariance structure, so that ``KalmanConfig(covariance=name)`` takes it.

    Args:
        name: an identifier that is not in use.
        structure: a class with the methods of :class:`~bayes_kf.inference.covariance.gaussian_belief.GaussianBelief`,
            for example a subclass of ``STRUCTURES["diagonal"]``.

    Raises:
        ValueError: if the name is in use or no identifier, or a method is missing.
    """
    missing = [method for method in METHODS if not callable(getattr(structure, method, None))]
    if not isinstance(structure, type) or missing:
        given = f"one without {', '.join(missing)}" if isinstance(structure, type) else type(structure).__name__
        raise ValueError(f"`structure` must be a class with the methods of GaussianBelief, got {given}.")
    if not name.isidentifier() or name in STRUCTURES:
        raise ValueError(f"`name` must be an identifier other than {', '.join(STRUCTURES)}, got {name!r}.")
    STRUCTURES[name] = structure
