"""Draws from small Gaussians, one for each example, whose covariances may be singular."""

from __future__ import annotations

import torch
from torch import Tensor


def clamp_eigenvalues(covariance: Tensor) -> Tensor:
    """Covariances (B, m, m) without the negative eigenvalues that rounding has caused."""
    if covariance.shape[1] == 1:
        return covariance.clamp_min(0.0)
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0.0).unsqueeze(-2)) @ vectors.mT


def normal_draws_by_example(num_samples: int, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Standard normal numbers (S, B, m) for a ``shape`` of (B, m), drawn example after example.

    The numbers of an example depend on how many examples precede it, not on how these are divided into batches.
    """
    size, num_outputs = shape

    def draw() -> Tensor:
        return torch.randn(
            (num_samples, num_outputs), generator=generator, dtype=torch.float64, device=generator.device
        )

    return torch.stack([draw() for _ in range(size)], 1)


def gaussian_draws(
    mean: Tensor, covariance: Tensor, num_samples: int, generator: torch.Generator, normal: Tensor | None = None
) -> Tensor:
    """Draws from N(mean, covariance) of each example, (S, B, m).

    The root of the covariance is the symmetric one. It does not depend on the signs of eigenvectors, so a rounding
    error in the covariance changes the draws by a rounding error.

    Args:
        mean: (B, m).
        covariance: (B, m, m); it may be singular.
        num_samples: S.
        generator: source of standard normal numbers.
        normal: standard normal numbers (S, B, m) to use instead of the generator's.
    """
    scale = covariance.diagonal(dim1=-2, dim2=-1).amax(-1).double().clamp_min(1e-300)[..., None, None]
    values, vectors = torch.linalg.eigh(covariance.double() / scale)
    values = values.clamp_min(0.0)  # negative only by rounding
    root = scale.sqrt() * (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mT
    if normal is None:
        shape = (num_samples, *mean.shape)
        normal = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
    normal = normal.to(mean.device)
    moved = (root @ normal.permute(1, 2, 0)).permute(2, 0, 1)  # one product per example, not one per draw
    return (mean.double() + moved).to(mean.dtype)
