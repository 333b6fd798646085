"""The smooth calibration error, without bins and with a kernel width that the data determine."""

import scipy
import torch
from torch import Tensor

GRID = 4096  # points of the kernel's grid on [0, 1]
COARSE_GRID = 1024  # points for the errors of several data sets at once
MAX_WIDTH, MIN_WIDTH = 1.0, 1e-4
INITIAL_WIDTH = 0.05
CUTOFF = 9.0  # frequency times width; from here on exp(−x²/2) damps a residual to at most 3e-18
WIDTH_RTOL = 1e-6  # relative distance of the lower and the upper bound of the width at convergence
MAX_STEPS = 100  # the iteration usually takes 3 to 10


def smooth_error(confidence: Tensor, residual: Tensor) -> Tensor:
    """smECE of the residuals (confidence − hits)/N at the given confidences.

    A Gaussian kernel, reflected at zero and one, smooths the residuals (this solves the heat equation in a rod with
    insulated ends); the error is the integral of the absolute value of the result. The width σ of the kernel is the
    fixed point at which the error equals σ, clipped to [1e-4, 1].

    Args:
        confidence: (K,), between zero and one.
        residual: (..., K); several data sets use a coarser grid.

    Returns:
        The errors, (...).

    Reference: Błasiok, Nakkiran, *Smooth ECE: principled reliability diagrams via kernel smoothing*, 2023.
    """
    num_points = GRID if residual.ndim == 1 else COARSE_GRID
    spectrum = torch.from_numpy(scipy.fft.dct(_on_grid(confidence, residual, num_points).numpy(), type=2, norm="ortho"))
    frequency = torch.pi * torch.arange(num_points, dtype=torch.float64)
    width = torch.full(residual.shape[:-1], INITIAL_WIDTH, dtype=torch.float64)
    low, high = torch.full_like(width, MIN_WIDTH), torch.full_like(width, MAX_WIDTH)
    log_width, log_error = low.log(), high.log()  # of the previous step; at first, the largest error at MIN_WIDTH
    for _ in range(MAX_STEPS):
        error = _error_at_width(spectrum, frequency, width)
        # The error does not increase with the width, so the fixed point lies between any width and its error.
        clipped = error.clamp(MIN_WIDTH, MAX_WIDTH)
        low, high = low.maximum(width.minimum(clipped)), high.minimum(width.maximum(clipped))
        if bool((high <= (1 + WIDTH_RTOL) * low).all()):
            break
        previous, log_width = log_width, width.log()
        rise, log_error = clipped.log() - log_error, clipped.log()
        slope = (rise / (log_width - previous)).nan_to_num(0.0).clamp(max=0.0)
        width = (log_width + (log_error - log_width) / (1 - slope)).exp().clamp(low, high)  # secant step
    return error


def _error_at_width(spectrum: Tensor, frequency: Tensor, width: Tensor) -> Tensor:
    """∫ |smoothed residuals| for kernels of the given widths (...)."""
    low_frequency = frequency[frequency * width.min() < CUTOFF]
    damped = spectrum[..., : len(low_frequency)] * torch.exp(-0.5 * (low_frequency * width[..., None]).square())
    return torch.from_numpy(scipy.fft.idct(damped.numpy(), type=2, n=len(frequency), norm="ortho")).abs().sum(dim=-1)


def _on_grid(confidence: Tensor, residual: Tensor, num_points: int) -> Tensor:
    """Residuals on the grid (i + ½)/n, each split linearly between its two neighbouring points, (..., n)."""
    position = (confidence * num_points - 0.5).clamp(0, num_points - 1)
    below = position.long().clamp(max=num_points - 2)
    share = position - below
    grid = torch.zeros(*residual.shape[:-1], num_points, dtype=torch.float64)
    grid.index_add_(-1, below, residual * (1 - share))
    return grid.index_add_(-1, below + 1, residual * share)
