"""The error of a fit that diverged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bayes_kf.inference.filtering.state import DivergenceError, FilterState
from bayes_kf.inference.posterior import Posterior


class FitDivergenceError(DivergenceError):
    """A fit was stopped by an update that the filter refused.

    Args:
        error: the filter's error; ``step``, ``cause`` and ``state`` are copied from it.
        posterior: the posterior before the refused update.

    Attributes:
        posterior: the posterior before the refused update.
    """

    posterior: Posterior

    def __init__(self, error: DivergenceError, posterior: Posterior) -> None:
        super().__init__(error.step, error.cause, error.state)
        self.posterior = posterior


@contextmanager
def posterior_on_divergence(posterior_before: Callable[[FilterState], Posterior]) -> Iterator[None]:
    """Raise a :class:`FitDivergenceError` in place of a DivergenceError.

    Args:
        posterior_before: from the error's state to the posterior before the refused update.
    """
    try:
        yield
    except DivergenceError as error:
        raise FitDivergenceError(error, posterior_before(error.state)) from error
