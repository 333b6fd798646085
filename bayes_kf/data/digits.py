"""Real images from scikit-learn, in the input format of the bundled digit transformer."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images


class LabelledImages(NamedTuple):
    """Images (N, 1, 28, 28), float32 in [-1, 1], white ink on black, and their labels (N,), int64."""

    images: torch.Tensor
    labels: torch.Tensor


def uci_digits() -> LabelledImages:
    """The 1,797 handwritten digits of UCI's optical recognition set bundled with scikit-learn, in its order.

    Grey levels 0 to 16 on an 8x8 grid become 28x28 by bilinear interpolation.

    Example:
        >>> images, labels = uci_digits()
        >>> images.shape, labels[:3]
        (torch.Size([1797, 1, 28, 28]), tensor([0, 1, 2]))
    """
    bunch = load_digits()
    grey = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16  # (N, 1, 8, 8)
    images = F.interpolate(grey, size=(28, 28), mode="bilinear", align_corners=False)
    return LabelledImages(images * 2 - 1, torch.from_numpy(bunch.target).long())


def uci_digits_split(num_stream: int = 1197, seed: int = 0) -> tuple[LabelledImages, LabelledImages]:
    """A training stream in random order and the held-out images: 1,197 and 600 by default.

    Args:
        num_stream: number of images in the stream, 1 to 1,796.
        seed: seed of the permutation, which decides the split and the order of the stream.

    Returns:
        The stream and the held-out images: disjoint, and together all of `uci_digits`.

    Raises:
        ValueError: if the stream or the held-out set is empty.

    Example:
        >>> stream, heldout = uci_digits_split()
        >>> len(stream.labels), len(heldout.labels)
        (1197, 600)
    """
    images, labels = uci_digits()
    if not 1 <= num_stream < len(labels):
        raise ValueError(f"`num_stream` must be between 1 and {len(labels) - 1}, got {num_stream}.")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    stream, heldout = order[:num_stream], order[num_stream:]
    return LabelledImages(images[stream], labels[stream]), LabelledImages(images[heldout], labels[heldout])


def photo_patches(num: int, seed: int = 0) -> torch.Tensor:
    """Out-of-distribution images: grey 28x28 patches of the two photographs bundled with scikit-learn.

    Each patch is a square of 56 to 224 pixels at a random place of a random photograph, averaged down to 28x28.

    Args:
        num: number of patches, at least 1.
        seed: seed of the places.

    Returns:
        Patches (num, 1, 28, 28), float32 in [-1, 1].

    Raises:
        ValueError: if `num` is less than 1.

    Example:
        >>> photo_patches(5).shape
        torch.Size([5, 1, 28, 28])
    """
    if num < 1:
        raise ValueError(f"`num` must be at least 1, got {num}.")
    luma = np.array([0.299, 0.587, 0.114])
    photos = [torch.from_numpy(photo @ luma / 255).float() for photo in load_sample_images().images]  # (H, W) each
    rng = np.random.default_rng(seed)
    patches = []
    for _ in range(num):
        photo = photos[rng.integers(len(photos))]
        side = int(rng.integers(56, 225))
        top, left = (int(rng.integers(0, extent - side + 1)) for extent in photo.shape)
        patch = photo[top : top + side, left : left + side]
        patches.append(F.adaptive_avg_pool2d(patch[None], 28))  # (1, 28, 28)
    return torch.stack(patches) * 2 - 1
