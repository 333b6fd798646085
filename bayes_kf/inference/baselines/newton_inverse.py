"""Inverses of symmetric positive definite matrices by Newton's iteration, and their lazy correction.

Newton's iteration (Schulz 1933) needs products of matrices only. The number of its steps grows with the logarithm of
the condition number, ten steps at 10 and about 26 at 10⁶, and rounding sets a limit to that: what it leaves grows with
the condition number. So damp first, A + sI, and invert what is then well conditioned. Float32 fails from about 10⁵ on,
and for large matrices before; float64 at about 10¹².
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MAX_STEPS = 60
ROUNDINGS = 64.0  # of one element, times the square root of the size: what ‖I − AX‖ is taken to be at best
TOLERANCE = 1e-3  # the largest ‖I − AX‖, a bound on the relative error, that is accepted where rounding leaves more


class Inverse(NamedTuple):
    """An inverse X (d, d), and the steps that it took."""

    matrix: Tensor
    steps: int


def newton_inverse(matrix: Tensor, max_steps: int = MAX_STEPS) -> Inverse:
    """A⁻¹ by X ← X(2I − AX) from X₀ = I/‖A‖_F, which converges for every symmetric positive definite A.

    Args:
        matrix: A, (d, d), symmetric and positive definite.
        max_steps: after which it is given up.

    Raises:
        FloatingPointError: when ‖I − AX‖_F, which bounds the relative error, does not fall below 10⁻³: A is not
            positive definite, or too badly conditioned for its precision.

    Example:
        >>> newton_inverse(torch.diag(torch.tensor([2.0, 4.0], dtype=torch.float64))).matrix.diagonal()
        tensor([0.5000, 0.2500], dtype=torch.float64)
    """
    size, precision = len(matrix), torch.finfo(matrix.dtype).eps
    identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    aim = max(math.sqrt(precision) * 1e-3, ROUNDINGS * precision) * math.sqrt(size)
    inverse, left = identity / torch.linalg.matrix_norm(matrix), math.inf
    for step in range(1, max_steps + 1):
        inverse = inverse @ (2.0 * identity - matrix @ inverse)
        before, left = left, float(torch.linalg.matrix_norm(identity - matrix @ inverse))
        if left < aim:
            final = inverse @ (2.0 * identity - matrix @ inverse)  # squares what is left
            return Inverse((final + final.mT) / 2.0, step + 1)
        if left < TOLERANCE and left > before / 2.0:  # squared no longer: rounding
            return Inverse((inverse + inverse.mT) / 2.0, step)
        if not math.isfinite(left):
            break
    raise FloatingPointError(
        f"Newton's inverse of a {size} x {size} matrix left ‖I − AX‖ = {left:.3g} in {matrix.dtype}: "
        "damp it more or take float64"
    )


def shifted(inverse: Tensor, shift: float) -> Tensor:
    """(A + dI)⁻¹ ≈ X − dX² for X = A⁻¹; its error is d²X³ at first, see :func:`shift_error`."""
    return inverse - shift * (inverse @ inverse)


def shift_error(inverse: Tensor, shift: float) -> float:
    """A bound on the relative error of :func:`shifted`, in the spectral norm; infinite where its series may diverge.

    With r = |d|‖X‖, the series X − dX² + d²X³ − … leaves at most r²/(1 − r) of ‖X‖ out. ‖X‖_F bounds ‖X‖ from above, so
    that r < 1 means |d| is below the smallest eigenvalue of A.
    """
    ratio = abs(shift) * float(torch.linalg.matrix_norm(inverse))
    return ratio**2 / (1.0 - ratio) if ratio < 1.0 else math.inf
