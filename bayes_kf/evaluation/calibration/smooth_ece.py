"""The smooth calibration error: no bins, and a bandwidth that the data choose."""

import scipy
import torch
from torch import Tensor

GRID = 4096  # points of the kernel's grid on [0, 1]
GRID_OF_MANY = 1024  # for the errors of many simulated data sets
WIDEST, NARROWEST = 1.0, 1e-4
FIRST = 0.05  # the width that is tried first
FADED = 9.0  # frequency times width at which exp(-x²/2) leaves 3e-18 of a residual
AGREED = 1e-6  # how near, relatively, the ends that the width lies between come
MOST_STEPS = 100  # 3 to 10 are usual


def smooth_error(confidence: Tensor, residual: Tensor) -> Tensor:
    """smECE of residuals (confidence − hits, divided by the number of examples) at confidences.

    The residuals are smeared out by a Gaussian kernel reflected at zero and one, which is what the heat equation does
    in a rod with insulated ends, and the absolute value of the result is integrated. The kernel's width σ is the one
    at which the error equals σ; it is between 0.0001 and 1.

    Args:
        confidence: (K,), between zero and one.
        residual: (..., K); of more than one data set on a coarser grid.

    Returns:
        The errors, (...).
    """
    num_points = GRID if residual.ndim == 1 else GRID_OF_MANY
    spectrum = torch.from_numpy(scipy.fft.dct(_on_grid(confidence, residual, num_points).numpy(), type=2, norm="ortho"))
    frequency = torch.pi * torch.arange(num_points, dtype=torch.float64)
    width = torch.full(residual.shape[:-1], FIRST, dtype=torch.float64)
    low, high = torch.full_like(width, NARROWEST), torch.full_like(width, WIDEST)
    place, value = low.log(), high.log()  # of the step before; at first, as if the narrowest kernel erred most
    for _ in range(MOST_STEPS):
        error = _at_width(spectrum, frequency, width)
        # A wider kernel never has a larger error, so what is sought lies between any width and the error there.
        reached = error.clamp(NARROWEST, WIDEST)
        low, high = low.maximum(width.minimum(reached)), high.minimum(width.maximum(reached))
        if bool((high <= (1 + AGREED) * low).all()):
            break
        before, place = place, width.log()
        rise, value = reached.log() - value, reached.log()
        slope = (rise / (place - before)).nan_to_num(0.0).clamp(max=0.0)
        width = (place + (value - place) / (1 - slope)).exp().clamp(low, high)
    return error


def _at_width(spectrum: Tensor, frequency: Tensor, width: Tensor) -> Tensor:
    """∫ |smeared residuals| for kernels of these widths (...)."""
    kept = frequency[frequency * width.min() < FADED]
    damped = spectrum[..., : len(kept)] * torch.exp(-0.5 * (kept * width[..., None]).square())
    return torch.from_numpy(scipy.fft.idct(damped.numpy(), type=2, n=len(frequency), norm="ortho")).abs().sum(dim=-1)


def _on_grid(confidence: Tensor, residual: Tensor, num_points: int) -> Tensor:
    """Each residual divided between the two grid points (i + ½)/n that its confidence lies between, (..., n)."""
    position = (confidence * num_points - 0.5).clamp(0, num_points - 1)
    below = position.long().clamp(max=num_points - 2)
    share = position - below
    grid = torch.zeros(*residual.shape[:-1], num_points, dtype=torch.float64)
    grid.index_add_(-1, below, residual * (1 - share))
    return grid.index_add_(-1, below + 1, residual * share)
