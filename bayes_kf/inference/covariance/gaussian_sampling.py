"""Draws from Gaussians whose covariance may be singular."""

from __future__ import annotations

import torch
from torch import Tensor


def semidefinite(covariance: Tensor) -> Tensor:
    """Covariances (B, m, m) with the negative eigenvalues that rounding gave them set to zero."""
    if covariance.shape[1] == 1:
        return covariance.clamp_min(0.0)
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0.0).unsqueeze(-2)) @ vectors.mT


def normal_draws_by_example(num_samples: int, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Standard normal noise (S, B, m) for a ``shape`` of (B, m), drawn example after example.

    The noise of an example depends on how many examples precede it, not on how these are divided into batches.
    """
    size, num_outputs = shape

    def draw() -> Tensor:
        return torch.randn(
            (num_samples, num_outputs), generator=generator, dtype=torch.float64, device=generator.device
        )

    return torch.stack([draw() for _ in range(size)], 1)


def gaussian_draws(
    mean: Tensor, covariance: Tensor, num_samples: int, generator: torch.Generator, noise: Tensor | None = None
) -> Tensor:
    """Draws from N(mean, covariance) per example, (S, B, m), by the symmetric root of the covariance.

    The symmetric root does not depend on the signs of the eigenvectors, so rounding of the covariance changes draws by
    no more than rounding.

    Args:
        mean: (B, m).
        covariance: (B, m, m); may be singular.
        num_samples: S.
        generator: of the standard normal noise.
        noise: standard normal noise (S, B, m) to use instead of the generator's.
    """
    scale = covariance.diagonal(dim1=-2, dim2=-1).amax(-1).double().clamp_min(1e-300)[..., None, None]
    values, vectors = torch.linalg.eigh(covariance.double() / scale)
    values = values.clamp_min(0.0)  # negative only by rounding
    root = scale.sqrt() * (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mT
    if noise is None:
        shape = (num_samples, *mean.shape)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
    noise = noise.to(mean.device)
    deviation = (root @ noise.permute(1, 2, 0)).permute(2, 0, 1)  # this order does not repeat the root for each draw
    return (mean.double() + deviation).to(mean.dtype)
