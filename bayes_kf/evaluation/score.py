"""A score with its interval, its null band and its p-value."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

ROUNDING = 1e-9  # a value this close to an end of its band is inside


class Interval(NamedTuple):
    """Lower and upper end."""

    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """One number of a report, with what is known about its uncertainty.

    Attributes:
        value: The score.
        interval: Confidence interval of the score of the population, or None where no valid interval is known.
        null_band: Central interval of the score under the null hypothesis (for calibration errors: a perfectly
            calibrated model of the same confidences), at this sample size, or None.
        null_mean: Mean of the score under the null hypothesis, or None.
        p_value: p-value of the null hypothesis, or None.

    Example:
        >>> Score(0.12, null_band=Interval(0.01, 0.05), p_value=0.001).null_position
        1
    """

    value: float
    interval: Interval | None = None
    null_band: Interval | None = None
    null_mean: float | None = None
    p_value: float | None = None

    @property
    def null_position(self) -> int:
        """1 above the null band, −1 below it, 0 inside it or without one."""
        return 0 if self.null_band is None else position_in_band(self.value, *self.null_band)

    def flat(self, name: str) -> dict[str, float]:
        """Every number that is known, under the keys of `Report.scores`.

        Args:
            name: Name of the score, for example "ece".

        Returns:
            `name` to the value, then, where they are known, `name_low`, `name_high` (interval), `name_null_mean`,
            `name_null_low`, `name_null_high` (null band) and `name_p_value`.

        Example:
            >>> Score(0.12, Interval(0.1, 0.2), p_value=0.5).flat("gap")
            {'gap': 0.12, 'gap_low': 0.1, 'gap_high': 0.2, 'gap_p_value': 0.5}
        """
        low, high = self.interval or (None, None)
        null_low, null_high = self.null_band or (None, None)
        numbers = {
            name: self.value,
            f"{name}_low": low,
            f"{name}_high": high,
            f"{name}_null_mean": self.null_mean,
            f"{name}_null_low": null_low,
            f"{name}_null_high": null_high,
            f"{name}_p_value": self.p_value,
        }
        return {key: number for key, number in numbers.items() if number is not None}


def flatten_scores(scores: Mapping[str, Score]) -> dict[str, float]:
    """All numbers of all scores in one dictionary, see `Score.flat`.

    Example:
        >>> flatten_scores({"accuracy": Score(0.9, Interval(0.8, 0.95)), "aurc": Score(0.01)})
        {'accuracy': 0.9, 'accuracy_low': 0.8, 'accuracy_high': 0.95, 'aurc': 0.01}
    """
    numbers: dict[str, float] = {}
    for name, score in scores.items():
        numbers |= score.flat(name)
    return numbers


def position_in_band(value: float, low: float, high: float) -> int:
    """1 above the band, −1 below it, 0 inside it or within rounding (1e-9) of an end.

    Example:
        >>> position_in_band(0.3, 0.0, 0.2), position_in_band(0.2 + 1e-12, 0.0, 0.2)
        (1, 0)
    """
    return int(value > high + ROUNDING) - int(value < low - ROUNDING)
