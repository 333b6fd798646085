"""Numbers and names as they appear in sentences."""

import math
import re

from bayes_kf.evaluation.score import Interval, Score

PLAIN_NAME = re.compile(r"[\w./+-]*\w")
DETECTABLE_ERROR = 0.1  # with fewer examples than detect a calibration error of this size there is no verdict


def percent(share: float) -> str:
    """A share as a percentage.

    Example:
        >>> percent(0.1234)
        '12.3 %'
    """
    return f"{100 * share:.1f} %"


def percent_range(interval: Interval) -> str:
    """An interval of shares.

    Example:
        >>> percent_range(Interval(0.1, 0.25))
        '10.0 % to 25.0 %'
    """
    return f"{percent(interval.low)} to {percent(interval.high)}"


def decimal_range(interval: Interval, decimals: int = 3) -> str:
    """An interval of numbers.

    Example:
        >>> decimal_range(Interval(-0.1, 0.25), 2)
        '−0.10 to 0.25'
    """
    return " to ".join(minus(f"{end:.{decimals}f}") for end in interval)


def minus(text: str) -> str:
    """The text with minus signs in place of hyphens."""
    return text.replace("-", "−")


def p_value_text(p: float) -> str:
    """A p-value with two digits.

    Example:
        >>> p_value_text(0.0123), p_value_text(1e-9)
        ('p = 0.012', 'p < 0.0001')
    """
    return f"p = {p:.2g}" if p >= 1e-4 else "p < 0.0001"


def round_up(number: float) -> int:
    """A positive number, rounded up to two significant digits.

    Example:
        >>> round_up(1234.0), round_up(3.2)
        (1300, 4)
    """
    unit = 10 ** max(0, math.floor(math.log10(number)) - 1)
    return math.ceil(number / unit - 1e-9) * unit


def quoted(name: str) -> str:
    """A model's name as it appears in a sentence: in quotation marks unless it is one word.

    Example:
        >>> quoted("low-rank_20"), quoted("ours, T = 1")
        ('low-rank_20', '“ours, T = 1”')
    """
    return name if PLAIN_NAME.fullmatch(name) else f"“{name}”"


def interval_of(score: Score) -> Interval:
    """The interval of a score that always has one."""
    assert score.interval is not None
    return score.interval


def null_band_of(score: Score) -> Interval:
    """The null band of a score that always has one."""
    assert score.null_band is not None
    return score.null_band
