"""The weights of the members of a mixture, chosen by held-out examples.

A member that has clearly failed gets no weight: one whose mean log loss is more than four standard errors above that of
the best one. The others have equal weights. With 40 to 60 examples, finer weights are noise; and since each member has
held-out examples of its own, two standard errors left out members whose examples were harder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STANDARD_ERRORS = 4.0


def choose_weights(losses: Sequence[Tensor]) -> list[float]:
    """The weights of members with these log losses of different examples, (N,) each; they add up to 1.

    The losses of all members that are finite have one variance, since that of few examples is too small where all are
    predicted right.
    """
    means = torch.stack([values.double().mean().nan_to_num(torch.inf, torch.inf) for values in losses])
    best = int(means.argmin())
    sums = [(values.double() - mean).square().sum() for values, mean in zip(losses, means, strict=True)]
    finite = [number for number, total in enumerate(sums) if torch.isfinite(total)]
    examples = sum(len(losses[number]) for number in finite)
    variance = sum(float(sums[number]) for number in finite) / max(1, examples - len(finite))
    errors = torch.tensor([(variance / len(values) + variance / len(losses[best])) ** 0.5 for values in losses])
    is_kept = torch.isfinite(means) & (means - means[best] <= STANDARD_ERRORS * errors)
    is_kept[best] = True
    return (is_kept.double() / is_kept.sum()).tolist()
