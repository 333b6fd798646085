"""The smooth calibration error: no bins, and a bandwidth that the data choose."""

import torch
from scipy.fft import dct, idct
from torch import Tensor

GRID = 4096  # points of the kernel's grid on [0, 1]
GRID_OF_MANY = 1024  # for the errors of many simulated data sets
HALVINGS = 14  # of the range of widths, on a logarithmic scale, before a line is drawn between its ends
WIDEST, NARROWEST = 1.0, 1e-4


def smooth_error(confidence: Tensor, residual: Tensor) -> Tensor:
    """SmECE of residuals (confidence − hits, divided by the number of examples) at confidences.

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
    spectrum = torch.from_numpy(dct(_on_grid(confidence, residual, num_points).numpy(), type=2, norm="ortho"))
    frequency = torch.pi * torch.arange(num_points, dtype=torch.float64)
    low = torch.full(residual.shape[:-1], NARROWEST, dtype=torch.float64)
    high = torch.full_like(low, WIDEST)
    for _ in range(HALVINGS):
        width = (low * high).sqrt()
        too_narrow = _at_width(spectrum, frequency, width) > width
        low, high = torch.where(too_narrow, width, low), torch.where(too_narrow, high, width)
    below, above = (_at_width(spectrum, frequency, width) - width for width in (low, high))
    share = (below / (below - above)).clamp(0, 1)  # where the line between both ends crosses zero
    return _at_width(spectrum, frequency, low + share * (high - low))


def _at_width(spectrum: Tensor, frequency: Tensor, width: Tensor) -> Tensor:
    """∫ |smeared residuals| for kernels of these widths (...)."""
    damped = spectrum * torch.exp(-0.5 * (frequency * width[..., None]).square())
    return torch.from_numpy(idct(damped.numpy(), type=2, norm="ortho")).abs().sum(dim=-1)


def _on_grid(confidence: Tensor, residual: Tensor, num_points: int) -> Tensor:
    """Each residual divided between the two grid points (i + ½)/n that its confidence lies between, (..., n)."""
    position = (confidence * num_points - 0.5).clamp(0, num_points - 1)
    below = position.long().clamp(max=num_points - 2)
    share = position - below
    grid = torch.zeros(*residual.shape[:-1], num_points, dtype=torch.float64)
    grid.index_add_(-1, below, residual * (1 - share))
    return grid.index_add_(-1, below + 1, residual * share)
