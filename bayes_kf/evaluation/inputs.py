"""Validation of user input and conversion to float64 tensors on the CPU.

Arrays are tensors, NumPy arrays, lists, or columns and tables of pandas or polars, whose index is ignored: rows count
by their place.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

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
    tensor = _as_tensor(values, name)
    if tensor.is_complex():
        raise ValueError(f"`{name}` must hold real numbers, got {tensor.dtype}.")
    if tensor.numel() == 0:
        raise ValueError(f"`{name}` must not be empty, got shape {tuple(tensor.shape)}.")
    tensor = tensor.to(device="cpu", dtype=torch.float64)
    if math.isfinite(tensor.sum().item()):  # so is every value
        return tensor
    invalid = torch.isnan(tensor) if allow_infinite else ~torch.isfinite(tensor)
    if invalid.any():
        rule = "must not hold NaN" if allow_infinite else "must be finite"
        raise ValueError(f"`{name}` {rule}, got {int(invalid.sum())} bad of {invalid.numel()} values.")
    return tensor


def plain_array(values: Any) -> Any:
    """The values of a column or table of pandas or polars as a NumPy array; anything else as it is."""
    return values.to_numpy() if hasattr(values, "to_numpy") else values


def as_numpy(values: Any) -> np.ndarray:
    """Numbers or texts (a list, a column, a tensor) as a NumPy array."""
    plain = plain_array(values)
    return plain.detach().cpu().numpy() if isinstance(plain, Tensor) else np.asarray(plain)


def _as_tensor(values: Any, name: str) -> Tensor:
    """Numbers as a tensor."""
    plain = plain_array(values)
    if isinstance(plain, np.ndarray) and plain.dtype.kind not in "buifc":
        kinds = sorted({type(value).__name__ for value in plain.flat})
        try:
            plain = np.array(plain.tolist(), dtype=np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"`{name}` must hold numbers, got {', '.join(kinds)}.") from None
    if isinstance(plain, np.ndarray) and not plain.flags.writeable:  # a column of pandas; torch warns of it
        plain = plain.copy()
    return torch.as_tensor(plain).detach()


def as_vector(values: Array, name: str, *, allow_infinite: bool = False) -> Tensor:
    """The values as a float64 vector (N,)."""
    tensor = as_float(values, name, allow_infinite=allow_infinite)
    if tensor.ndim != 1:
        raise ValueError(f"`{name}` must be a vector, got shape {tuple(tensor.shape)}.")
    return tensor


def as_weights(weights: Array, length: int, name: str = "weights") -> Tensor:
    """Weights of examples as a float64 vector (N,); none is negative, and one is positive."""
    numbers = as_vector(weights, name)
    if len(numbers) != length:
        raise ValueError(f"`{name}` must have shape ({length},), one for each example, got ({len(numbers)},).")
    if numbers.min() < 0 or not bool(numbers.any()):
        raise ValueError(f"`{name}` must not be negative, and one must be positive.")
    return numbers


def as_probs(probs: Array, name: str = "probs") -> Tensor:
    """Class probabilities as float64 (N, C); rows must be non-negative and sum to one.

    A vector (N,) or a column (N, 1) is the probability of class 1 of two.

    Sums may differ from one by 0.001, and by 0.01 if every value is a bfloat16 or a float16 number in any dtype: a
    softmax in half precision stays that far off after a cast to float32. Rows whose sum differs from one by more than
    1e-6 are divided by their sum, so scores are those of the normalized rows.
    """
    tensor = _two_classes(as_float(probs, name), name)
    if tensor.ndim != 2 or tensor.shape[1] < 2:
        raise ValueError(f"`{name}` must have shape (N, C) with at least two classes, got {tuple(tensor.shape)}.")
    if tensor.min() < 0:
        raise ValueError(f"`{name}` must not be negative, got {tensor.min().item():.3g}{_hint(tensor, name)}.")
    sums = tensor.sum(dim=1)
    deviation = (sums - 1).abs()
    worst = int(deviation.argmax())
    largest = deviation[worst].item()
    if largest > HALF_SUM_TOLERANCE or (largest > SUM_TOLERANCE and not _is_half(tensor)):
        got = f"got {sums[worst].item():.6g} in row {worst}"
        raise ValueError(f"`{name}` must sum to one in every row, {got}{_hint(tensor, name)}.")
    if largest <= SUM_ROUNDING:
        return tensor
    return torch.where(deviation[:, None] > SUM_ROUNDING, tensor / sums[:, None], tensor)


def _two_classes(tensor: Tensor, name: str) -> Tensor:
    """Probabilities of class 1, (N,) or (N, 1), as those of both classes; others as they are."""
    if tensor.ndim != 1 and not (tensor.ndim == 2 and tensor.shape[1] == 1):
        return tensor
    second = tensor.reshape(-1)
    if second.min() < 0 or second.max() > 1:
        raise ValueError(
            f"`{name}` of one column must be probabilities of class 1 between 0 and 1, got values in "
            f"{second.min().item():.3g}..{second.max().item():.3g}; if these are logits, pass their sigmoid."
        )
    return torch.stack([1 - second, second], dim=1)


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


def as_targets(
    targets: Array, probs: Tensor, name: str = "targets", class_names: Sequence[str] | None = None
) -> Tensor:
    """Class indices as int64 (N,), one for each row of `probs` (N, C), each in 0..C − 1.

    They may be given as a column (N, 1), or one-hot (N, C). Floats must be whole and come from a table, where a missing
    value makes a column one of floats. Names of classes need `class_names`.
    """
    if (named := _from_names(targets, name, class_names)) is not None:
        targets = named
    tensor = _as_tensor(targets, name).cpu()
    num_examples, num_classes = probs.shape
    if tensor.is_floating_point() and hasattr(targets, "to_numpy") and bool((tensor == tensor.round()).all()):
        tensor = tensor.to(torch.int64)
    if tensor.shape == (num_examples, num_classes) and tensor.ndim == 2:
        tensor = _from_one_hot(tensor, name)
    if tensor.is_floating_point() or tensor.is_complex():
        raise ValueError(f"`{name}` must hold integer class indices, got {tensor.dtype}.")
    if tensor.shape == (num_examples, 1):
        tensor = tensor[:, 0]
    if tensor.shape != (num_examples,):
        raise ValueError(f"`{name}` must have shape ({num_examples},) as `probs` has, got {tuple(tensor.shape)}.")
    tensor = tensor.to(torch.int64)
    low, high = int(tensor.min()), int(tensor.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"`{name}` must lie in 0..{num_classes - 1}, got values in {low}..{high}.")
    return tensor


def column_names(probs: Any) -> list[str] | None:
    """The names of the columns of a table, if all are texts."""
    names = list(getattr(probs, "columns", []))
    return names if names and all(isinstance(name, str) for name in names) else None


def _from_names(targets: Any, name: str, class_names: Sequence[str] | None) -> Tensor | None:
    """Class indices of targets that are names, (N,); None if they are not."""
    if isinstance(targets, Tensor):
        return None
    values = np.asarray(plain_array(targets))
    if values.ndim != 1 or values.dtype.kind not in "OUT" or not all(isinstance(value, str) for value in values):
        return None
    if class_names is None:
        raise ValueError(f"`{name}` must hold class indices unless `class_names` is given, got {str(values[0])!r}.")
    places = {str(own): place for place, own in enumerate(class_names)}
    unknown = sorted({str(value) for value in values} - places.keys())
    if unknown:
        nearest = did_you_mean(unknown[0], places) or "."
        raise ValueError(f"`{name}` must hold names among `class_names`, got {unknown[0]!r}{nearest}")
    return torch.tensor([places[str(value)] for value in values])


def _from_one_hot(tensor: Tensor, name: str) -> Tensor:
    """The class of each row that is one at its class and zero elsewhere."""
    if not bool((((tensor == 0) | (tensor == 1)).all(dim=1) & (tensor.sum(dim=1) == 1)).all()):
        raise ValueError(f"`{name}` of the shape of `probs` must be one-hot: one 1 and zeros in every row.")
    return tensor.int().argmax(dim=1)


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
