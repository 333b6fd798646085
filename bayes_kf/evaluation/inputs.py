"""Validation of user input and conversion to float64 tensors on the CPU."""

from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from bayes_kf.validation import did_you_mean

Array: TypeAlias = Tensor | np.ndarray

SUM_TOLERANCE = 1e-3
HALF_SUM_TOLERANCE = 1e-2  # the sum of a bfloat16 or float16 softmax is off by several 1e-3
HALF_TYPES = (torch.bfloat16, torch.float16)
SUM_ROUNDING = 1e-6  # rows whose sum is off by at most this are not normalized


def as_float(values: Array, name: str, *, allow_infinite: bool = False) -> Tensor:
    """The values as a float64 tensor on the CPU.

    Raises:
        ValueError: If they are empty, complex, NaN or (unless allowed) infinite.
    """
    tensor = torch.as_tensor(values).detach()
    if tensor.is_complex():
        raise ValueError(f"`{name}` must hold real numbers, got {tensor.dtype}.")
    if tensor.numel() == 0:
        raise ValueError(f"`{name}` must not be empty, got shape {tuple(tensor.shape)}.")
    tensor = tensor.to(device="cpu", dtype=torch.float64)
    invalid = torch.isnan(tensor) if allow_infinite else ~torch.isfinite(tensor)
    if invalid.any():
        rule = "must not hold NaN" if allow_infinite else "must be finite"
        raise ValueError(f"`{name}` {rule}, got {int(invalid.sum())} bad of {invalid.numel()} values.")
    return tensor


def as_vector(values: Array, name: str, *, allow_infinite: bool = False) -> Tensor:
    """The values as a float64 vector (N,)."""
    tensor = as_float(values, name, allow_infinite=allow_infinite)
    if tensor.ndim != 1:
        raise ValueError(f"`{name}` must be a vector, got shape {tuple(tensor.shape)}.")
    return tensor


def as_probs(probs: Array, name: str = "probs") -> Tensor:
    """Class probabilities as float64 (N, C); rows must be non-negative and sum to one.

    Sums may differ from one by 0.001, and by 0.01 if every value is a bfloat16 or a float16 number in any dtype: a
    softmax in half precision stays that far off after a cast to float32. Rows whose sum differs from one by more than
    1e-6 are divided by their sum, so scores are those of the normalized rows.
    """
    tensor = as_float(probs, name)
    if tensor.ndim != 2 or tensor.shape[1] < 2:
        raise ValueError(f"`{name}` must have shape (N, C) with at least two classes, got {tuple(tensor.shape)}.")
    if tensor.min() < 0:
        raise ValueError(f"`{name}` must not be negative, got {tensor.min().item():.3g}{_hint(tensor, name)}.")
    sums = tensor.sum(dim=1)
    deviation = (sums - 1).abs()
    worst = int(deviation.argmax())
    tolerance = HALF_SUM_TOLERANCE if _is_half(tensor) else SUM_TOLERANCE
    if deviation[worst].item() > tolerance:
        got = f"got {sums[worst].item():.6g} in row {worst}"
        raise ValueError(f"`{name}` must sum to one in every row, {got}{_hint(tensor, name)}.")
    return torch.where(deviation[:, None] > SUM_ROUNDING, tensor / sums[:, None], tensor)


def _is_half(tensor: Tensor) -> bool:
    """Whether all values are bfloat16 numbers or all are float16 numbers."""
    return any(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for dtype in HALF_TYPES)


def _hint(tensor: Tensor, name: str) -> str:
    """A guess of what the rows are instead of probabilities, and how to convert them."""
    if tensor.max() <= SUM_TOLERANCE and ((tensor.exp().sum(dim=1) - 1).abs() < 0.1).all():
        return f"; these look like log probabilities: pass `{name}.exp()`"
    if tensor.min() < 0:
        return "; if these are logits, pass their softmax, taken in float32"
    return "; pass the softmax of the logits, taken in float32, or divide each row by its sum"


def as_targets(targets: Array, probs: Tensor, name: str = "targets") -> Tensor:
    """Class indices as int64 (N,), one for each row of `probs` (N, C), each in 0..C − 1."""
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
    """Raises a ValueError unless the value is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")


def check_fraction(value: float, name: str) -> None:
    """Raises a ValueError unless the value lies strictly between 0 and 1."""
    if not 0 < value < 1:
        raise ValueError(f"`{name}` must lie strictly between 0 and 1, got {value!r}.")


def check_choice(value: str, name: str, choices: tuple[str, ...]) -> None:
    """Raises a ValueError unless the value is one of the choices."""
    if value not in choices:
        nearest = did_you_mean(value, choices) or "."
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}{nearest}")
