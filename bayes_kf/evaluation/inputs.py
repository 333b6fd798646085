"""What the user hands in, checked once and turned into float64 tensors on the CPU."""

from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from bayes_kf.validation import did_you_mean

Array: TypeAlias = Tensor | np.ndarray

SUM_TOLERANCE = 1e-3
HALF_SUM_TOLERANCE = 1e-2  # a softmax in bfloat16 (8 bits of precision) or float16 misses one by several 1e-3
HALF_TYPES = (torch.bfloat16, torch.float16)
SUM_ROUNDING = 1e-6  # rows that miss one by no more stay as they are


def as_float(values: Array, name: str, *, allow_infinite: bool = False) -> Tensor:
    """The values as a float64 tensor on the CPU; refuses empty, complex, NaN and (unless allowed) infinite ones."""
    tensor = torch.as_tensor(values).detach()
    if tensor.is_complex():
        raise ValueError(f"`{name}` must hold real numbers, got {tensor.dtype}.")
    if tensor.numel() == 0:
        raise ValueError(f"`{name}` must not be empty, got shape {tuple(tensor.shape)}.")
    tensor = tensor.to(device="cpu", dtype=torch.float64)
    bad = torch.isnan(tensor) if allow_infinite else ~torch.isfinite(tensor)
    if bad.any():
        wanted = "must not hold NaN" if allow_infinite else "must be finite"
        raise ValueError(f"`{name}` {wanted}, got {int(bad.sum())} bad of {bad.numel()} values.")
    return tensor


def as_vector(values: Array, name: str, *, allow_infinite: bool = False) -> Tensor:
    """The values as a float64 vector (N,)."""
    tensor = as_float(values, name, allow_infinite=allow_infinite)
    if tensor.ndim != 1:
        raise ValueError(f"`{name}` must be a vector, got shape {tuple(tensor.shape)}.")
    return tensor


def as_probs(probs: Array, name: str = "probs") -> Tensor:
    """Class probabilities as float64 (N, C); rows must be non-negative and sum to one.

    Rows may miss one by 0.001, and by 0.01 if every value is a bfloat16 or a float16 number, whatever the dtype now: a
    softmax in half precision stays that far off after a cast to float32. Rows that miss one by more than 1e-6 are
    divided by their sum, so scores are those of the normalized rows.
    """
    tensor = as_float(probs, name)
    if tensor.ndim != 2 or tensor.shape[1] < 2:
        raise ValueError(f"`{name}` must have shape (N, C) with at least two classes, got {tuple(tensor.shape)}.")
    if tensor.min() < 0:
        raise ValueError(f"`{name}` must not be negative, got {tensor.min().item():.3g}{_cure(tensor, name)}.")
    sums = tensor.sum(dim=1)
    missed = (sums - 1).abs()
    worst = int(missed.argmax())
    tolerance = HALF_SUM_TOLERANCE if _is_half(tensor) else SUM_TOLERANCE
    if missed[worst].item() > tolerance:
        got = f"got {sums[worst].item():.6g} in row {worst}"
        raise ValueError(f"`{name}` must sum to one in every row, {got}{_cure(tensor, name)}.")
    return torch.where(missed[:, None] > SUM_ROUNDING, tensor / sums[:, None], tensor)


def _is_half(tensor: Tensor) -> bool:
    """Whether every value is exactly a bfloat16 number, or every value a float16 number."""
    return any(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for dtype in HALF_TYPES)


def _cure(tensor: Tensor, name: str) -> str:
    """What rows that are no probabilities look like, and how to make probabilities of them."""
    if tensor.max() <= SUM_TOLERANCE and ((tensor.exp().sum(dim=1) - 1).abs() < 0.1).all():
        return f"; these look like log probabilities: pass `{name}.exp()`"
    if tensor.min() < 0:
        return "; if these are logits, pass their softmax, taken in float32"
    return "; pass the softmax of the logits, taken in float32, or divide each row by its sum"


def as_targets(targets: Array, probs: Tensor, name: str = "targets") -> Tensor:
    """Class indices as int64 (N,), one for each row of `probs`, each smaller than its number of columns."""
    tensor = torch.as_tensor(targets).detach().cpu()
    if tensor.is_floating_point() or tensor.is_complex():
        raise ValueError(f"`{name}` must hold integer class indices, got {tensor.dtype}.")
    num_examples, num_classes = probs.shape
    if tensor.shape != (num_examples,):
        raise ValueError(f"`{name}` must have shape ({num_examples},) as `probs` has, got {tuple(tensor.shape)}.")
    tensor = tensor.to(torch.int64)
    low, high = int(tensor.min()), int(tensor.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"`{name}` must lie in 0..{num_classes - 1}, got values in {low}..{high}.")
    return tensor


def check_positive_int(value: int, name: str) -> None:
    """Refuses anything but an integer of at least one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")


def check_fraction(value: float, name: str) -> None:
    """Refuses anything outside the open interval from zero to one."""
    if not 0 < value < 1:
        raise ValueError(f"`{name}` must lie strictly between 0 and 1, got {value!r}.")


def check_choice(value: str, name: str, choices: tuple[str, ...]) -> None:
    """Refuses anything but one of the choices."""
    if value not in choices:
        nearest = did_you_mean(value, choices) or "."
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}{nearest}")
