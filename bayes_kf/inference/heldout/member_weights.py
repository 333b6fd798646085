"""The weights of the members of a mixture, chosen by held-out examples.

A member whose log loss is clearly above that of the best one gets no weight: by more than two standard errors, paired
by example. The others have equal weights. With 40 to 60 examples, finer weights are noise.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bayes_kf.inference.heldout.choice import near_best

STANDARD_ERRORS = 2.0


def choose_weights(losses: Sequence[Tensor]) -> list[float]:
    """The weights of members with these log losses of the same examples, (N,) each; they add up to 1."""
    is_kept = near_best(losses, STANDARD_ERRORS)
    return (is_kept.double() / is_kept.sum()).tolist()
