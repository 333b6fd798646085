"""Names of the series of a fit around a trained adapter."""

from __future__ import annotations

from torch import Tensor

TRAINING_PREFIX = "training_"  # of series about data that the adapter was trained on
PREQUENTIAL_SERIES = ("log_loss", "correct", "innovation", "dof")  # prequential only if the data are new


def as_training_series(history: dict[str, Tensor]) -> dict[str, Tensor]:
    """The series under names for data that the adapter was trained on, such as ``training_log_loss``.

    Reports, comparisons and the command line look for prequential scores under the plain names and find none.
    """
    return {TRAINING_PREFIX + name if name in PREQUENTIAL_SERIES else name: v for name, v in history.items()}
