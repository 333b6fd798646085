"""Inverses of symmetric positive definite matrices by Newton's iteration, and their first-order corrections.

Newton's iteration (Schulz 1933) needs products of matrices only. The number of its steps grows with the logarithm of
the condition number: ten steps at 10, about 26 at 10⁶. The rounding error grows with the condition number too, so
callers invert the damped matrix A + sI. Float32 fails from a condition number of about 10⁵, earlier for large matrices;
float64 fails from about 10¹².
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MAX_STEPS = 60
ROUNDINGS = 64.0  # machine epsilons; times √size, the least ‖I − AX‖ that rounding allows
TOLERANCE = 1e-3  # largest accepted ‖I − AX‖, which bounds the relative error


class Inverse(NamedTuple):
    """An inverse X (d, d) and the number of steps."""

    matrix: Tensor
    steps: int


def newton_inverse(matrix: Tensor, max_steps: int = MAX_STEPS) -> Inverse:
    """A⁻¹ by X ← X(2I − AX) from X₀ = I/‖A‖_F, which converges for every symmetric positive definite A.

    Args:
        matrix: A, (d, d), symmetric and positive definite.
        max_steps: the iteration fails after this number of steps.

    Raises:
        FloatingPointError: if ‖I − AX‖_F, which bounds the relative error, does not fall below 10⁻³. Then A is not
            positive definite, or too ill-conditioned for its dtype.

    Example:
        >>> newton_inverse(torch.diag(torch.tensor([2.0, 4.0], dtype=torch.float64))).matrix.diagonal()
        tensor([0.5000, 0.2500], dtype=torch.float64)
    """
    size, eps = len(matrix), torch.finfo(matrix.dtype).eps
    identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    goal = max(math.sqrt(eps) * 1e-3, ROUNDINGS * eps) * math.sqrt(size)
    inverse, residual = identity / torch.linalg.matrix_norm(matrix), math.inf
    for step in range(1, max_steps + 1):
        inverse = inverse @ (2.0 * identity - matrix @ inverse)
        previous, residual = residual, float(torch.linalg.matrix_norm(identity - matrix @ inverse))
        if residual < goal:
            final = inverse @ (2.0 * identity - matrix @ inverse)  # squares the residual
            return Inverse((final + final.mT) / 2.0, step + 1)
        if residual < TOLERANCE and residual > previous / 2.0:  # rounding stops the convergence
            return Inverse((inverse + inverse.mT) / 2.0, step)
        if not math.isfinite(residual):
            break
    raise FloatingPointError(
        f"Newton's inverse of a {size} x {size} matrix has ‖I − AX‖ = {residual:.3g} in {matrix.dtype}; "
        "use more damping or float64"
    )


def shifted(inverse: Tensor, shift: float) -> Tensor:
    """(A + dI)⁻¹ ≈ X − dX² for X = A⁻¹. The error is d²X³ to leading order; :func:`shift_error` bounds it."""
    return inverse - shift * (inverse @ inverse)


def shift_error(inverse: Tensor, shift: float) -> float:
    """A bound on the relative error of :func:`shifted`, in the spectral norm; infinite if the series may diverge.

    With r = |d|‖X‖, the series X − dX² + d²X³ − … has a remainder of at most r²/(1 − r) ‖X‖ after two terms.
    ‖X‖ ≤ ‖X‖_F, so r < 1 implies that |d| is below the smallest eigenvalue of A.
    """
    ratio = abs(shift) * float(torch.linalg.matrix_norm(inverse))
    return ratio**2 / (1.0 - ratio) if ratio < 1.0 else math.inf
