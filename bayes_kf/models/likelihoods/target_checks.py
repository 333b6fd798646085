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


def check_classes(outputs: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Targets as int64 (B,) in 0..C−1, or ValueError.

    Args:
        outputs: η, (B, outputs).
        targets: class labels (B,).
        num_classes: C.
    """
    batch = len(outputs)
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(
            f"`targets` must be integer class labels, got dtype {targets.dtype}; for numbers, set `likelihood` "
            "'gaussian'."
        )
    if targets.shape != (batch,):
        hint = "; the tokens of a language model need `likelihood` 'tokens'" if targets.ndim == 2 else ""
        raise ValueError(f"`targets` must have shape ({batch},), got {tuple(targets.shape)}{hint}.")
    if batch and (int(targets.min()) < 0 or int(targets.max()) >= num_classes):
        low, high = int(targets.min()), int(targets.max())
        raise ValueError(
            f"`targets` must lie in 0..{num_classes - 1} for {outputs.shape[1]} outputs, got {low}..{high}."
        )
    return targets.long()
