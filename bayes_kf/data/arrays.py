"""Labelled data from `.npz` files. Pickled objects are rejected."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

from bayes_kf.data.images import ImageFormat
from bayes_kf.data.labels import LabelledData, encode_labels, make_loader

_KEYS = (("x", "y"), ("inputs", "targets"))
# RuntimeError: encrypted files; MemoryError: impossible shapes
_UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)
_MOST_CLASSES = 100_000


def array_data(
    path: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    image_format: ImageFormat | None = None,
    batch_size: int = 1,
    shuffle: bool = False,
    seed: int = 0,
) -> LabelledData:
    """Batches (inputs, targets) from an `.npz` file with arrays `x` and `y`, or `inputs` and `targets`.

    Float inputs of any shape (N, ...) become float32. Inputs in uint8 are pixels, (N, H, W),
    (N, H, W, C) or (N, C, H, W), and need `image_format`. Integer targets (N,) are class indices from 0, string
    targets (N,) are labels, and float targets (N,) or (N, k) are regression targets.

    Args:
        path: the file.
        class_names: the classes in order; None: the indices as strings, or the sorted labels.
        image_format: the image format of the model.
        batch_size: examples per batch.
        shuffle: whether every pass has a new random order.
        seed: seed of the order.

    Returns:
        The loader and the class names, none for float targets.

    Raises:
        ValueError: if the file is unreadable or holds other arrays.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "data.npz"
        >>> np.savez(file, x=np.zeros((6, 4)), y=np.arange(6) % 3)
        >>> data = array_data(file, batch_size=2)
        >>> data.class_names, [t.shape for t in next(iter(data.loader))]
        (('0', '1', '2'), [torch.Size([2, 4]), torch.Size([2])])
    """
    x, y = _read_pair(Path(path))
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y) or len(x) == 0:
        raise ValueError(f"`path` must hold as many inputs as targets, at least one, got {_describe(x, y)} in {path}.")
    targets, names = _targets(y, class_names, path)
    return LabelledData(
        make_loader(TensorDataset(_inputs(x, image_format, path), targets), batch_size, shuffle, seed), names
    )


def _describe(x: np.ndarray, y: np.ndarray) -> str:
    return f"{x.dtype} {x.shape} and {y.dtype} {y.shape}"


def open_arrays(path: Path, wanted: Sequence[str]) -> tuple[dict[str, np.ndarray], str]:
    """The arrays of an `.npz` file with the wanted names, never unpickled, and the names of all its arrays.

    Raises:
        ValueError: if the file is unreadable.
    """
    try:
        with path.open("rb") as stream:  # numpy does not close a damaged archive that it opened
            arrays = np.load(stream, allow_pickle=False)
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise ValueError(f"it is a single array of shape {arrays.shape}")
            return {name: arrays[name] for name in wanted if name in arrays}, ", ".join(arrays.files) or "none"
    except _UNREADABLE as error:
        raise ValueError(f"`path` must be an .npz file of plain arrays, got {path}: {error}.") from error


def _read_pair(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets."""
    arrays, names = open_arrays(path, [name for pair in _KEYS for name in pair])
    for x, y in _KEYS:
        if x in arrays and y in arrays:
            return arrays[x], arrays[y]
    raise ValueError(f"`path` must hold arrays x and y, or inputs and targets, got {names} in {path}.")


def _inputs(x: np.ndarray, image_format: ImageFormat | None, path: str | os.PathLike[str]) -> torch.Tensor:
    """Inputs in float32, finite."""
    if x.dtype == np.uint8:
        if image_format is None:
            raise ValueError(f"`image_format` must be given for uint8 pixels, got None for the uint8 inputs of {path}.")
        return image_format.from_pixels(x)
    if x.dtype.kind != "f":
        raise ValueError(f"`path` must hold inputs in floats, or uint8 pixels, got {x.dtype} in {path}.")
    if not np.isfinite(x).all():
        row = np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(1))[0]
        raise ValueError(f"`path` must hold finite inputs, got NaN or infinity in row {row} of {path}.")
    return torch.from_numpy(x.astype(np.float32))


def _targets(
    y: np.ndarray, class_names: Sequence[str] | None, path: str | os.PathLike[str]
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Class indices (N,) and class names, or float32 targets and no names."""
    if y.dtype.kind == "f" and y.ndim <= 2 and np.isfinite(y).all():
        return torch.from_numpy(y.astype(np.float32)), ()
    if y.dtype.kind == "U" and y.ndim == 1:
        return encode_labels(y.tolist(), class_names)
    if y.dtype.kind not in "iub" or y.ndim != 1:
        raise ValueError(
            "`path` must hold targets in integers or strings (N,) or finite floats (N,) or (N, k),"
            f" got {y.dtype} {y.shape} in {path}."
        )
    indices = y.astype(np.int64)
    last = (_MOST_CLASSES if class_names is None else len(class_names)) - 1
    if indices.min() < 0 or indices.max() > last:
        raise ValueError(
            f"`path` must hold class indices from 0 to {last}, or numbers to regress on in floats,"
            f" got {indices.min()} to {indices.max()} in {path}."
        )
    names = tuple(map(str, range(indices.max() + 1))) if class_names is None else tuple(class_names)
    return torch.from_numpy(indices), names
