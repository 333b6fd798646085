"""Benchmark data from a folder outside the repository: $BAYES_KF_DATA, or ../shared/data beside the repository.

The folder has xz-compressed NumPy arrays, uint8, such as `mnist/train_x.npy.xz`. Data sets of grey images are
(N, 1, 28, 28), float32 in [-1, 1], white on black, with labels (N,), int64.
"""

from __future__ import annotations

import io
import lzma
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bayes_kf.data import LabelledImages

Split = Literal["train", "test"]
REPOSITORY = Path(__file__).resolve().parents[2]


def data_folder() -> Path:
    """The folder of benchmark data.

    Raises:
        FileNotFoundError: if neither $BAYES_KF_DATA nor ../shared/data is a folder.
    """
    named = os.environ.get("BAYES_KF_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        raise FileNotFoundError(
            "`BAYES_KF_DATA` must name the folder of benchmark data (mnist/train_x.npy.xz, usps/...),"
            f" got {folder}, which is not a folder."
        )
    return folder


def mnist(split: Split) -> LabelledImages:
    """MNIST in its original order: 60,000 or 10,000 images."""
    return _labelled("mnist", f"{split}_", _grey(_read("mnist", f"{split}_x")))


def usps(split: Split, *, frame: bool = False) -> LabelledImages:
    """USPS: 7,291 or 2,007 images of 16x16, resized to 28x28, or to 20x20 in MNIST's black frame of 4 pixels."""
    grey = _grey(_read("usps", f"{split}_x"))
    side = 20 if frame else 28
    grey = F.interpolate(grey, size=(side, side), mode="bilinear", align_corners=False)
    return _labelled("usps", f"{split}_", F.pad(grey, (4, 4, 4, 4)) if frame else grey)


def kmnist() -> LabelledImages:
    """The 10,000 test images of Kuzushiji-MNIST, ten classes of cursive characters."""
    return _labelled("kmnist-test", "", _grey(_read("kmnist-test", "x")))


def notmnist() -> LabelledImages:
    """5,000 letters A to J in many fonts."""
    return _labelled("notmnist-5000", "", _grey(_read("notmnist-5000", "x")))


def fashion_mnist() -> LabelledImages:
    """900 images of clothes, 90 of each class of Fashion-MNIST's training set."""
    return _labelled("fashion-mnist-900", "", _grey(_read("fashion-mnist-900", "x")))


def omniglot(part: Literal[1, 2]) -> tuple[Tensor, Tensor, Tensor]:
    """Characters of five alphabets, each by 20 drawers: images (N, 1, 28, 28) in [-1, 1], characters, alphabets (N,).

    Grey levels are shares of ink in 28x28 cells, doubled and cut at white: strokes then are about as bright as MNIST's.
    """
    bits = np.unpackbits(_read("omniglot-small", f"small{part}_x_bits"), axis=1, count=105 * 105)
    ink = torch.from_numpy(bits.reshape(-1, 1, 105, 105)).float()
    images = 2 * (2 * F.adaptive_avg_pool2d(ink, 28)).clamp(max=1) - 1
    kinds = [
        torch.from_numpy(_read("omniglot-small", f"small{part}_{kind}").astype(np.int64))
        for kind in ("char", "alphabet")
    ]
    return images, kinds[0], kinds[1]


def uci_regression(name: str, split: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs (N, d), targets (N,), both float64, and the indices of the test examples of a standard split."""
    archive = archive_of("uci-regression/uci")
    values = [torch.from_numpy(archive[f"{name}.{field}"]).double() for field in ("x", "y")]
    return values[0], values[1], torch.from_numpy(archive[f"{name}.test"][split].astype(np.int64))


def archive_of(name: str) -> Mapping[str, Any]:
    """The arrays of an ``.npz`` file of the data folder."""
    path = data_folder() / f"{name}.npz"
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def photographs(archive: Mapping[str, Any], which: np.ndarray) -> Tensor:
    """JPEG images of an archive with the indices ``which``, (N, 3, H, W) in [0, 1]."""
    head, body, off = archive["head"].tobytes(), archive["body"].tobytes(), archive["off"]
    pixels = [np.asarray(Image.open(io.BytesIO(head + body[off[i] : off[i + 1]])).convert("RGB")) for i in which]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255


def _read(name: str, array: str) -> np.ndarray:
    """One array of the folder."""
    path = data_folder() / name / f"{array}.npy.xz"
    if not path.is_file():
        raise FileNotFoundError(
            f"`BAYES_KF_DATA` must name a folder that holds {name}/{path.name}, got {path.parents[1]}."
        )
    with lzma.open(path) as file:
        return np.load(file, allow_pickle=False)


def _grey(pixels: np.ndarray) -> torch.Tensor:
    """Grey levels (N, 1, H, W) from 0 to 1."""
    return torch.from_numpy(pixels).unsqueeze(1).float() / 255


def _labelled(name: str, prefix: str, grey: torch.Tensor) -> LabelledImages:
    """Images in [-1, 1] and their labels."""
    return LabelledImages(grey * 2 - 1, torch.from_numpy(_read(name, f"{prefix}y")).long())
