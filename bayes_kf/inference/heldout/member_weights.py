"""The weights of the members of a mixture, chosen by held-out examples.

A member whose log loss is clearly above that of the best one gets no weight: by more than two standard errors, paired
by example. The others have equal weights. With 40 to 60 examples, finer weights are noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STANDARD_ERRORS = 2.0


def choose_weights(losses: Sequence[Tensor]) -> list[float]:
    """The weights of members with these log losses of the same examples, (N,) each; they add up to 1."""
    stacked = torch.stack([loss.double() for loss in losses])
    best = int(stacked.mean(1).nan_to_num(torch.inf).argmin())
    excess = stacked - stacked[best]
    number = stacked.shape[1]
    error = excess.std(1, correction=0) / max(1, number - 1) ** 0.5
    is_kept = excess.mean(1) <= STANDARD_ERRORS * error
    is_kept &= torch.isfinite(stacked).all(1)
    is_kept[best] = True
    return (is_kept.double() / is_kept.sum()).tolist()
