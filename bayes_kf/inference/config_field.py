"""Fields of the configuration: each carries its documentation and the check of its value."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import field
from typing import Any

from bayes_kf.validation import check_positive, is_number

Check = Callable[[str, Any], None]


def setting(default: Any, help: str, check: Check | None = None) -> Any:
    """A field of the configuration with its documentation and the check of its value."""
    return field(default=default, metadata={"help": help, "check": check})


def optional(check: Check) -> Check:
    """The check for values that may also be None."""
    return lambda name, value: None if value is None else check(name, value)


def word_or_positive(word: str) -> Check:
    """The check for one word or a finite number > 0."""
    return lambda name, value: None if value == word else check_positive(name, value)


def check_forgetting(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a number in (0, 1]."""
    if not (is_number(value) and 0 < value <= 1):
        raise ValueError(f"`{name}` must lie in (0, 1], got {value!r}.")


def check_dof(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a finite number above 2, with which Student's t has a variance."""
    if not (is_number(value) and 2 < value < math.inf):
        raise ValueError(f"`{name}` must be above 2 and finite, got {value!r}.")


def check_integer(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is an int."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"`{name}` must be an integer, got {value!r}.")
