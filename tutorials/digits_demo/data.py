"""The data of the demo: a stream, a test set, and out-of-distribution images."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from bayes_kf.data import CORRUPTIONS, LabelledImages, corrupt, photo_patches, uci_digits_split

EVALUATION_BATCH = 100
SEVERITY = 5


class Size(NamedTuple):
    """Numbers of images in the stream and held out."""

    stream: int
    heldout: int


FULL = Size(stream=1197, heldout=600)
QUICK = Size(stream=150, heldout=200)


class DemoData(NamedTuple):
    """UCI digits to train and test on, and two out-of-distribution sets."""

    stream: LabelledImages
    heldout: LabelledImages
    corrupted: Tensor  # corrupted copies of the held-out images
    photos: Tensor  # as many patches of photographs

    @property
    def size(self) -> Size:
        """The numbers of images."""
        return Size(len(self.stream.labels), len(self.heldout.labels))

    @property
    def stream_loader(self) -> DataLoader[tuple[Tensor, ...]]:
        """One image at a time, always in the same order."""
        return DataLoader(TensorDataset(*self.stream), batch_size=1)

    @property
    def heldout_loader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The held-out images in batches (images, labels)."""
        return DataLoader(TensorDataset(*self.heldout), EVALUATION_BATCH)

    @property
    def ood(self) -> dict[str, DataLoader[tuple[Tensor, ...]]]:
        """Loaders of out-of-distribution images, in batches (images,), by name."""
        sets = {"corrupted": self.corrupted, "photos": self.photos}
        return {name: DataLoader(TensorDataset(images), EVALUATION_BATCH) for name, images in sets.items()}


def demo_data(size: Size = FULL, seed: int = 0) -> DemoData:
    """A random split of UCI digits, corrupted copies of the held-out ones (equal shares of all kinds), and photographs.

    Raises:
        ValueError: if ``size`` exceeds the number of digits.

    Example:
        >>> data = demo_data(Size(stream=3, heldout=10))
        >>> data.size, data.corrupted.shape
        (Size(stream=3, heldout=10), torch.Size([10, 1, 28, 28]))
    """
    stream, rest = uci_digits_split(size.stream, seed)
    if not 1 <= size.heldout <= len(rest.labels):
        raise ValueError(f"`size` must hold out 1 to {len(rest.labels)} images, got {size.heldout}.")
    heldout = LabelledImages(rest.images[: size.heldout], rest.labels[: size.heldout])
    pieces = zip(CORRUPTIONS, heldout.images.chunk(len(CORRUPTIONS)), strict=False)
    corrupted = torch.cat([corrupt(piece, kind, SEVERITY, seed) for kind, piece in pieces])
    return DemoData(stream, heldout, corrupted, photo_patches(size.heldout, seed))


def save_arrays(data: DemoData, folder: Path) -> None:
    """The labelled sets as `.npz` files that the command line reads."""
    sets = {
        "stream": data.stream,
        "heldout": data.heldout,
        "corrupted": LabelledImages(data.corrupted, data.heldout.labels),
    }
    for name, (images, labels) in sets.items():
        np.savez_compressed(folder / f"{name}.npz", x=images.numpy(), y=labels.numpy())
