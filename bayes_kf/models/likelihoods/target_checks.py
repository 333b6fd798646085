"""Checks of targets that several likelihoods share."""

from __future__ import annotations

import torch
from torch import Tensor

LOG_FLOOR = -60.0  # smallest log-probability in `whiten`; it changes V by less than 1e-26


def check_shape(outputs: Tensor, targets: Tensor, num_targets: int | None = None) -> Tensor:
    """Finite targets (B, m) in the outputs' dtype, or ValueError; (B,) becomes (B, 1) for one target an example.

    Args:
        outputs: η, (B, outputs).
        targets: (B, m), or (B,) if m is 1.
        num_targets: m; by default the number of outputs.
    """
    shape = (len(outputs), outputs.shape[1] if num_targets is None else num_targets)
    if targets.shape == shape[:1] and shape[1] == 1:
        targets = targets.unsqueeze(-1)
    if targets.shape != shape:
        raise ValueError(f"`targets` must have shape {shape}, got {tuple(targets.shape)}.")
    targets = targets.to(outputs.dtype)
    if not bool(torch.isfinite(targets).all()):
        raise ValueError(
            f"`targets` must be finite, got {int((~torch.isfinite(targets)).sum())} NaN or infinite values."
        )
    return targets
