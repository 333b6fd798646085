"""Checks of arguments and suggestions for misspelt names. This module imports no third-party package."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TypeGuard


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """A suggestion of the allowed name nearest to a misspelt one, to end an error message; empty if none is near.

    Args:
        given: the misspelt name; a value that is not a string gets no suggestion.
        known: the allowed names.

    Example:
        >>> did_you_mean("forgeting", ["forgetting", "noise"])
        "; did you mean 'forgetting'?"
        >>> did_you_mean("Low-Rank", ["diagonal", "low_rank"])
        "; did you mean 'low_rank'?"
        >>> did_you_mean("zebra", ["forgetting", "noise"]), did_you_mean(3, ["noise"])
        ('', '')
    """
    if not isinstance(given, str):
        return ""
    plain = {_plain(name): name for name in known}
    near = difflib.get_close_matches(_plain(given), plain, n=1, cutoff=0.82)
    return f"; did you mean {plain[near[0]]!r}?" if near else ""


def _plain(name: str) -> str:
    """A name in lower case with underscores."""
    return name.lower().replace("-", "_")


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is an int or a float; a bool is neither."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: object, least: int = 1) -> bool:
    """Whether a value is an int of at least ``least``; a bool is not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise ValueError unless ``value`` is one of the allowed words; the message suggests the nearest."""
    words = tuple(allowed)
    if value not in words:
        raise ValueError(
            f"`{name}` must be one of {', '.join(words)}, got {value!r}{did_you_mean(value, words) or '.'}"
        )


def check_bool(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, got {value!r}.")


def check_whole(name: str, value: object, least: int = 1) -> None:
    """Raise ValueError unless ``value`` is a whole number of at least ``least``."""
    if not is_whole(value, least):
        raise ValueError(f"`{name}` must be a whole number >= {least}, got {value!r}.")


def check_positive(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a finite number > 0."""
    if not (is_number(value) and 0 < value < float("inf")):
        raise ValueError(f"`{name}` must be positive and finite, got {value!r}.")


def check_not_negative(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a finite number >= 0."""
    if not (is_number(value) and 0 <= value < float("inf")):
        raise ValueError(f"`{name}` must be >= 0 and finite, got {value!r}.")


def check_inside_unit_interval(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a number in (0, 1)."""
    if not (is_number(value) and 0 < value < 1):
        raise ValueError(f"`{name}` must lie strictly between 0 and 1, got {value!r}.")


def check_share(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a number in [0, 1)."""
    if not (is_number(value) and 0 <= value < 1):
        raise ValueError(f"`{name}` must lie in [0, 1), got {value!r}.")
