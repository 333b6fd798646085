"""The error of a fit that diverged."""

from __future__ import annotations

from bayes_kf.inference.filtering.state import DivergenceError
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
