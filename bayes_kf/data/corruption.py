"""Corruptions of images, for tests of uncertainty under shift."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import gaussian_blur

from bayes_kf.validation import check_one_of

NOISE_SD = (0.1, 0.2, 0.3, 0.45, 0.6)
ROTATION_DEGREES = (15.0, 30.0, 45.0, 60.0, 90.0)
BLUR_SD = (0.04, 0.06, 0.08, 0.11, 0.15)
INVERTED_SHARE = (0.2, 0.4, 0.6, 0.8, 1.0)
OCCLUDED_SIDE = (0.2, 0.3, 0.4, 0.5, 0.6)


def _gaussian_noise(x: torch.Tensor, level: int, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(x.shape, generator=generator).to(x)
    return (x + 2 * NOISE_SD[level] * noise).clamp(-1, 1)  # 2: grey levels 0 to 1 span -1 to 1


def _rotation(x: torch.Tensor, level: int, generator: torch.Generator) -> torch.Tensor:
    signs = torch.randint(0, 2, (len(x),), generator=generator) * 2 - 1
    angle = torch.deg2rad(signs * ROTATION_DEGREES[level]).to(x)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    theta = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1  # pixels from outside the image are black


def _blur(x: torch.Tensor, level: int, generator: torch.Generator) -> torch.Tensor:
    sd = BLUR_SD[level] * x.shape[-1]
    size = min(2 * round(3 * sd) + 1, 2 * min(x.shape[-2:]) - 1)  # reflection padding must be smaller than the image
    return gaussian_blur(x, [size, size], [sd, sd])


def _invert(x: torch.Tensor, level: int, generator: torch.Generator) -> torch.Tensor:
    columns = round(INVERTED_SHARE[level] * x.shape[-1])
    return torch.cat([-x[..., :columns], x[..., columns:]], -1)


def _occlusion(x: torch.Tensor, level: int, generator: torch.Generator) -> torch.Tensor:
    extents = x.shape[-2:]
    inside = []
    for extent in extents:
        side = round(OCCLUDED_SIDE[level] * extent)
        start = torch.randint(0, extent - side + 1, (len(x), 1), generator=generator)
        position = torch.arange(extent)
        inside.append((position >= start) & (position < start + side))  # (N, extent)
    mask = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return x.masked_fill(mask.to(x.device), 0.0)


_KINDS: dict[str, Callable[[torch.Tensor, int, torch.Generator], torch.Tensor]] = {
    "gaussian_noise": _gaussian_noise,
    "rotation": _rotation,
    "blur": _blur,
    "invert": _invert,
    "occlusion": _occlusion,
}
CORRUPTIONS = tuple(_KINDS)
"""The kinds of corruption."""


def corrupt(images: torch.Tensor, kind: str, severity: int = 3, seed: int = 0) -> torch.Tensor:
    """Corrupted copies of images; each image has its own random corruption.

    Kinds, at severity 1 to 5: `gaussian_noise` (standard deviation 0.1 to 0.6 of the grey range, clipped), `rotation`
    (15 to 90 degrees, either way), `blur` (Gaussian, standard deviation 4 to 15 % of the width), `invert` (the negative
    of the leftmost 20 to 100 %) and `occlusion` (a mid-grey rectangle with sides of 20 to 60 % at a random place).

    Args:
        images: (N, C, H, W), float, pixels in [-1, 1].
        kind: one of `CORRUPTIONS`.
        severity: 1 (mild) to 5.
        seed: seed of the noise, the direction and the place.

    Returns:
        Corrupted images of the same shape, dtype and device.

    Raises:
        ValueError: an argument is outside these ranges.

    Example:
        >>> black = torch.full((2, 1, 28, 28), -1.0)
        >>> corrupt(black, "invert", severity=5).unique()
        tensor([1.])
    """
    check_one_of("kind", kind, CORRUPTIONS)
    if severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"`severity` must be 1, 2, 3, 4 or 5, got {severity}.")
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"`images` must be a float tensor (N, C, H, W), got {images.dtype} of shape {tuple(images.shape)}."
        )
    return _KINDS[kind](images, severity - 1, torch.Generator().manual_seed(seed))
