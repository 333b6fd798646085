"""Suggestions for misspelt names in error messages. It imports no third-party package."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """The known name nearest to a misspelt one, as the end of an error message; empty if none is near.

    Args:
        given: what was given; anything but a string has no suggestion.
        known: the names that are allowed.

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
    """A name without the differences that do not matter."""
    return name.lower().replace("-", "_")
