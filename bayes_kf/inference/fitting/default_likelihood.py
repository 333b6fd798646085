"""The likelihood of a fit without a config, from its targets. A config, also one with defaults only, is used as it is.

Only unambiguous targets decide: floats are real numbers, bools are answers, integers are class labels. Floats that are
all 0 or 1 could be either, and an integer could be a count: a config says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

REAL: dict[str, Any] = {"likelihood": "gaussian", "noise_variance": "estimated"}


def default_likelihood(targets: Iterable[Any]) -> dict[str, Any]:
    """The settings of the likelihood for the targets of batches; empty for class labels, and if they are no tensors.

    The first batch decides, unless it holds only the floats 0 and 1; then further batches are read.

    Raises:
        ValueError: if all targets are the floats 0 and 1.

    Example:
        >>> default_likelihood([torch.tensor([0.0, 1.0]), torch.tensor([0.5, 1.0])])
        {'likelihood': 'gaussian', 'noise_variance': 'estimated'}
        >>> default_likelihood([torch.tensor([0, 1])])
        {}
    """
    is_binary = False
    for some in targets:
        if not isinstance(some, Tensor) or not (some.is_floating_point() or some.dtype == torch.bool):
            return {}
        if some.dtype == torch.bool:
            return {"likelihood": "bernoulli"}
        if not bool(((some == 0) | (some == 1)).all()):
            return REAL
        is_binary = True
    if is_binary:
        raise ValueError(
            "`config` must say what float targets that are all 0 or 1 mean, by `likelihood` 'bernoulli' or 'gaussian', "
            "got None."
        )
    return {}
